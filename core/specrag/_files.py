"""Files and folders that appear whole or stay as they were, whatever ends the process that writes them.

What is written stands aside first, under a hidden name beside its target. It is flushed to the disk and then renamed
over the target. A lock lets one writer at a time do so. The kernel gives the lock of a killed process free, so the next
writer may remove what that process left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from specrag.errors import InvalidInputError, SpecRAGError, a

_BLOCK = 1 << 20  # bytes


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a new ``target`` to, a file or a folder. It lies in a scratch folder beside the target.

    When the block ends without an error, the new one takes the place of the old in one rename. Otherwise the old one
    stays, and nothing else does. Two writers take turns; the last one wins.

    Raises:
        InvalidInputError: ``target`` cannot be a file, because it is a folder with something in it.
        SpecRAGError: It cannot be written: the disk is full, or writing is not allowed.
    """
    target = whole(target)
    check_no_device(target)
    with writing(target), turn_of(target), scratch(target) as folder:
        part = folder / target.name
        yield part
        if part.is_file():
            check_file_target(target)
        if target.is_dir():
            target.rmdir()  # a folder with something in it is not replaced
        put(part, target)


def check_no_device(target: Path) -> None:
    """Check that a new file does not take the place of a device, a pipe or a socket.

    Raises:
        InvalidInputError: ``target`` is one.
    """
    if target.exists() and not target.is_file() and not target.is_dir():
        raise InvalidInputError(f"{target} is a device, a pipe or a socket: give the path of a file or folder")


def check_file_target(target: Path) -> None:
    """Check that a file may be written to ``target``, before hours of work go into what shall be in it.

    Raises:
        InvalidInputError: It is a folder, or a file is where its folder should be.
    """
    target = whole(target)
    if target.is_dir():
        raise InvalidInputError(f"{target} is a folder: give the path of a file")
    if (blocking := next((above for above in target.parents if above.exists()), None)) and not blocking.is_dir():
        raise InvalidInputError(f"{blocking} is a file: {target} cannot be in it")


def check_folder_target(target: Path) -> None:
    """Check that ``target`` is a folder or may become one, before hours of work go into what shall be in it.

    Raises:
        InvalidInputError: A file is there, or where a folder above it should be.
    """
    target = whole(target)
    there = next((path for path in (target, *target.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        cannot = "give a folder" if there == target else f"{target} cannot be in it"
        raise InvalidInputError(f"{there} is a file: {cannot}")


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what is not finished. Needs the right to write ``target``.

    It is removed at the end; what a killed process left in it, at the beginning.
    """
    folder = target.with_name(f".{target.name}.part")
    remove(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


@contextlib.contextmanager
def turn_of(target: Path, *, busy: str | None = None) -> Iterator[None]:
    """The right to write ``target``, which one process at a time has. Makes the folder that it is in.

    Args:
        target: A file or folder; it need not be there.
        busy: Do not wait for another process; raise an InvalidInputError with this text.
    """
    target = whole(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(file, timeout=-1 if busy is None else 0, is_singleton=False):
            try:
                yield
            finally:
                # Before the lock is given free: who waits for it sees that the file is gone, and makes another.
                with contextlib.suppress(OSError):
                    file.unlink()
    except Timeout as error:
        raise InvalidInputError(busy) from error


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors of the operating system, and what libraries make of them, as one line that names ``target``.

    Raises:
        SpecRAGError: In place of such an error.
    """
    try:
        yield
    except SpecRAGError:
        raise
    except OSError as error:
        raise SpecRAGError(f"{target} could not be written: {error.strerror or error}") from error
    except Exception as error:
        if (reason := _refused_by_disk(error)) is None:
            raise
        raise SpecRAGError(f"{target} could not be written: {reason}") from error


def _refused_by_disk(error: Exception) -> str | None:
    """Why the disk took no more, where a library says it in an error of its own."""
    said = str(error)
    for code in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(code) in said:
            return os.strerror(code)
    # torch's writer of checkpoints and FAISS's of indexes say no more than this.
    return (
        "the disk is full or refuses to write" if re.search(r"inline_container|WriteIndex|write error", said) else None
    )


def path_of(given: Any) -> Path:
    """``given`` as a path, with the home folder in place of ``~``.

    Raises:
        InvalidInputError: It is neither a text nor a ``Path``, or it is empty.
    """
    if isinstance(given, str) and not given.strip():
        raise InvalidInputError(f"a path must not be empty, got {given!r}")
    if isinstance(given, bytes) or not isinstance(given, str | os.PathLike):
        raise InvalidInputError(f"a path must be a text or a Path, got {a(given)}")
    if "\0" in (text := os.fspath(given)):
        raise InvalidInputError(f"{text!r} cannot be used as a path: it has a null character")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home for "~"
        raise InvalidInputError(f"{text!r} cannot be used as a path: {error}") from error


def whole(path: str | Path) -> Path:
    """``path`` without links and ``~``, so that it has a name and a parent, and what a link leads to is written.

    Raises:
        InvalidInputError: It is no path: links that lead to each other, or a character that no name may have.
    """
    try:
        return path_of(path).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # RuntimeError: a loop of links, or no home for "~"
        raise InvalidInputError(f"{str(path)!r} cannot be used as a path: {error}") from error


def left_by_a_killed_writer(target: Path) -> bool:
    """Whether something of a writer of ``target`` is there: of a killed one, or of one at work."""
    return any(target.with_name(f".{target.name}.{suffix}").exists() for suffix in ("part", "lock"))


def put(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``, both on one disk, once all of it is on the disk."""
    sync(part)
    part.replace(target)
    _sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing is there afterwards."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or every file of a folder, is on the disk and not in the memory of the system alone."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
        _sync_folder(path)
        return
    with path.open("rb+" if os.name == "nt" else "rb") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders, and writes names at once
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(opened)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to a file that appears whole. Raises what ``replacing`` raises."""
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")


def move_into(folder: Path, source: Path, *, last: str) -> None:
    """Move each file of ``source`` over that of its name in ``folder``; the one whose name begins with ``last``, last.

    Who finds the last one finds the others.
    """
    sync(source)
    for file in sorted(source.iterdir(), key=lambda file: (file.name.startswith(last), file.name)):
        file.replace(folder / file.name)
    _sync_folder(folder)


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
