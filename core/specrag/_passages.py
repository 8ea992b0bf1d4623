"""Passages, and what callers may give in their place. ``specrag.schema`` is where users find them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specrag.errors import InvalidInputError


@dataclass(frozen=True)
class Passage:
    """A retrieved passage.

    Args:
        text: What the drafter reads. A passage with an empty text is left out of the drafts.
        title: The models see it before the text.
        id: The caller's own key. The answer's citations carry it.
        score: The retriever's similarity, on any scale. The answer's citations carry it.
        embedding: A vector of shape [dim]. It replaces the embedder's when every passage of the question has one
            (see ``SpeculativeRAG(reuse_embeddings=...)``).
        metadata: Anything else that the citations shall carry.

    Raises:
        InvalidInputError: The text is not a string, or the embedding is not one vector of numbers.
    """

    text: str
    title: str | None = None
    id: str | None = None
    score: float | None = None
    embedding: np.ndarray | None = field(default=None, repr=False, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidInputError(f"Passage.text must be a string, got {type(self.text).__name__}")
        if self.embedding is not None:
            try:
                vector = np.asarray(self.embedding, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise InvalidInputError(f"Passage.embedding must be a vector of numbers: {error}") from error
            if vector.ndim != 1:
                raise InvalidInputError(f"Passage.embedding must have one dimension, got shape {vector.shape}")
            object.__setattr__(self, "embedding", vector)

    @classmethod
    def of(cls, value: Any) -> Passage:
        """A passage from what a caller has.

        Args:
            value: A ``Passage``, a string, a mapping, or an object with ``page_content`` and ``metadata`` (a LangChain
                ``Document``). A mapping has ``text`` or ``page_content``, and may have ``title``, ``id``, ``score``,
                ``embedding`` and ``metadata``. A title, a score (also named ``similarity``, ``similarity_score`` or
                ``relevance_score``) and an embedding that stand in the metadata alone are read from there.

        Raises:
            InvalidInputError: It is none of these, it has no text, or the mapping has a key that is not listed here.
        """
        if isinstance(value, Passage):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            given = dict(value)
        elif hasattr(value, "page_content") and hasattr(value, "metadata"):
            given = {"text": value.page_content, "id": getattr(value, "id", None), "metadata": value.metadata}
        else:
            raise InvalidInputError(
                "a passage is a Passage, a string, a mapping with 'text', or a document with page_content and "
                f"metadata; got {_a(type(value).__name__)}"
            )
        return cls(**_passage_fields(given))


#: The keys under which retrievers leave a similarity in a document's metadata; the first that is there counts.
_SCORE_KEYS = ("score", "similarity", "similarity_score", "relevance_score")
_PASSAGE_KEYS = ("text", "page_content", "title", "id", "score", "embedding", "metadata")


def _passage_fields(given: dict[str, Any]) -> dict[str, Any]:
    """``Passage``'s fields out of a mapping's items."""
    if "page_content" in given:
        given.setdefault("text", given.pop("page_content"))
        given.pop("type", None)  # of a Document that was written as a mapping
    if unknown := [str(key) for key in given if key not in _PASSAGE_KEYS]:
        raise InvalidInputError(
            f"unknown key {', '.join(unknown)}: a passage has {', '.join(_PASSAGE_KEYS)}; "
            "what else the citations shall carry goes into 'metadata'"
        )
    if "text" not in given:
        raise InvalidInputError(f"no 'text' in a mapping with {', '.join(map(str, given)) or 'no keys'}")
    metadata = given.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadata must be a mapping, got {_a(type(metadata).__name__)}")
    title, key, score = given.get("title") or metadata.get("title"), given.get("id"), given.get("score")
    if score is None:
        found = next((metadata[name] for name in _SCORE_KEYS if name in metadata), None)
        score = found if isinstance(found, int | float | np.number) else None
    elif not isinstance(score, int | float | np.number):
        raise InvalidInputError(f"score must be a number, got {_a(type(score).__name__)}")
    embedding, found = given.get("embedding"), metadata.get("embedding")
    if embedding is None and isinstance(found, list | tuple | np.ndarray):
        embedding = found
    return {
        "text": given["text"],
        "title": str(title) if title else None,
        "id": None if key is None else str(key),
        "score": None if score is None else float(score),
        "embedding": embedding,
        "metadata": metadata,
    }


def passages_of(values: Iterable[Any], name: str = "passages") -> list[Passage]:
    """Passages from a caller's list; see ``Passage.of`` for what may stand in it.

    Raises:
        InvalidInputError: ``values`` is not a list of passages. The message names the position and the type.
    """
    if isinstance(values, str | bytes | Mapping | Passage) or not isinstance(values, Iterable):
        raise InvalidInputError(f"{name} must be a list of passages, got {_a(type(values).__name__)}")
    passages = []
    for position, value in enumerate(values):
        try:
            passages.append(Passage.of(value))
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}[{position}]: {error}") from error
    return passages


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
