"""Speculative RAG: perspectives, then drafting and verification, then selection (Wang et al., arXiv 2407.08223).

One asynchronous generator, ``SpeculativeRAG.astream``, is the whole pipeline. Every other entry reads it. Drafts are
verified as they arrive: all in one pass when both models run in this process, one by one when they are servers.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from specrag import _blocking
from specrag.errors import DraftingError, InvalidInputError
from specrag.models.base import LanguageModel, Reader, Sampling
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
from specrag.speculative._pooled_drafts import PooledDrafts
from specrag.speculative._verified_drafts import VerifiedDrafts
from specrag.speculative.confidence import Calibration, calibration_for, features
from specrag.speculative.drafting import Drafter
from specrag.speculative.escalation import Escalation, answer_from, passages_to_read
from specrag.speculative.listwise import ListwiseVerifier
from specrag.speculative.perspectives import (
    SubsetMode,
    check_mode,
    distinct_passages,
    embed_passages,
    own_embeddings,
    sample_perspectives,
)
from specrag.speculative.prompts import Prompts
from specrag.speculative.routing import Routing
from specrag.speculative.selection import Choice, choose
from specrag.speculative.span_verification import NoVerifier, SpanVerifier
from specrag.speculative.verification import DraftVerifier, Scoring, Verifier

Model = LanguageModel | Reader


@dataclass(frozen=True, kw_only=True)
class SpeculativeRAG:
    """Draft with something cheap, verify with something strong (Wang et al., arXiv 2407.08223).

    Args:
        drafter: Makes the drafts: a language model writes them, a reader (``SpanReader``) copies them. Several drafters
            are pooled: equal answers become one draft, and ``routing`` decides when the language models are asked.
        verifier: Scores them: a language model, or a reader, which scores spans. By default the first drafter that is a
            language model; where all are readers, nobody, and a draft has its own score alone.
        embedder: Makes the perspectives; by default the bundled MiniLM, loaded when first needed.
        drafts: m, the number of drafts of each drafter (at least 1; a reader may find fewer).
        passages_per_draft: k, the passages that a written draft reads (at least 1). Where there are fewer, it reads all.
        subsets: How the passages of each written draft are chosen; see
            ``specrag.speculative.perspectives.sample_perspectives``.
        routing: When the language models are asked where a reader drafts too; ``None``: always.
        scoring: Which scores count and how.
        prompts: Every text that the models see. By default the prompts that the drafter was trained with, where a file
            beside its weights holds them, else ``Prompts()``. ``texts`` are those in use.
        sampling: How the drafts' tokens are drawn; greedy by default.
        max_rationale_tokens, max_answer_tokens: Limits of the two parts of a draft, in tokens.
        calibration: Turns scores into ``answer.confidence``: a ``Calibration``, ``"auto"`` (the one that ships for these
            models, where there is one), or ``None``.
        min_confidence: Abstain below this probability of being right. Needs a calibration.
        escalate: Below ``escalate_below``, the verifier answers itself: from the passages of the best drafts
            (``"passages"``, at most four) or from all (``"standard"``, standard RAG). The answer says so.
        escalate_below: A probability of being right. Needs a calibration.
        reuse_embeddings: Use ``Passage.embedding`` for the perspectives when every passage has one.
        deadline: Seconds after which the best draft that is verified by then is the answer. ``None``: no limit.
        seed: Of the subsets.

    Raises:
        InvalidInputError: A setting out of range or of the wrong type, or one that needs a calibration without one.

    Example:
        >>> rag = SpeculativeRAG(drafter=bundled("minilm-reader"))  # doctest: +SKIP
        >>> rag.answer("who got the first nobel prize in physics", passages).text  # doctest: +SKIP
    """

    drafter: Model | Sequence[Model]
    verifier: Model | None = None
    embedder: Embedder | None = None
    drafts: int = 5
    passages_per_draft: int = 2
    subsets: SubsetMode = "coverage"
    routing: Routing | None = field(default_factory=Routing)
    scoring: Scoring = field(default_factory=Scoring)
    prompts: Prompts | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_rationale_tokens: int = Drafter.max_rationale_tokens
    max_answer_tokens: int = Drafter.max_answer_tokens
    calibration: Calibration | Literal["auto"] | None = "auto"
    min_confidence: float | None = None
    escalate: Escalation | None = None
    escalate_below: float = 0.5
    reuse_embeddings: bool = True
    deadline: float | None = None
    seed: int = 0
    _trained_with: Prompts | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        if not isinstance(self.drafter, LanguageModel | Reader):
            object.__setattr__(self, "drafter", tuple(self.drafter))
        for name in ("drafts", "passages_per_draft"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        check_mode(self.subsets)
        if self.deadline is not None and not self.deadline > 0:
            raise InvalidInputError(f"deadline must be a positive number of seconds, got {self.deadline}")
        self._check_confidence()
        for writer in self.writers:
            trained = Prompts.trained_with(writer)
            if trained is not None and self._trained_with is None:
                object.__setattr__(self, "_trained_with", trained)
            if trained is not None and not self.texts.drafts_like(trained):
                warnings.warn(
                    f"{writer.name} was trained to draft with other prompts and will draft badly: leave `prompts` "
                    "out, or change only the other prompts with dataclasses.replace(rag.texts, ...)",
                    stacklevel=3,
                )
            self._drafter(writer)  # checks its own settings

    def _check_confidence(self) -> None:
        for name in ("min_confidence", "escalate_below"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InvalidInputError(f"{name} must be a probability in [0, 1], got {value}")
        if self.escalate is not None and self.escalate not in ("passages", "standard"):
            raise InvalidInputError(f"escalate must be 'passages', 'standard' or None, got {self.escalate!r}")
        if self.escalate is not None and not isinstance(self._judge, LanguageModel):
            raise InvalidInputError("escalate needs a verifier that is a language model: it answers itself")
        wanted = "min_confidence" if self.min_confidence is not None else "escalate" if self.escalate else None
        if wanted and self.calibrated is None:
            raise InvalidInputError(
                f"{wanted} needs a calibration, and none ships for {', '.join(self._names[0])} verified by "
                f"{self._names[1] or 'nobody'}: make one with `specrag calibrate` and give calibration="
            )
        if isinstance(self.calibration, Calibration) and not self.calibration.fits(*self._names, self.settled.mode):
            made_for = self.calibration
            raise InvalidInputError(
                f"the calibration was made for {', '.join(made_for.drafters)} verified by {made_for.verifier or 'nobody'} "
                f"({made_for.mode}), not for {', '.join(self._names[0])} verified by {self._names[1] or 'nobody'} "
                f"({self.settled.mode}): make one with `specrag calibrate`"
            )

    # --- what the settings come to ------------------------------------------------------------------

    @property
    def drafters(self) -> tuple[Model, ...]:
        """All drafters."""
        return self.drafter if isinstance(self.drafter, tuple) else (self.drafter,)  # type: ignore[return-value]

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The drafters that copy."""
        return tuple(model for model in self.drafters if isinstance(model, Reader))

    @property
    def writers(self) -> tuple[LanguageModel, ...]:
        """The drafters that write."""
        return tuple(model for model in self.drafters if isinstance(model, LanguageModel))

    @property
    def _judge(self) -> Model | None:
        """Who verifies; ``None``: nobody."""
        return self.verifier or next(iter(self.writers), None)

    @property
    def settled(self) -> Scoring:
        """``scoring`` with its mode and its scores settled for these models."""
        mode, scores = self.scoring.mode, self.scoring.scores
        if mode == "auto":
            copied = bool(self.readers) and self.verifier is not None
            mode = "listwise" if copied and isinstance(self.verifier, LanguageModel) else "pointwise"
        if scores is None and not isinstance(self._judge, LanguageModel):
            scores = ("draft",) if self._judge is None else ("draft", "span")
        elif scores is None and len(self.drafters) > 1:
            scores = (*replace(self.scoring, mode=mode).counted, "agreement")
        return replace(self.scoring, mode=mode, scores=scores)

    @property
    def _names(self) -> tuple[tuple[str, ...], str]:
        return tuple(model.name for model in self.drafters), "" if self._judge is None else self._judge.name

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration in use."""
        if self.calibration == "auto":
            return calibration_for(*self._names, self.settled.mode)
        return self.calibration

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
        drafts = self._draft_and_verify(asked)
        async with aclosing(drafts.events()) as events:
            async for event in events:
                yield event
        answer = self._select(asked, drafts)
        yield AnswerReady(await self._escalated(asked, answer) if self._in_doubt(answer) else answer)

    # --- the three stages ---------------------------------------------------------------------------

    async def _perspectives(self, asked: _Question) -> SubsetsChosen:
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
        return SubsetsChosen(subsets, source)

    async def _embeddings(
        self, asked: _Question, passages: Sequence[Passage]
    ) -> tuple[np.ndarray | None, EmbeddingSource]:
        if len(passages) <= self.passages_per_draft or self.subsets == "random":
            return None, "none"  # no choice depends on them
        if self.reuse_embeddings and (own := own_embeddings(passages)) is not None:
            return own, "passages"
        with asked.clock.measure("embed"):
            return await embed_passages(asked.question, passages, self.embedder), "embedder"

    def _draft_and_verify(self, asked: _Question) -> VerifiedDrafts:
        pool = PooledDrafts(
            asked.question,
            {at: asked.passages[at] for at in asked.kept},
            self.readers,
            [self._drafter(writer) for writer in self.writers],
            self.drafts,
            self.routing,
            lambda: self._perspectives(asked),
        )
        return VerifiedDrafts(
            asked.question,
            pool.arrivals(),
            together=all(writer.capabilities.batched for writer in self.writers),
            verifier=self._verifier(asked),
            clock=asked.clock,
        )

    def _drafter(self, writer: LanguageModel) -> Drafter:
        return Drafter(writer, self.texts, self.max_rationale_tokens, self.max_answer_tokens, self.sampling)

    def _verifier(self, asked: _Question) -> DraftVerifier:
        judge, scoring = self._judge, self.settled
        if judge is None:
            return NoVerifier(scoring)
        if isinstance(judge, Reader):
            return SpanVerifier(judge, tuple(asked.passages[at] for at in asked.kept), scoring)
        return (ListwiseVerifier if scoring.mode == "listwise" else Verifier)(judge, self.texts, scoring)

    def _select(self, asked: _Question, drafts: VerifiedDrafts) -> SpeculativeAnswer:
        """The answer from the drafts that are verified.

        Raises:
            ModelError: No draft is verified, and not because of the deadline.
        """
        if drafts.timed_out:
            asked.notes.append(f"the deadline of {self.deadline} s passed with {drafts.still_open} drafts open")
        elif not drafts.verdicts and (drafts.errors or drafts.failures):
            if drafts.errors:
                raise drafts.errors[0]
            raise DraftingError(f"all {len(drafts.failures)} drafts failed; the first: {drafts.failures[0].error}")
        scoring = self.settled
        choice = choose(
            drafts.verdicts,
            scoring.counted,
            scoring.threshold,
            weights=scoring.weights,
            merge=scoring.mode == "listwise" or len(self.drafters) > 1,
        )
        confidence, reason = self._judged(choice, found_nothing=not drafts.timed_out and not drafts.verdicts)
        winner = choice.ranked[0] if choice.ranked and reason is None else None
        return SpeculativeAnswer(
            question=asked.question,
            text=winner.draft.text if winner else "",
            rationale=choice.ranked[0].draft.rationale if choice.ranked else "",
            passages=winner.draft.passages if winner else (),
            abstained=winner is None,
            reason=reason,
            verdicts=choice.ranked,
            failures=tuple(drafts.failures),
            scores_used=choice.scores_used,
            embedding_source=drafts.embedding_source,
            timings=asked.clock.timings(),
            confidence=confidence,
            drafter_usage=drafts.drafter_usage,
            verifier_usage=drafts.verifier_usage,
            notes=(*asked.notes, *drafts.notes, *choice.notes),
        )

    def _judged(self, choice: Choice, *, found_nothing: bool) -> tuple[float | None, str | None]:
        """The confidence in ``choice``, and why it abstains, if it does."""
        if found_nothing:
            return None, "no passage holds a span that could answer"
        if choice.winner is None or self.calibrated is None:
            return None, choice.reason
        confidence = self.calibrated.probability(features(choice.ranked))
        if confidence is not None and self.min_confidence is not None and confidence < self.min_confidence:
            return confidence, f"the confidence is too low: {confidence:.2f} < {self.min_confidence:.2f}"
        return confidence, None

    def _in_doubt(self, answer: SpeculativeAnswer) -> bool:
        if self.escalate is None or (self.deadline is not None and answer.timings.total >= self.deadline):
            return False
        return not answer.verdicts or answer.confidence is None or answer.confidence < self.escalate_below

    async def _escalated(self, asked: _Question, answer: SpeculativeAnswer) -> SpeculativeAnswer:
        """``answer`` with the verifier's own in its place; as it was, with a note, where the verifier fails."""
        assert self.escalate is not None
        assert isinstance(self._judge, LanguageModel)
        subset = passages_to_read(self.escalate, answer.verdicts, asked.kept, asked.passages)
        try:
            with asked.clock.measure("escalate"):
                own = await answer_from(
                    self._judge,
                    self.texts,
                    asked.question,
                    subset,
                    [asked.passages[at] for at in subset],
                    max_tokens=self.max_answer_tokens,
                    index=-1,
                )
        except Exception as error:  # the drafts are still there
            note = f"the verifier could not answer itself: {type(error).__name__}: {error}"
            return replace(answer, notes=(*answer.notes, note), timings=asked.clock.timings())
        return replace(
            answer,
            text="" if own.abstained else own.text,
            rationale="",
            passages=() if own.abstained else own.passages,
            abstained=own.abstained,
            reason="the verifier says that the passages do not answer" if own.abstained else None,
            escalated=self.escalate,
            read=tuple(subset),
            timings=asked.clock.timings(),
            verifier_usage=answer.verifier_usage + own.usage,
        )


