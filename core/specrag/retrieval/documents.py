"""Files as text: plain text, Markdown, HTML and PDF."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from specrag._encodings import decode
from specrag._extras import require
from specrag._files import path_of
from specrag._unicode import well_formed
from specrag.errors import InvalidInputError, NotFoundError, said

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
# Folders that hold copies of other people's packages. Folders whose names begin with a dot are left out too.
_LEFT_OUT = ("node_modules",)
# Where a word may be broken at the end of a line. It is not shown, and no question has it.
_SOFT_HYPHEN = "\xad"


@dataclass(frozen=True)
class Document:
    """A file's text. ``source``: its path as given; ``page``: from 1, for PDF."""

    text: str
    title: str
    source: str
    page: int | None = None

    def __post_init__(self) -> None:
        for name in ("text", "title", "source"):
            object.__setattr__(self, name, well_formed(getattr(self, name)))


@dataclass
class _Found:
    """What was read of some files, and what is to be told of them."""

    documents: list[Document] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # read, but not all of it, or by a guess
    problems: list[str] = field(default_factory=list)  # not read


def read_documents(
    path: str | Path, *, strict: bool = False, hidden: bool = False, notes: list[str] | None = None
) -> list[Document]:
    """The documents of a file, or of every readable file below a folder, in order of their paths.

    Args:
        path: A file or a folder. Of a folder, hidden files and folders and ``node_modules`` are left out.
        strict: Files of a folder that cannot be read are an error. Otherwise they are left out, and ``notes`` name
            them.
        hidden: Read hidden files and folders and ``node_modules`` too.
        notes: Told which files are left out, which encodings were guessed and which PDF pages hold no text, one line
            each. Without a list to add them to, they are one warning.

    Raises:
        NotFoundError: There is nothing at ``path``.
        MissingExtraError: A PDF or HTML file is there, and the extra ``documents`` is not installed.
        InvalidInputError: The file cannot be read or has another type; the folder holds no document, none that can be
            read, or, with ``strict``, one that cannot.
    """
    root = path_of(path)
    if not root.exists():
        raise NotFoundError(f"no file or folder at {root}")
    found = _Found()
    if root.is_dir():
        _read_folder(root, found, hidden=hidden, strict=strict)
    else:
        _read(root, found)
    told = [*found.notes, *(f"left out: {problem}" for problem in found.problems)]
    if notes is not None:
        notes += told
    elif told:
        warnings.warn("\n".join(told), stacklevel=2)
    return found.documents


def _read_folder(root: Path, found: _Found, *, hidden: bool, strict: bool) -> None:
    files = _files(root, found, hidden=hidden)
    if not files and not found.problems:
        raise InvalidInputError(f"{root} holds no document: {', '.join(SUFFIXES)} are read")
    for file in files:
        try:
            _read(file, found)
        except InvalidInputError as error:
            found.problems.append(str(error))
    if found.problems and (strict or not found.documents):
        listed = "\n".join(found.problems)
        raise InvalidInputError(f"{len(found.problems)} of {len(files)} files could not be read:\n{listed}")


def _files(root: Path, found: _Found, *, hidden: bool) -> list[Path]:
    def unreadable(error: OSError) -> None:
        found.problems.append(f"{error.filename} could not be read: {error.strerror}")

    def wanted(name: str) -> bool:
        return hidden or not (name.startswith(".") or name in _LEFT_OUT)

    files = []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = filter(wanted, folders)
        for file in (Path(folder, name) for name in names if wanted(name) and Path(name).suffix.lower() in SUFFIXES):
            if file.is_file() or file.is_symlink():  # a pipe or a device is no document, and never ends
                files.append(file)
    return sorted(files)


def _read(file: Path, found: _Found) -> None:
    """Add the documents of a file to ``found``.

    Raises:
        InvalidInputError: It cannot be read, or has another type.
        MissingExtraError: A package that reads its type is not installed.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(f"{file} is not one of the types that are read: {', '.join(SUFFIXES)}")
    if not (file.is_file() or file.is_symlink()):
        raise InvalidInputError(f"{file} is not a file that can be read: it is a pipe or a device")
    if suffix == ".pdf":
        require("pypdf", "documents", f"reading {file.name}")
        _read_pdf(file, found)
        return
    if suffix in (".html", ".htm"):
        require("bs4", "documents", f"reading {file.name}")
    title = None
    try:
        raw = file.read_bytes()
        if suffix in (".html", ".htm"):
            from specrag.retrieval._html import read_html

            title, decoded = read_html(raw)
        else:
            decoded = decode(raw)
    except OSError as error:
        raise InvalidInputError(f"{file} could not be read: {error.strerror or error}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"{file} {error}") from error
    if suffix in (".md", ".markdown") and (heading := re.search(r"^#\s+(.+)$", decoded.text, re.MULTILINE)):
        title = heading[1].strip()
    if decoded.note:
        found.notes.append(f"{file}: {decoded.note}")
    found.documents.append(Document(decoded.text.replace(_SOFT_HYPHEN, ""), title or file.stem, str(file)))


def _read_pdf(file: Path, found: _Found) -> None:
    """Add the pages of a PDF. Pages that cannot be read, or hold no text, are named; a file without text is refused."""
    import pypdf
    from pypdf.errors import DependencyError, FileNotDecryptedError

    failed: list[int] = []
    empty: list[int] = []
    read: list[int] = []
    with _quiet_pypdf():
        # A damaged file makes pypdf raise almost anything: KeyError, TypeError, RecursionError, zlib.error.
        try:
            pages = list(pypdf.PdfReader(file).pages)
        except FileNotDecryptedError as error:
            raise InvalidInputError(f"{file} could not be read as PDF: it is encrypted with a password") from error
        except DependencyError as error:
            raise InvalidInputError(
                f"{file} could not be read as PDF: it is encrypted, which needs pip install 'specrag[documents]'"
            ) from error
        except Exception as error:
            raise InvalidInputError(f"{file} could not be read as PDF: {said(error)}") from error
        for number, page in enumerate(pages, start=1):
            try:
                text = page.extract_text()
            except Exception:
                failed.append(number)
                continue
            (read if text.strip() else empty).append(number)
            if text.strip():
                found.documents.append(Document(text.replace(_SOFT_HYPHEN, ""), file.stem, str(file), number))
    if not read:
        why = "its pages are damaged" if failed else "it holds no text: its pages are scanned, or empty"
        raise InvalidInputError(f"{file} could not be read as PDF: {why}")
    for numbers, why in ((failed, "could not be read"), (empty, "without text, scanned or empty")):
        if numbers:
            found.notes.append(f"{file}: of {len(pages)} pages, {len(numbers)} {why}: {_listed(numbers)}")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


@contextlib.contextmanager
def _quiet_pypdf() -> Iterator[None]:
    """Keep pypdf from logging what is wrong with a file: that is told in one line."""
    log = logging.getLogger("pypdf")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
