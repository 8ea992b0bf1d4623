"""The folder of an index: what says that it is one, how a new one takes the place of the old, what is left is removed.

``specrag-index.json`` names the format and its version, and the two other files with their SHA-256. These carry a part
of the digest in their names, so a new index is written beside the old one. Replacing ``specrag-index.json`` is the one
step that makes the new one count; before it the old index is whole, after it the new one is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from specrag._files import digest, put, remove, turn_of, whole, writing
from specrag.errors import InvalidInputError, NotFoundError

MARKER = "specrag-index.json"
FORMAT = "specrag-index"
VERSION = 2

_PART = ".index.part"
_LOCK = "index"  # the lock is the hidden file .index.lock
_OURS = re.compile(r"(passages|vectors)-[0-9a-f]{16}\.(jsonl|faiss)|\.index\.(part|lock)")

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Facts:
    """What ``specrag-index.json`` says.

    Attributes:
        embedder: The name of the embedder.
        dimension: Of its vectors.
        passages: How many there are.
        probe: The embedder's vector of ``PROBE``, by which another embedder is recognised.
        files: The SHA-256 of each file, by its name.
    """

    embedder: str
    dimension: int
    passages: int
    probe: tuple[float, ...]
    files: Mapping[str, str]

    def file(self, kind: str) -> str:
        """The name of the file of this kind: "passages" or "vectors"."""
        return next(name for name in self.files if name.startswith(f"{kind}-"))


def is_index(folder: Path) -> bool:
    """Whether ``folder`` holds an index of this package, of whatever version. Other files named alike do not count."""
    return _marked(folder) is not None


def _marked(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def check_target(folder: Path) -> None:
    """Check that an index may be written to ``folder``: it is new, empty, or holds an index.

    Raises:
        InvalidInputError: It is a file, or holds other files.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is a file: give a folder to write the index to")
    if not is_index(folder) and not all(_OURS.fullmatch(file.name) for file in folder.iterdir()):
        raise InvalidInputError(f"{folder} holds other files, and no index of specrag: give a new folder")


def read(folder: Path, reader: Callable[[Facts], _Read]) -> tuple[Facts, _Read]:
    """The facts of an index, and what ``reader`` makes of its files, which are as they were written.

    Raises:
        NotFoundError: There is no index.
        InvalidInputError: It is damaged, or of another version.
    """
    facts = _facts(folder)
    while True:
        try:
            for name, expected in facts.files.items():
                if digest(folder / name) != expected:
                    raise ValueError(f"{name} has changed")
            return facts, reader(facts)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            before, facts = facts, _facts(folder)
            if facts == before:  # else another process put a new index in its place meanwhile
                raise InvalidInputError(f"the index at {folder} is damaged: {error}. Index again") from error


def _facts(folder: Path) -> Facts:
    content = _marked(folder)
    if content is None:
        if (folder / MARKER).exists():
            raise InvalidInputError(f"the index at {folder} is damaged: {MARKER} cannot be read. Index again")
        raise NotFoundError(f"no index at {folder}: make one with `specrag index`")
    if content.get("version") != VERSION:
        raise InvalidInputError(f"{folder} has index version {content.get('version')}, this is {VERSION}: index again")
    try:
        facts = Facts(
            embedder=str(content["embedder"]),
            dimension=int(content["dimension"]),
            passages=int(content["passages"]),
            probe=tuple(float(x) for x in content["probe"]),
            files={str(name): str(found) for name, found in content["files"].items()},
        )
        if len(facts.probe) != facts.dimension or not all(_OURS.fullmatch(name) for name in facts.files):
            raise ValueError("a probe of its dimension, or names of its files")
        facts.file("passages"), facts.file("vectors")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise InvalidInputError(f"the index at {folder} is damaged: {MARKER} lacks {error}. Index again") from error
    return facts


def write(folder: Path, facts: Facts, passages: Callable[[Path], None], vectors: Callable[[Path], None]) -> None:
    """Write an index; ``facts.files`` is filled in. Two writers take turns; the last one wins.

    Args:
        passages, vectors: Each writes its file to the path that it is given.

    Raises:
        InvalidInputError: See ``check_target``.
        SpecRAGError: The disk is full, or writing is not allowed. The old index stays.
    """
    folder = whole(folder)
    check_target(folder)
    new = not folder.exists()
    with writing(folder):
        try:
            with turn_of(folder / _LOCK):
                check_target(folder)
                _write(folder, facts, {"passages.jsonl": passages, "vectors.faiss": vectors})
        except BaseException:
            if new and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            raise


def _write(folder: Path, facts: Facts, writers: Mapping[str, Callable[[Path], None]]) -> None:
    part = folder / _PART
    try:
        files = {}
        for kind, write_to in writers.items():
            write_to(part)
            found = digest(part)
            name, suffix = kind.split(".")
            files[f"{name}-{found[:16]}.{suffix}"] = found
            put(part, folder / f"{name}-{found[:16]}.{suffix}")
        content = {"format": FORMAT, "version": VERSION, **asdict(facts), "files": files}
        part.write_text(json.dumps(content), encoding="utf-8")
        put(part, folder / MARKER)
    finally:
        _clean(folder)


def _clean(folder: Path) -> None:
    """Remove what writers left that were interrupted, and the index that was replaced. Needs the lock."""
    content = _marked(folder) or {}
    kept = {f".{_LOCK}.lock", *content.get("files", ())}
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in kept:
            remove(file)
