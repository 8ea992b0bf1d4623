"""A datastore of texts as tokens, on disk, in which what followed given tokens is found (REST; He et al., arXiv
2311.08252, section 3.1).

It is a folder: the tokens, a suffix array over them, and ``datastore.json``, which names the tokenizer. The arrays are
memory-mapped, so a large datastore opens at once and takes memory only for the pages that are read.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specrag._files import path_of, replacing
from specrag.errors import InvalidInputError, NotFoundError, a
from specrag.rapid.compatibility import tokenizer_digest

MARKER = "datastore.json"
FORMAT, VERSION = "specrag-datastore", 1
#: Suffixes are sorted by so many tokens: longer matches are not told apart.
LONGEST = 16
#: Stands after each text. No token has this id, so nothing is found across the end of a text.
END = -1
_MOST_TOKENS = 2**31 - 1  # positions are int32


@dataclass(frozen=True)
class Occurrences:
    """Where a datastore holds the longest suffix of some tokens.

    Attributes:
        length: Tokens of that suffix; 0: not even the shortest was found.
        first, end: The range of the suffix array that begins with it.
    """

    length: int
    first: int = 0
    end: int = 0


class Datastore:
    """An opened datastore. ``open`` opens one, ``build`` makes one.

    Args:
        tokens: All texts, each with ``END`` after it, [tokens + texts], int32.
        suffixes: The positions of all tokens, ordered by the ``LONGEST`` tokens that begin there, [tokens], int32.
        facts: The contents of ``datastore.json``.
        folder: Its path, for messages.
    """

    def __init__(self, tokens: np.ndarray, suffixes: np.ndarray, facts: dict[str, Any], folder: Path) -> None:
        self.tokens, self.suffixes, self.folder = tokens, suffixes, folder
        self._tokenizer = facts["tokenizer"]

    def __len__(self) -> int:
        """Tokens of all texts."""
        return len(self.suffixes)

    @staticmethod
    def check_target(folder: str | Path) -> None:
        """Raise InvalidInputError when a datastore cannot be written to ``folder``, because something is there."""
        path = path_of(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InvalidInputError(f"{path} is there already and not empty: give a new folder for the datastore")

    @classmethod
    def build(cls, texts: Iterable[str], tokenizer: Any, folder: str | Path, *, name: str = "") -> Datastore:
        """Write a datastore of ``texts``, and open it. Sorting takes about 70 bytes of memory per token.

        Args:
            texts: Any texts. Those that are most like the expected answers help most.
            tokenizer: The target's.
            folder: New or empty. It is written whole, or not at all.
            name: What the tokenizer is called in messages.

        Raises:
            InvalidInputError: ``texts`` is no sequence of texts, has no tokens or more than 2^31 - 1, or ``folder`` is
                not empty.
            SpecRAGError: The disk is full, or writing is not allowed.
        """
        cls.check_target(folder)
        if isinstance(texts, str):
            raise InvalidInputError("texts must be a sequence of texts, got a single one: give [text]")
        parts, counted = [], 0
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInputError(f"texts[{i}] must be a text, got {a(text)}")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                parts.append(np.array([*ids, END], dtype=np.int32))
                counted += 1
        if not parts:
            raise InvalidInputError("the texts have no tokens: a datastore needs some to look up")
        tokens = np.concatenate(parts)
        if len(tokens) > _MOST_TOKENS:
            raise InvalidInputError(f"a datastore holds at most {_MOST_TOKENS} tokens, these texts have {len(tokens)}")
        order = suffix_order(tokens)
        suffixes = order[tokens[order] != END].astype(np.int32)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "texts": counted,
            "tokens": len(suffixes),
            "tokenizer": {"name": name, "digest": tokenizer_digest(tokenizer)},
        }
        with replacing(path_of(folder)) as part:
            part.mkdir()
            np.save(part / "tokens.npy", tokens)
            np.save(part / "suffixes.npy", suffixes)
            (part / MARKER).write_text(json.dumps(facts), encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Datastore:
        """Open a datastore. Its arrays are mapped, not read.

        Raises:
            NotFoundError: There is none.
            InvalidInputError: It is damaged, of another version, or empty.
        """
        path = path_of(folder)
        if not (path / MARKER).is_file():
            raise NotFoundError(f"no datastore at {path}: make one with `specrag datastore build TEXTS --out {path}`")
        try:
            facts = json.loads((path / MARKER).read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError(f"{MARKER} names the format {facts['format']!r}")
            version = facts["version"]
            counted, digest = int(facts["tokens"]), facts["tokenizer"]["digest"]
            if version == VERSION:
                tokens, suffixes = (np.load(path / f"{n}.npy", mmap_mode="r") for n in ("tokens", "suffixes"))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"the datastore at {path} is damaged: {error}. Build it again") from error
        if version != VERSION:
            raise InvalidInputError(f"{path} has datastore version {version}, this is {VERSION}: build it again")
        if counted == 0:
            raise InvalidInputError(f"the datastore at {path} is empty: build it from texts")
        arrays = isinstance(tokens, np.ndarray) and isinstance(suffixes, np.ndarray)  # np.load opens archives too
        fitting = arrays and tokens.dtype == suffixes.dtype == np.int32 and tokens.ndim == suffixes.ndim == 1
        if not fitting or len(suffixes) != counted or len(tokens) <= counted or not isinstance(digest, str):
            raise InvalidInputError(f"the datastore at {path} is damaged: its files do not fit. Build it again")
        return cls(tokens, suffixes, facts, path)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Check that the datastore holds this tokenizer's tokens.

        Raises:
            InvalidInputError: It was built with another one.
        """
        if self._tokenizer["digest"] != tokenizer_digest(tokenizer):
            name = self._tokenizer.get("name") or "another tokenizer"
            raise InvalidInputError(
                f"the datastore at {self.folder} was built with {name}, not with the target's tokenizer: "
                "build one with --model TARGET"
            )

    def find(self, tokens: Sequence[int], least: int = 2) -> Occurrences:
        """Where the longest suffix of ``tokens`` stands, of ``least`` to ``LONGEST`` tokens.

        Raises:
            InvalidInputError: The datastore is damaged.
        """
        low, high = least - 1, min(LONGEST, len(tokens))  # a suffix of `low` tokens is known to be there
        if high < least:
            return Occurrences(0)
        first = 0
        while low < high:  # what contains a longer suffix contains a shorter one
            middle = (low + high + 1) // 2
            at = self._first(tokens[-middle:])
            if at is None:
                high = middle - 1
            else:
                low, first = middle, at
        if low < least:
            return Occurrences(0)
        pattern = list(tokens[-low:])
        end = bisect_right(range(len(self.suffixes)), pattern, lo=first, key=lambda i: self._read(i, low))
        return Occurrences(low, first, end)

    def continuations(self, found: Occurrences, count: int, most: int = 256) -> np.ndarray:  # [rows, count], -1: ended
        """What follows the occurrences, ``count`` tokens of each; of many, ``most`` that are spread evenly over them.

        Raises:
            InvalidInputError: The datastore is damaged.
        """
        rows = np.linspace(found.first, found.end - 1, min(most, found.end - found.first)).round().astype(np.int64)
        places = self.suffixes[rows].astype(np.int64)[:, None] + found.length + np.arange(count)
        beyond = (places < 0) | (places >= len(self.tokens))
        taken = np.where(beyond, END, self.tokens[np.where(beyond, 0, places)])
        taken[np.logical_or.accumulate(taken == END, axis=1)] = END
        return taken

    def _first(self, pattern: Sequence[int]) -> int | None:
        """The first place of the suffix array that begins with ``pattern``."""
        wanted, length = list(pattern), len(pattern)
        at = bisect_left(range(len(self.suffixes)), wanted, key=lambda i: self._read(i, length))
        return at if at < len(self.suffixes) and self._read(at, length) == wanted else None

    def _read(self, index: int, length: int) -> list[int]:
        place = int(self.suffixes[index])
        if not 0 <= place < len(self.tokens):
            raise InvalidInputError(f"the datastore at {self.folder} is damaged: no text at {place}. Build it again")
        return self.tokens[place : place + length].tolist()


def suffix_order(tokens: np.ndarray, longest: int = LONGEST) -> np.ndarray:
    """The positions of ``tokens`` in the order of the ``longest`` tokens that begin there; equal ones in text order.

    Prefix doubling (Manber and Myers, 1990): ranks by k tokens make ranks by 2k tokens. ``longest`` is a power of two.
    """
    ranks = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    length = 1
    while length < longest:
        later = np.zeros_like(ranks)  # what begins beyond the end comes first
        later[:-length] = ranks[length:] + 1
        ranks = np.unique(ranks * (int(ranks.max()) + 2) + later, return_inverse=True)[1].astype(np.int64)
        length *= 2
    return np.argsort(ranks, kind="stable")
