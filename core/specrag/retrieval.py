"""Documents -> passages -> a FAISS index, kept on disk without pickle.

Files are read as text (txt, md, html, pdf), cut at sentence ends into passages of about a hundred words, and
embedded in batches straight into the index: memory holds the passages, the index and one batch.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from specrag._extras import require
from specrag.errors import InvalidInputError, NotFoundError, SpecRAGError
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.text import passage_text

FORMAT_VERSION = 1
SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
# Passages embedded between two reports of progress.
BATCH = 256

Progress = Callable[[int, int], None]


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


def split_passages(document: Document, words: int = 100, overlap: int = 0) -> list[Passage]:
    """``document`` in passages of at most ``words`` words, cut at sentence ends where there are any.

    ``overlap`` words of each passage's end are repeated at the beginning of the next.
    """
    if words < 1 or not 0 <= overlap < words:
        raise InvalidInputError(f"words must be at least 1 and overlap from 0 to words - 1, got {words} and {overlap}")
    passages: list[list[str]] = []
    current: list[str] = []
    fresh = 0  # words of ``current`` that no passage holds yet

    def close() -> None:
        nonlocal current, fresh
        if fresh:
            passages.append(current)
            current, fresh = current[len(current) - overlap :] if overlap else [], 0

    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", document.text):
        remaining = sentence.split()
        while remaining:
            room = words - len(current)
            if len(remaining) > room and fresh and len(remaining) <= words - overlap:
                close()
                continue
            current = current + remaining[:room]
            fresh += len(remaining[:room])
            remaining = remaining[room:]
            if len(current) >= words:
                close()
    close()
    metadata: dict[str, Any] = {"source": document.source}
    if document.page is not None:
        metadata["page"] = document.page
    return [
        Passage(
            " ".join(text),
            title=document.title,
            id=f"{document.source}#{document.page or ''}{'-' if document.page else ''}{i}",
            metadata=metadata,
        )
        for i, text in enumerate(passages)
    ]


def read_passages(path: str | Path, words: int = 100, overlap: int = 0) -> list[Passage]:
    """Everything readable at ``path``, split into passages.

    Raises:
        NotFoundError: There is nothing at ``path``.
        MissingExtraError: A PDF or HTML file is there, and the extra ``documents`` is not installed.
        InvalidInputError: Nothing readable is there, or it holds no text.
    """
    passages = [p for document in read_documents(path) for p in split_passages(document, words, overlap)]
    if not passages:
        raise InvalidInputError(f"{path} holds no text")
    return passages


class PassageIndex:
    """Passages and a FAISS index of their embeddings, searched by cosine similarity.

    Example:
        >>> index = PassageIndex(bundled("minilm"))                        # doctest: +SKIP
        >>> index.add(p for d in read_documents("docs") for p in split_passages(d))  # doctest: +SKIP
        >>> index.search("who wrote it?", 10)                              # doctest: +SKIP
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.passages: list[Passage] = []
        self._index: Any = None

    def __len__(self) -> int:
        return len(self.passages)

    def add(self, passages: Iterable[Passage], progress: Progress | None = None) -> None:
        """Embed and index ``passages``; those without text are left out.

        Args:
            progress: Called with the number done and the number known so far, after each batch.
        """
        import faiss

        kept = [replace(p, embedding=None) for p in passages if p.text.strip()]
        for at in range(0, len(kept), BATCH):
            batch = kept[at : at + BATCH]
            texts = [passage_text(p) for p in batch]
            vectors = np.ascontiguousarray(self.embedder.embed(texts), dtype=np.float32)
            if len(vectors) != len(batch) or not np.isfinite(vectors).all():
                raise InvalidInputError(f"{self.embedder.name} returned {vectors.shape} for {len(batch)} texts, or NaN")
            faiss.normalize_L2(vectors)
            if self._index is None:
                self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(vectors)
            self.passages += batch
            if progress is not None:
                progress(at + len(batch), len(kept))

    def search(self, question: str, count: int = 10) -> list[Passage]:
        """The ``count`` nearest passages, best first, with their similarity as ``score`` and their embedding.

        Raises:
            InvalidInputError: The question is empty, or ``count`` is below 1.
        """
        if not question.strip():
            raise InvalidInputError("the question is empty")
        if count < 1:
            raise InvalidInputError(f"count must be at least 1, got {count}")
        if self._index is None:
            return []
        asked = np.ascontiguousarray(self.embedder.embed([question]), dtype=np.float32)
        scores, found = self._index.search(asked, min(count, len(self)))
        return [
            replace(self.passages[i], score=float(score), embedding=self._index.reconstruct(int(i)))
            for score, i in zip(scores[0], found[0], strict=True)
            if i >= 0
        ]

    def save(self, folder: str | Path) -> None:
        """Write the index to ``folder``, which appears whole or stays as it was.

        Raises:
            InvalidInputError: The index is empty, or ``folder`` holds something that is not an index.
        """
        import faiss

        if self._index is None:
            raise InvalidInputError("the index is empty: add passages before saving it")
        target = Path(folder).expanduser()
        if target.exists() and not (target / "index.json").exists() and any(target.iterdir()):
            raise InvalidInputError(f"{target} holds other files: give a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".index-") as work:
            made = Path(work) / "made"
            made.mkdir()
            faiss.write_index(self._index, str(made / "vectors.faiss"))
            with (made / "passages.jsonl").open("w", encoding="utf-8") as out:
                for p in self.passages:
                    row = {"text": p.text, "title": p.title, "id": p.id, "metadata": dict(p.metadata)}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
            facts = {
                "version": FORMAT_VERSION,
                "embedder": self.embedder.name,
                "dimension": self._index.d,
                "passages": len(self),
            }
            (made / "index.json").write_text(json.dumps(facts))
            if target.exists():
                shutil.rmtree(target)
            made.rename(target)

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder) -> PassageIndex:
        """Read an index that ``save`` wrote, for the embedder it was made with.

        Raises:
            NotFoundError: There is no index.
            InvalidInputError: It is damaged, of another version, or its vectors do not fit the embedder.
        """
        import faiss

        where = Path(folder).expanduser()
        if not (where / "index.json").exists():
            raise NotFoundError(f"no index at {where}: make one with `specrag index`")
        try:
            facts = json.loads((where / "index.json").read_text())
            if facts["version"] != FORMAT_VERSION:
                raise InvalidInputError(
                    f"{where} has index version {facts['version']}, this is {FORMAT_VERSION}: index again"
                )
            index = cls(embedder)
            with (where / "passages.jsonl").open(encoding="utf-8") as lines:
                index.passages = [Passage(**json.loads(line)) for line in lines]
            index._index = faiss.read_index(str(where / "vectors.faiss"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, SpecRAGError):
                raise
            raise InvalidInputError(f"the index at {where} is damaged: {error}") from error
        if not len(index.passages) == index._index.ntotal == facts["passages"]:
            raise InvalidInputError(
                f"the index at {where} is damaged: {index._index.ntotal} vectors for {len(index.passages)} passages"
            )
        dimension = len(embedder.embed(["dimension"])[0])
        if dimension != index._index.d:
            raise InvalidInputError(
                f"the index at {where} was made by {facts['embedder']} with {index._index.d} dimensions, "
                f"{embedder.name} has {dimension}: use the same embedder or index again"
            )
        return index


def index_documents(
    path: str | Path, embedder: Embedder, *, words: int = 100, overlap: int = 0, progress: Progress | None = None
) -> PassageIndex:
    """Read, split, embed and index everything at ``path``.

    Raises:
        NotFoundError, MissingExtraError, InvalidInputError: See ``read_passages``.
    """
    index = PassageIndex(embedder)
    index.add(read_passages(path, words, overlap), progress)
    return index
