"""The chunks of a long context, and which of them a question needs (RAPID's retrieval)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specrag._unicode import well_formed
from specrag.models.embedders import Embedder

CHUNK_TOKENS = 512
#: Chunks that are less similar to the question than this cosine are not retrieved (the authors' code).
COSINE_THRESHOLD = 0.3
#: From this cosine on, retrieval counts as fully confident.
CONFIDENT_COSINE = 0.7
# An embedder reads less than a chunk at once. A chunk is as similar as its most similar piece.
_PIECE_TOKENS = 176
_PIECES = -(-CHUNK_TOKENS // _PIECE_TOKENS)


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved from a context.

    Attributes:
        positions: Positions in the context, in its order.
        confidence: In [0, 1]: the best chunk's cosine, from the threshold (0) to ``CONFIDENT_COSINE`` (1).
        similar: Whether any chunk was similar enough. If not, the positions are the beginning and the end.
    """

    positions: list[int]
    confidence: float
    similar: bool = True


class Chunks:
    """A context in chunks of 512 tokens, with an embedding for each third of a chunk.

    Args:
        tokens: The context.
        tokenizer: A transformers tokenizer, which decodes them.
        vectors: Embeddings from an earlier ``Chunks`` of the same context; made when first needed otherwise.
        embedder: The name of the embedder that made them. Another embedder makes them anew.
    """

    def __init__(
        self, tokens: Sequence[int], tokenizer: Any, vectors: np.ndarray | None = None, embedder: str | None = None
    ) -> None:
        self.tokens, self._tokenizer = tokens, tokenizer
        self.vectors = vectors  # [pieces, dimension]
        self.embedder = embedder

    def retrieve(self, question: str, budget: int, embedder: Embedder) -> Retrieved:
        """At most ``budget`` tokens of the chunks that are similar to ``question``. See ``select``."""
        if self.vectors is None or self.embedder != embedder.name:
            self.vectors, self.embedder = self._embedded(embedder), embedder.name
        asked = embedder.embed([well_formed(question)])[0]
        similarities = (self.vectors @ asked).reshape(-1, _PIECES).max(axis=1)
        return select(similarities, len(self.tokens), budget)

    def _embedded(self, embedder: Embedder) -> np.ndarray:
        texts = []
        for at in range(0, len(self.tokens), CHUNK_TOKENS):
            chunk = self.tokens[at : at + CHUNK_TOKENS]
            pieces = [chunk[i : i + _PIECE_TOKENS] for i in range(0, CHUNK_TOKENS, _PIECE_TOKENS)]
            texts += [str(self._tokenizer.decode(list(piece))) if piece else "" for piece in pieces]
        vectors = embedder.embed(texts)
        for i, text in enumerate(texts):
            if not text.strip():
                vectors[i] = 0
        return vectors


def select(
    similarities: np.ndarray,  # [chunks], cosines with the question
    length: int,
    budget: int,
) -> Retrieved:
    """The chunks above the threshold, best first, until ``budget`` tokens are taken; the last one is cut.

    When none is above the threshold: the beginning and the end of the context, half the budget each.

    Args:
        similarities: One per chunk.
        length: Tokens of the context.
        budget: Tokens to take.
    """
    order = [int(i) for i in np.argsort(-similarities) if similarities[i] > COSINE_THRESHOLD]
    if not order:
        if length <= budget:
            return Retrieved(list(range(length)), 0.0, similar=False)
        half = budget // 2
        return Retrieved([*range(budget - half), *range(length - half, length)], 0.0, similar=False)
    taken: list[int] = []
    for i in order:
        chunk = range(i * CHUNK_TOKENS, min((i + 1) * CHUNK_TOKENS, length))
        taken += chunk[: budget - len(taken)]
    best = similarities[order[0]]
    confidence = np.clip((best - COSINE_THRESHOLD) / (CONFIDENT_COSINE - COSINE_THRESHOLD), 0, 1)
    return Retrieved(sorted(taken), float(confidence))
