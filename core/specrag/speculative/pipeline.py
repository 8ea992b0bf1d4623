"""Speculative RAG: perspectives, then drafting and verification, then selection (Wang et al., arXiv 2407.08223).

One asynchronous generator, ``SpeculativeRAG.astream``, is the whole pipeline. Every other entry reads it. Drafts are
verified as they arrive: all in one pass when both models run in this process, one by one when they are servers.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specrag._fields import check_whole_numbers
from specrag.models.base import LanguageModel, Sampling
from specrag.models.embedders import Embedder
from specrag.schema import AnswerReady, Event, SpeculativeAnswer, StageBegan
from specrag.speculative._answers import Selection
from specrag.speculative._asked import Asked, Perspectives
from specrag.speculative._clock import Clock, check_deadline
from specrag.speculative._pooled_drafts import PooledDrafts
from specrag.speculative._roles import Model, Roles, as_drafters, check_types
from specrag.speculative._verified_drafts import VerifiedDrafts
from specrag.speculative.confidence import Calibration
from specrag.speculative.drafting import Drafter
from specrag.speculative.entries import Streaming
from specrag.speculative.escalation import Escalation, escalated, in_doubt
from specrag.speculative.perspectives import SubsetMode, check_mode
from specrag.speculative.prompts import Prompts
from specrag.speculative.routing import Routing
from specrag.speculative.verification import Scoring
from specrag.speculative.work import Work, working_on


@dataclass(frozen=True, kw_only=True)
class SpeculativeRAG(Streaming):
    """Draft with something cheap, verify with something strong (Wang et al., arXiv 2407.08223).

    Args:
        drafter: Makes the drafts: a language model writes them, a reader (``SpanReader``) copies them. Several drafters
            are pooled: equal answers become one draft, and ``routing`` decides when the language models are asked.
        verifier: Scores them: a language model, or a reader, which scores spans. By default the first drafter that is a
            language model; where all are readers, nobody, and a draft has the score of its drafter alone. Nobody either
            where all were trained to judge their own drafts.
        embedder: Makes the perspectives; by default the bundled MiniLM, loaded when first needed.
        drafts: m, the number of drafts of each drafter (at least 1; a reader may find fewer).
        passages_per_draft: k, the passages that a written draft reads (at least 1). Where there are fewer, it reads
            all.
        subsets: How the passages of each written draft are chosen; see
            ``specrag.speculative.perspectives.sample_perspectives``.
        routing: When the language models are asked where a reader drafts too; ``None``: always.
        scoring: Which scores count and how.
        prompts: Every text that the models see. By default the prompts that the drafter was trained with, where a file
            beside its weights holds them, else ``Prompts()``. ``texts`` are those in use.
        sampling: How the drafts' tokens are drawn; greedy by default.
        max_rationale_tokens, max_answer_tokens: Limits of the two parts of a draft, in tokens.
        calibration: Turns scores into ``answer.confidence``: a ``Calibration``, ``"auto"`` (the one that ships for
            these models, where there is one), or ``None``.
        min_confidence: Abstain below this probability of being right. Needs a calibration.
        escalate: In doubt, the verifier answers itself: from the passages of the best drafts (``"passages"``, at most
            four) or from all (``"standard"``, standard RAG). Doubt is a confidence below ``escalate_below``. Where
            readers draft alone, a question that no span answers (``routing``) is in doubt too, and the verifier then
            scores no drafts, unless ``scoring`` names a mode or scores.
        escalate_below: A probability of being right. Needs a calibration.
        reuse_embeddings: Use ``Passage.embedding`` for the perspectives when every passage has one.
        deadline: Seconds after which the best draft that is verified by then is the answer. Where none is, because the
            verifier is late or away, it is the draft with the best score of its drafter, and a note says so.
            ``None``: no limit.
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
    _roles: Roles = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        drafters = as_drafters(self.drafter)
        if not isinstance(self.drafter, Model):
            object.__setattr__(self, "drafter", drafters)
        check_types(
            embedder=(self.embedder, Embedder | None, "a specrag Embedder"),
            routing=(self.routing, Routing | None, "a Routing"),
            scoring=(self.scoring, Scoring, "a Scoring"),
            prompts=(self.prompts, Prompts | None, "a Prompts"),
            sampling=(self.sampling, Sampling, "a Sampling; `subsets` says how passages are chosen"),
        )
        limits = ("drafts", "passages_per_draft", "max_rationale_tokens", "max_answer_tokens")
        check_whole_numbers(least=1, **{name: getattr(self, name) for name in limits})
        check_whole_numbers(seed=self.seed)
        check_mode(self.subsets)
        check_deadline(self.deadline)
        roles = Roles(drafters, self.verifier, self.scoring, self.calibration, self.escalate, self.prompts)
        roles.check_confidence(self.min_confidence, self.escalate_below)
        object.__setattr__(self, "_roles", roles)
        for writer, own in zip(roles.writers, roles.trained, strict=True):
            if own is not None and not self.texts.drafts_like(own):
                warnings.warn(
                    f"{writer.name} was trained to draft with other prompts and will draft badly: leave `prompts` "
                    "out, or change only the other prompts with dataclasses.replace(rag.texts, ...)",
                    stacklevel=3,
                )
            self._drafter(writer)  # checks its own settings

    @property
    def roles(self) -> Roles:
        """Who drafts and who verifies, and what ``scoring`` and ``calibration`` come to for these models."""
        return self._roles

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return self._roles.texts

    def replace(self, **changes: Any) -> SpeculativeRAG:
        """The same pipeline with other settings; the models are shared."""
        return replace(self, **changes)

    # --- entry points -------------------------------------------------------------------------------

    async def astream(self, question: str, passages: Iterable[Any]) -> AsyncGenerator[Event, None]:
        """What happens, as it happens: subsets, drafts, verdicts, and at last the answer. Raises as ``answer`` does."""
        asked = Asked.of(question, passages, Clock(self.deadline))
        if not asked.kept:
            yield AnswerReady(asked.without_passages())
            return
        drafts = self._draft_and_verify(asked)
        async with aclosing(drafts.events()) as events:
            async for event in events:
                yield event
        if drafts.timed_out:
            asked.notes.append(f"the deadline of {self.deadline} s passed {drafts.interrupted()}")
        roles = self._roles
        answer = Selection(roles.settled, roles.calibrated, self.min_confidence, roles.merges).answer(asked, drafts)
        if self.escalate is not None and self._in_doubt(answer):
            yield StageBegan("escalate", model=roles.judge_name)
            answer = await self._escalated(self.escalate, asked, answer)
        yield AnswerReady(answer)

    # --- the stages ---------------------------------------------------------------------------------

    def _draft_and_verify(self, asked: Asked) -> VerifiedDrafts:
        perspectives = Perspectives(
            self.embedder,
            self.drafts,
            self.passages_per_draft,
            self.subsets,
            self.reuse_embeddings,
            self.seed,
            once=self.sampling.greedy,
        )
        pool = PooledDrafts(
            asked.question,
            {at: asked.passages[at] for at in asked.kept},
            self._roles.readers,
            [self._drafter(writer) for writer in self._roles.writers],
            self.drafts,
            self.routing,
            lambda: perspectives.choose(asked),
        )
        return VerifiedDrafts(
            asked.question,
            pool.arrivals(),
            together=all(writer.capabilities.batched for writer in self._roles.writers),
            verifier=self._roles.verifying(self.texts, [asked.passages[at] for at in asked.kept]),
            clock=asked.clock,
        )

    def _drafter(self, writer: LanguageModel) -> Drafter:
        texts = self._roles.drafting_texts(writer)
        return Drafter(writer, texts, self.max_rationale_tokens, self.max_answer_tokens, self.sampling)

    def _in_doubt(self, answer: SpeculativeAnswer) -> bool:
        if self.deadline is not None and answer.timings.total >= self.deadline:
            return False
        return in_doubt(answer, self.escalate_below, None if self._roles.writers else self.routing)

    async def _escalated(self, to: Escalation, asked: Asked, answer: SpeculativeAnswer) -> SpeculativeAnswer:
        judge = self._roles.judge
        assert isinstance(judge, LanguageModel)  # checked at construction
        with asked.clock.measure("escalate"), working_on(Work("escalate")):
            asking = escalated(answer, to, judge, self.texts, asked.kept, asked.passages, self.max_answer_tokens)
            try:
                answer = await asyncio.wait_for(asking, asked.clock.left)
            except asyncio.TimeoutError:
                note = f"the deadline of {self.deadline} s passed before the verifier had answered itself"
                answer = replace(answer, notes=(*answer.notes, note))
        return replace(answer, timings=asked.clock.timings())
