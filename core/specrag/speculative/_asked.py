"""One question on its way through the pipeline, and which passages each of its drafts reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specrag.models.embedders import Embedder
from specrag.schema import EmbeddingSource, Passage, SpeculativeAnswer, SubsetsChosen, passages_of
from specrag.speculative._clock import Clock
from specrag.speculative.perspectives import (
    WITHOUT_GROUPS,
    SubsetMode,
    distinct_passages,
    embed_passages,
    own_embeddings,
    sample_perspectives,
)
from specrag.text import question_of


@dataclass(frozen=True)
class Asked:
    """What was asked.

    Attributes:
        passages: As the caller gave them.
        kept: Positions of those that the drafts read: neither empty nor repeated.
        notes: What was not done as asked so far.
        clock: Runs since the question was asked.
    """

    question: str
    passages: Sequence[Passage]
    kept: Sequence[int]
    notes: list[str]
    clock: Clock

    @classmethod
    def of(cls, question: str, passages: Iterable[Any], clock: Clock) -> Asked:
        """``question`` without white space around it, and which of its passages are read.

        Raises:
            InvalidInputError: The question is empty, or something is not a passage.
        """
        asked = question_of(question).strip()
        given = passages_of(passages)
        kept, notes = distinct_passages(given)
        return cls(asked, given, kept, notes, clock)

    def without_passages(self) -> SpeculativeAnswer:
        """The abstention without any passage to draft from."""
        return SpeculativeAnswer(
            question=self.question,
            text="",
            rationale="",
            passages=(),
            abstained=True,
            reason="every passage is empty" if self.passages else "no passages were given",
            verdicts=(),
            scores_used=(),
            embedding_source="none",
            timings=self.clock.timings(),
            notes=tuple(self.notes),
        )


@dataclass(frozen=True)
class Perspectives:
    """Chooses the passages of each draft. The arguments are those of ``SpeculativeRAG``.

    Args:
        once: Draft equal subsets once, because greedy drafts of one subset are equal.
    """

    embedder: Embedder | None
    drafts: int
    passages_per_draft: int
    subsets: SubsetMode
    reuse_embeddings: bool
    seed: int
    once: bool

    async def choose(self, asked: Asked) -> SubsetsChosen:
        """The subsets, as positions in the caller's list, and what they were decided from."""
        members = [asked.passages[i] for i in asked.kept]
        vectors, source = await self._embeddings(asked, members)
        with asked.clock.measure("cluster"):
            made = sample_perspectives(
                vectors, len(members), self.drafts, self.passages_per_draft, subsets=self.subsets, seed=self.seed
            )
        subsets = tuple(tuple(asked.kept[i] for i in subset) for subset in made.subsets)
        if self.once and len(set(subsets)) < len(subsets):
            subsets = tuple(dict.fromkeys(subsets))
            asked.notes.append(f"{len(subsets)} different subsets for {self.drafts} drafts: each is drafted once")
        return SubsetsChosen(subsets, source)

    async def _embeddings(self, asked: Asked, passages: Sequence[Passage]) -> tuple[np.ndarray | None, EmbeddingSource]:
        if len(passages) <= self.passages_per_draft or self.subsets in WITHOUT_GROUPS:
            return None, "none"  # no choice depends on them
        if self.reuse_embeddings and (own := own_embeddings(passages)) is not None:
            return own, "passages"
        with asked.clock.measure("embed"):
            return await embed_passages(asked.question, passages, self.embedder), "embedder"
