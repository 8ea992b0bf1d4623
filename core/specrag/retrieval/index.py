"""Passages with a FAISS index of their embeddings, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from specrag._fields import missing
from specrag._files import path_of, whole
from specrag.errors import InvalidInputError
from specrag.models.embedders import Embedder
from specrag.retrieval import _folder
from specrag.retrieval.documents import read_documents
from specrag.retrieval.splitting import split_passages
from specrag.schema import Passage, passages_of
from specrag.text import passage_text, question_of

# Passages embedded between two reports of progress.
BATCH = 256
# Embedded with every index. An embedder that gives it another vector is not the one that made the index.
_PROBE = "dimension"
# The same model in other precisions (float32, bfloat16, int8) stays above this cosine; other models are near 0.
_SAME = 0.95

Progress = Callable[[int, int], None]


def read_passages(
    path: str | Path,
    words: int = 100,
    overlap: int = 0,
    *,
    strict: bool = False,
    hidden: bool = False,
    notes: list[str] | None = None,
) -> list[Passage]:
    """Everything readable at ``path``, split into passages.

    Args:
        path, strict, hidden, notes: See ``read_documents``.
        words, overlap: See ``split_passages``.

    Raises:
        NotFoundError: There is nothing at ``path``.
        MissingExtraError: A PDF or HTML file is there, and the extra ``documents`` is not installed.
        InvalidInputError: Nothing readable is there, or it holds no text.
    """
    documents = read_documents(path, strict=strict, hidden=hidden, notes=notes)
    passages = [p for document in documents for p in split_passages(document, words, overlap)]
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
        self._probe: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.passages)

    def add(self, passages: Iterable[Any], progress: Progress | None = None) -> None:
        """Embed and index ``passages``; those without text are left out.

        Args:
            passages: Anything that ``Passage.of`` takes. Metadata is kept as JSON keeps it: tuples become lists, and
                keys become strings. What tables write where there is nothing (NaN, pandas' NA) becomes ``None``.
            progress: Called with the number done and the number known so far, after each batch.

        Raises:
            InvalidInputError: Something is not a passage, or JSON cannot hold its metadata; nothing is embedded. Or
                the embedder's vectors cannot be used.
        """
        import faiss

        kept = [_storable(p, at) for at, p in enumerate(passages_of(passages)) if p.text.strip()]
        for at in range(0, len(kept), BATCH):
            batch = kept[at : at + BATCH]
            vectors = self._embedded([passage_text(p) for p in batch])
            if self._index is None:
                self._probe = self._embedded([_PROBE])[0]
                self._index = faiss.IndexFlatIP(vectors.shape[1])
            self._index.add(vectors)
            self.passages += batch
            if progress is not None:
                progress(at + len(batch), len(kept))

    def _embedded(self, texts: list[str]) -> np.ndarray:
        """The embeddings of ``texts``, of length 1: [len(texts), dimension]."""
        import faiss

        vectors = np.array(self.embedder.embed(texts), dtype=np.float32, order="C")
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise InvalidInputError(f"{self.embedder.name} returned {vectors.shape} for {len(texts)} texts, or NaN")
        if self._index is not None and vectors.shape[1] != self._index.d:
            raise InvalidInputError(
                f"{self.embedder.name} returned {vectors.shape[1]} dimensions, the index has {self._index.d}"
            )
        faiss.normalize_L2(vectors)
        return vectors

    def search(self, question: str, count: int = 10) -> list[Passage]:
        """The ``count`` nearest passages, best first, with their similarity as ``score`` and their embedding.

        Raises:
            InvalidInputError: The question is empty, or ``count`` is below 1.
        """
        question = question_of(question)
        if count < 1:
            raise InvalidInputError(f"count must be at least 1, got {count}")
        if self._index is None:
            return []
        scores, found = self._index.search(self._embedded([question]), min(count, len(self)))
        return [
            replace(self.passages[i], score=float(score), embedding=self._index.reconstruct(int(i)))
            for score, i in zip(scores[0], found[0], strict=True)
            if i >= 0
        ]

    @staticmethod
    def is_saved_at(folder: str | Path) -> bool:
        """Whether ``folder`` holds an index that ``save`` wrote."""
        return _folder.is_index(path_of(folder))

    @staticmethod
    def check_target(folder: str | Path) -> None:
        """Check that ``save`` may write to ``folder``, before anything is embedded.

        Raises:
            InvalidInputError: It is a file, or holds something that is not an index.
        """
        _folder.check_target(whole(folder))

    def save(self, folder: str | Path) -> None:
        """Write the index to ``folder``. An index that is there stays until the new one is whole.

        Raises:
            InvalidInputError: The index is empty, or ``folder`` is a file or holds something that is not an index.
            SpecRAGError: The disk is full, or writing is not allowed.
        """
        import faiss

        where = path_of(folder)
        if self._index is None or self._probe is None:
            raise InvalidInputError("the index is empty: add passages before saving it")
        probe = tuple(float(x) for x in self._probe)
        facts = _folder.Facts(self.embedder.name, self._index.d, len(self), probe, files={})
        _folder.write(where, facts, self._write_passages, lambda file: faiss.write_index(self._index, str(file)))

    def _write_passages(self, file: Path) -> None:
        with file.open("w", encoding="utf-8") as out:
            for p in self.passages:
                row = {"text": p.text, "title": p.title, "id": p.id, "metadata": dict(p.metadata)}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder) -> PassageIndex:
        """Read an index that ``save`` wrote, for the embedder it was made with.

        Raises:
            NotFoundError: There is no index.
            InvalidInputError: It is damaged, of another version, or was made by another embedder.
        """
        import faiss

        where = path_of(folder)
        index = cls(embedder)

        def read(facts: _folder.Facts) -> None:
            with (where / facts.file("passages")).open(encoding="utf-8") as lines:
                index.passages = [Passage(**json.loads(line)) for line in lines]
            index._index = faiss.read_index(str(where / facts.file("vectors")))

        facts, _ = _folder.read(where, read)
        if not len(index.passages) == index._index.ntotal == facts.passages:
            raise InvalidInputError(
                f"the index at {where} is damaged: {index._index.ntotal} vectors for {len(index.passages)} passages"
            )
        index._check_embedder(facts, where)
        return index

    def _check_embedder(self, facts: _folder.Facts, where: Path) -> None:
        probe = np.asarray(self.embedder.embed([_PROBE])[0], dtype=np.float32)
        if len(probe) != self._index.d:
            raise InvalidInputError(
                f"the index at {where} was made by {facts.embedder} with {self._index.d} dimensions, "
                f"{self.embedder.name} has {len(probe)}: use the same embedder or index again"
            )
        self._probe = np.asarray(facts.probe, dtype=np.float32)
        if not self._probe @ probe >= _SAME * np.linalg.norm(probe):
            raise InvalidInputError(
                f"the index at {where} was made by {facts.embedder}, and {self.embedder.name} gives other vectors: "
                "use the same embedder or index again"
            )


def _storable(passage: Passage, position: int) -> Passage:
    """``passage`` without its embedding, and with metadata that stay as they are when they are written and read."""
    try:
        metadata = json.loads(json.dumps(_kept(dict(passage.metadata)), allow_nan=False)) if passage.metadata else {}
    except (TypeError, ValueError, RecursionError) as error:
        name = f"passages[{position}]" + (f" ({passage.id})" if passage.id else "")
        raise InvalidInputError(
            f"{name}: JSON cannot hold its metadata ({error}); give texts, numbers, lists and mappings"
        ) from error
    if passage.embedding is None and metadata == passage.metadata:
        return passage
    return replace(passage, embedding=None, metadata=metadata)


def _kept(value: Any) -> Any:
    """``value`` with ``None`` for what is missing, and with Python's own numbers for numpy's."""
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(item) for item in value]
    if missing(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def index_documents(
    path: str | Path,
    embedder: Embedder,
    *,
    words: int = 100,
    overlap: int = 0,
    strict: bool = False,
    hidden: bool = False,
    notes: list[str] | None = None,
    progress: Progress | None = None,
) -> PassageIndex:
    """Read, split, embed and index everything at ``path``.

    Args:
        path, strict, hidden, notes: See ``read_documents``.
        words, overlap: See ``split_passages``.
        progress: See ``PassageIndex.add``.

    Raises:
        NotFoundError, MissingExtraError, InvalidInputError: See ``read_passages``.
    """
    index = PassageIndex(embedder)
    index.add(read_passages(path, words, overlap, strict=strict, hidden=hidden, notes=notes), progress)
    return index