_MODELS = "a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...)) or a SpanReader"
_TYPES: dict[str, tuple[Any, str]] = {
    "verifier": (Model, _MODELS),
    "embedder": (Embedder, "a specrag Embedder"),
    "routing": (Routing, "a Routing"),
    "scoring": (Scoring, "a Scoring"),
    "prompts": (Prompts, "a Prompts"),
    "sampling": (Sampling, "a Sampling; `subsets` says how passages are chosen"),
}
_OPTIONAL = ("verifier", "embedder", "routing", "prompts")


def _check_types(rag: SpeculativeRAG) -> None:
    for name, (kind, expected) in _TYPES.items():
        value = getattr(rag, name)
        if not isinstance(value, kind) and not (value is None and name in _OPTIONAL):
            raise InvalidInputError(f"{name} must be {expected}, got {type(value).__name__}")
    if not isinstance(rag.calibration, Calibration) and rag.calibration not in ("auto", None):
        raise InvalidInputError(f"calibration must be a Calibration, 'auto' or None, got {rag.calibration!r}")
    given = rag.drafter
    if isinstance(given, Model):
        return
    if not isinstance(given, list | tuple) or not given:
        raise InvalidInputError(f"drafter must be {_MODELS}, or a list of them; got {type(given).__name__}")
    for i, model in enumerate(given):
        if not isinstance(model, Model):
            raise InvalidInputError(f"drafter[{i}] must be {_MODELS}, got {type(model).__name__}")


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
