"""Files as text: plain text, Markdown, HTML and PDF."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specrag._extras import require
from specrag.errors import InvalidInputError, NotFoundError

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")


@dataclass(frozen=True)
class Document:
    """A file's text. ``source``: its path as given; ``page``: from 1, for PDF."""

    text: str
    title: str
    source: str
    page: int | None = None


def read_documents(path: str | Path) -> list[Document]:
    """The documents of a file, or of every readable file below a folder, in order of their paths.

    Raises:
        NotFoundError: There is nothing at ``path``.
        MissingExtraError: A PDF or HTML file is there, and the extra ``documents`` is not installed.
        InvalidInputError: A file cannot be read, has another type, or the folder holds no document.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise NotFoundError(f"no file or folder at {root}")
    if root.is_file():
        return list(_read(root))
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and file.suffix.lower() in SUFFIXES]
    if not files:
        raise InvalidInputError(f"{root} holds no document: {', '.join(SUFFIXES)} are read")
    return [document for file in files for document in _read(file)]


def _read(file: Path) -> Iterator[Document]:
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(f"{file} is not one of the types that are read: {', '.join(SUFFIXES)}")
    if suffix == ".pdf":
        yield from _read_pdf(file)
        return
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    title = file.stem
    if suffix in (".html", ".htm"):
        require("bs4", "documents", f"reading {file.name}")
        from bs4 import BeautifulSoup

        soup = BeautifulSoup(text, "html.parser")
        for hidden in soup(["script", "style", "noscript", "template"]):
            hidden.decompose()
        if soup.title is not None and soup.title.string:
            title = soup.title.string.strip()
            soup.title.decompose()
        text = soup.get_text("\n")
    elif suffix in (".md", ".markdown") and (heading := re.search(r"^#\s+(.+)$", text, re.MULTILINE)):
        title = heading[1].strip()
    yield Document(text, title, str(file))


def _read_pdf(file: Path) -> Iterator[Document]:
    require("pypdf", "documents", f"reading {file.name}")
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(file)
        for number, page in enumerate(reader.pages, start=1):
            yield Document(page.extract_text(), file.stem, str(file), number)
    except (PyPdfError, OSError, ValueError) as error:
        raise InvalidInputError(f"{file} could not be read as PDF: {error}") from error
