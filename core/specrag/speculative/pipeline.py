"""Speculative RAG: perspectives, then drafting and verification, then selection (Wang et al., arXiv 2407.08223).

One asynchronous generator, ``SpeculativeRAG.astream``, is the whole pipeline. Every other entry reads it. Drafts are
verified as they arrive: all in one pass when both models run in this process, one by one when they are servers.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from specrag import _blocking
from specrag.errors import DraftingError, InvalidInputError
from specrag.models.base import LanguageModel, Sampling
from specrag.models.embedders import Embedder
from specrag.schema import (
    AnswerReady,
    EmbeddingSource,
    Event,
    Passage,
    SpeculativeAnswer,
    SubsetsChosen,
    passages_of,
)
from specrag.speculative._clock import Clock
from specrag.speculative._verified_drafts import VerifiedDrafts
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.perspectives import (
    SubsetMode,
    check_mode,
    distinct_passages,
    embed_passages,
    own_embeddings,
    sample_perspectives,
)
from specrag.speculative.prompts import Prompts
from specrag.speculative.selection import choose
from specrag.speculative.verification import Scoring, Verifier


@dataclass(frozen=True, kw_only=True)
class SpeculativeRAG:
    """Draft with something cheap, verify with something strong (Wang et al., arXiv 2407.08223).

    Args:
        drafter: Writes the drafts.
        verifier: Scores them; by default the drafter itself.
        embedder: Makes the perspectives; by default the bundled MiniLM, loaded when first needed.
        drafts: m, the number of drafts (at least 1).
        passages_per_draft: k, the passages that a draft reads (at least 1). Where there are fewer, it reads all.
        subsets: How the passages of each draft are chosen; see
            ``specrag.speculative.perspectives.sample_perspectives``.
        scoring: Which scores count and how.
        prompts: Every text that the models see. By default the prompts that the drafter was trained with, where a file
            beside its weights holds them, else ``Prompts()``. ``texts`` are those in use.
        sampling: How the drafts' tokens are drawn; greedy by default.
        max_rationale_tokens, max_answer_tokens: Limits of the two parts of a draft, in tokens.
        reuse_embeddings: Use ``Passage.embedding`` for the perspectives when every passage has one.
        deadline: Seconds after which the best draft that is verified by then is the answer. ``None``: no limit.
        seed: Of the subsets.

    Raises:
        InvalidInputError: A setting out of range or of the wrong type.

    Example:
        >>> rag = SpeculativeRAG(drafter=bundled("smollm2-rag-drafter"), seed=0)  # doctest: +SKIP
        >>> rag.answer("who got the first nobel prize in physics", passages).text  # doctest: +SKIP
    """

    drafter: LanguageModel
    verifier: LanguageModel | None = None
    embedder: Embedder | None = None
    drafts: int = 5
    passages_per_draft: int = 2
    subsets: SubsetMode = "coverage"
    scoring: Scoring = field(default_factory=Scoring)
    prompts: Prompts | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_rationale_tokens: int = Drafter.max_rationale_tokens
    max_answer_tokens: int = Drafter.max_answer_tokens
    reuse_embeddings: bool = True
    deadline: float | None = None
    seed: int = 0
    _trained_with: Prompts | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("drafts", "passages_per_draft"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        check_mode(self.subsets)
        if self.deadline is not None and not self.deadline > 0:
            raise InvalidInputError(f"deadline must be a positive number of seconds, got {self.deadline}")
        trained = Prompts.trained_with(self.drafter)
        object.__setattr__(self, "_trained_with", trained)
        if trained is not None and self.prompts is not None and not self.prompts.drafts_like(trained):
            warnings.warn(
                f"{self.drafter.name} was trained to draft with other prompts and will draft badly: leave `prompts` "
                "out, or change only the other prompts with dataclasses.replace(rag.texts, ...)",
                stacklevel=3,
            )
        self._drafter()  # checks its own settings

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return self.prompts or self._trained_with or Prompts()

    def replace(self, **changes: Any) -> SpeculativeRAG:
        """The same pipeline with other settings; the models are shared."""
        return replace(self, **changes)

    # --- front doors --------------------------------------------------------------------------------

    def answer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """The answer to ``question``. Also safe where an event loop runs (in a notebook).

        Args:
            question: What is asked.
            passages: The retrieved passages, best first. Each is a ``Passage``, a string, a mapping with ``text``, or a
                LangChain ``Document`` (see ``Passage.of``).

        Raises:
            InvalidInputError: The question is empty or too long for the drafter, or something is not a passage.
            DraftingError: Every draft failed.
            ModelError: The verifier failed for every draft.
        """
        return _blocking.run(self.aanswer(question, passages))

    async def aanswer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """``answer``, awaited."""
        async for event in self.astream(question, passages):
            if isinstance(event, AnswerReady):
                return event.answer
        raise AssertionError("the stream ended without an answer")  # pragma: no cover

    def stream(self, question: str, passages: Iterable[Any]) -> Iterator[Event]:
        """What happens, as it happens: subsets, drafts, verdicts, and at last the answer. Raises as ``answer`` does."""
        return _blocking.iterate(self.astream(question, passages))

    async def astream(self, question: str, passages: Iterable[Any]) -> AsyncIterator[Event]:
        """``stream``, awaited."""
        asked = _Question.of(question, passages, Clock(self.deadline))
        if not asked.kept:
            yield AnswerReady(_nothing(asked))
            return

        subsets, source = await self._perspectives(asked)
        yield SubsetsChosen(subsets, source)

        drafts = self._draft_and_verify(asked, subsets)
        async with aclosing(drafts.events()) as events:
            async for event in events:
                yield event

        yield AnswerReady(self._select(asked, subsets, source, drafts))

    # --- the three stages ---------------------------------------------------------------------------

    async def _perspectives(self, asked: _Question) -> tuple[tuple[tuple[int, ...], ...], EmbeddingSource]:
        """Which passages each draft reads, as positions in the caller's list, and what that was decided from."""
        members = [asked.passages[i] for i in asked.kept]
        vectors, source = await self._embeddings(asked, members)
        with asked.clock.measure("cluster"):
            made = sample_perspectives(
                vectors, len(members), self.drafts, self.passages_per_draft, subsets=self.subsets, seed=self.seed
            )
        subsets = tuple(tuple(asked.kept[i] for i in subset) for subset in made.subsets)
        if self.sampling.greedy and len(set(subsets)) < len(subsets):  # greedy drafts of one subset are equal
            subsets = tuple(dict.fromkeys(subsets))
            asked.notes.append(f"{len(subsets)} different subsets for {self.drafts} drafts: each is drafted once")
        return subsets, source

    async def _embeddings(
        self, asked: _Question, passages: Sequence[Passage]
    ) -> tuple[np.ndarray | None, EmbeddingSource]:
        if len(passages) <= self.passages_per_draft or self.subsets == "random":
            return None, "none"  # no choice depends on them
        if self.reuse_embeddings and (own := own_embeddings(passages)) is not None:
            return own, "passages"
        with asked.clock.measure("embed"):
            return await embed_passages(asked.question, passages, self.embedder), "embedder"

    def _draft_and_verify(self, asked: _Question, subsets: Sequence[tuple[int, ...]]) -> VerifiedDrafts:
        assignments = [
            Assignment(j, subset, tuple(asked.passages[i] for i in subset)) for j, subset in enumerate(subsets)
        ]
        return VerifiedDrafts(
            asked.question,
            self._drafter().drafts(asked.question, assignments),
            together=self.drafter.capabilities.batched,
            verifier=Verifier(self.verifier or self.drafter, self.texts, self.scoring),
            clock=asked.clock,
        )

    def _drafter(self) -> Drafter:
        return Drafter(self.drafter, self.texts, self.max_rationale_tokens, self.max_answer_tokens, self.sampling)

    def _select(
        self, asked: _Question, subsets: Sequence[tuple[int, ...]], source: EmbeddingSource, drafts: VerifiedDrafts
    ) -> SpeculativeAnswer:
        """The answer from the drafts that are verified.

        Raises:
            ModelError: No draft is verified, and not because of the deadline.
        """
        if drafts.timed_out:
            still_open = len(subsets) - len(drafts.verdicts) - len(drafts.failures)
            asked.notes.append(f"the deadline of {self.deadline} s passed with {still_open} drafts open")
        elif not drafts.verdicts:
            if drafts.errors:
                raise drafts.errors[0]
            raise DraftingError(f"all {len(subsets)} drafts failed; the first: {drafts.failures[0].error}")
        choice = choose(drafts.verdicts, self.scoring.scores, self.scoring.threshold)
        winner = choice.winner
        return SpeculativeAnswer(
            question=asked.question,
            text=winner.draft.text if winner else "",
            rationale=choice.ranked[0].draft.rationale if choice.ranked else "",
            passages=winner.draft.passages if winner else (),
            abstained=winner is None,
            reason=choice.reason,
            verdicts=choice.ranked,
            failures=tuple(drafts.failures),
            scores_used=choice.scores_used,
            embedding_source=source,
            timings=asked.clock.timings(),
            drafter_usage=drafts.drafter_usage,
            verifier_usage=drafts.verifier_usage,
            notes=(*asked.notes, *drafts.notes, *choice.notes),
        )


