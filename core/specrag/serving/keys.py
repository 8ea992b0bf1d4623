"""API keys: who may use the server, and which indexes each key may ask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specrag.errors import InvalidInputError, NotFoundError

# A shorter key can be guessed.
SHORTEST = 16


@dataclass(frozen=True)
class Owner:
    """Who sent a request.

    Attributes:
        name: The number of the key, from 1; ``""`` on a server without keys. It stands in logs.
        indexes: The indexes that may be asked; ``None``: all.
    """

    name: str = ""
    indexes: frozenset[str] | None = None

    def may_ask(self, index: str) -> bool:
        """Whether this owner may ask ``index``."""
        return self.indexes is None or index in self.indexes


class ApiKeys:
    """The keys of a server. Only their SHA-256 is kept.

    Args:
        lines: One key per line, and after it, separated by white space, the names of the indexes that it may ask, with
            commas between them; without names, all. Empty lines and lines that begin with ``#`` are passed over.

    Raises:
        InvalidInputError: There is no key, one is too short, or one stands there twice.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._digests: list[bytes] = []
        self.owners: list[Owner] = []
        for line in lines:
            key, *named = line.split(maxsplit=1) or [""]
            if not key or key.startswith("#"):
                continue
            number = len(self.owners) + 1
            if len(key) < SHORTEST:
                raise InvalidInputError(f"API key {number} has {len(key)} characters: give at least {SHORTEST}")
            if self.owner_of(key) is not None:
                raise InvalidInputError(f"API key {number} stands there twice: each needs a line of its own")
            indexes = frozenset(name.strip() for name in named[0].split(",")) - {""} if named else None
            self._digests.append(_digest(key))
            self.owners.append(Owner(str(number), indexes))
        if not self.owners:
            raise InvalidInputError("no API key: give one key per line")

    @classmethod
    def read(cls, file: Path) -> ApiKeys:
        """The keys of a file.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not text, or see the class.
        """
        try:
            return cls(file.read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            raise NotFoundError(f"no file with API keys at {file}") from None
        except UnicodeDecodeError:
            raise InvalidInputError(f"{file} is not a text file with API keys, one per line") from None

    def owner_of(self, key: str) -> Owner | None:
        """Whose key it is. The time that this takes says nothing about the keys."""
        digest, found = _digest(key), None
        for known, owner in zip(self._digests, self.owners, strict=True):
            if hmac.compare_digest(known, digest):
                found = owner
        return found

    def check_indexes(self, names: Sequence[str]) -> None:
        """Whether each index that a key names is there.

        Raises:
            InvalidInputError: One is not.
        """
        for owner in self.owners:
            if unknown := sorted((owner.indexes or frozenset()) - set(names)):
                raise InvalidInputError(
                    f"API key {owner.name} names the index {', '.join(unknown)}; there are {', '.join(names) or 'none'}"
                )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