_LANGUAGE_MODEL = (LanguageModel, "a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...))")
_TYPES: dict[str, tuple[type, str]] = {
    "drafter": _LANGUAGE_MODEL,
    "verifier": _LANGUAGE_MODEL,
    "embedder": (Embedder, "a specrag Embedder"),
    "scoring": (Scoring, "a Scoring"),
    "prompts": (Prompts, "a Prompts"),
    "sampling": (Sampling, "a Sampling; `subsets` says how passages are chosen"),
}


def _check_types(rag: SpeculativeRAG) -> None:
    for name, (kind, expected) in _TYPES.items():
        value = getattr(rag, name)
        if not isinstance(value, kind) and not (value is None and name in ("verifier", "embedder", "prompts")):
            raise InvalidInputError(f"{name} must be {expected}, got {type(value).__name__}")


@dataclass(frozen=True)
class _Question:
    """What was asked: the passages as the caller gave them, and which of them are ``kept`` for the drafts."""

    question: str
    passages: Sequence[Passage]
    kept: Sequence[int]
    notes: list[str]
    clock: Clock

    @classmethod
    def of(cls, question: str, passages: Iterable[Any], clock: Clock) -> _Question:
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError("the question is empty")
        given = passages_of(passages)
        kept, notes = distinct_passages(given)
        return cls(question.strip(), given, kept, notes, clock)


def _nothing(asked: _Question) -> SpeculativeAnswer:
    """The abstention without any passage to draft from."""
    return SpeculativeAnswer(
        question=asked.question,
        text="",
        rationale="",
        passages=(),
        abstained=True,
        reason="every passage is empty" if asked.passages else "no passages were given",
        verdicts=(),
        scores_used=(),
        embedding_source="none",
        timings=asked.clock.timings(),
        notes=tuple(asked.notes),
    )
