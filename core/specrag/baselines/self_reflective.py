"""Self-reflective RAG: one candidate per passage, each judged by the model that wrote it (Asai et al., 2310.11511)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from specrag._fields import check_numbers
from specrag.baselines._critics import Critic, Critique, PromptCritic, ReflectionPrompts, TokenCritic
from specrag.baselines._settings import check_count, check_shares, checked_model, texts_for
from specrag.baselines._yes_no import check_yes_no
from specrag.baselines.base import answer_of
from specrag.baselines.reflection_tokens import ReflectionModel, check_reflection_tokens, has_reflection_tokens
from specrag.errors import DraftingError, InvalidInputError
from specrag.models.base import LanguageModel
from specrag.schema import (
    AnswerReady,
    Draft,
    DraftDone,
    DraftFailed,
    DraftFailure,
    Event,
    SubsetsChosen,
    Usage,
    Verdict,
    VerdictReady,
)
from specrag.speculative._asked import Asked
from specrag.speculative._clock import Clock
from specrag.speculative._roles import check_types
from specrag.speculative.drafting import Assignment
from specrag.speculative.entries import Streaming
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import draft_score

ReflectionKind = Literal["auto", "tokens", "prompts"]


@dataclass(frozen=True, kw_only=True)
class ReflectionWeights:
    """What each term of a candidate's score is multiplied with.

    Attributes:
        relevance, support, utility: w^G of equation 4; the paper's values (section 4.3).
        text: Of the mean log-probability of the text's tokens.

    Raises:
        InvalidInputError: A weight is not a number.
    """

    relevance: float = 1.0
    support: float = 1.0
    utility: float = 0.5
    text: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(relevance=self.relevance, support=self.support, utility=self.utility, text=self.text)

    def score(self, critique: Critique) -> float:
        """The score f of a candidate (equations 3 and 4; see ``SelfReflectiveRAG``).

        f = w_text · log p + w_rel · s_rel + w_sup · s_sup + w_use · s_use. Where the model gives no log p, that term is
        left out.
        """
        reflected = self.relevance * critique.relevance + self.support * critique.support
        reflected += self.utility * critique.utility
        return reflected if critique.text is None else reflected + self.text * critique.text


@dataclass(frozen=True, kw_only=True)
class SelfReflectiveRAG(Streaming):
    """Retrieves on demand, writes one candidate per passage in parallel, and takes the one with the best critique.

    Asai et al., arXiv 2310.11511. The model first says whether it needs passages (section 3.3, "adaptive retrieval").
    Then it writes one candidate per passage, and judges each by itself: is the passage relevant (ISREL), does it
    support the text (ISSUP), is the text a useful answer (ISUSE). A candidate's score is the weighted sum of the
    normalised probabilities of these judgements and the log-probability of the text (equations 3 and 4, appendix A.3):

        s_rel = p(relevant) / (p(relevant) + p(irrelevant))
        s_sup = (p(fully) + 0.5 p(partially)) / (p(fully) + p(partially) + p(no support))
        s_use = Σ_i w_i p(i) / Σ_i p(i), i from 1 to 5, w = -1, -0.5, 0, 0.5, 1

    Where the model's vocabulary has the paper's reflection tokens, these are theirs, read at the places where they
    stand. Elsewhere the model is asked three graded prompts: s_rel and s_sup are P(yes), s_use is 2 P(yes) - 1.

    What differs from the paper: an answer is one segment, so the beam search over segments is a choice among
    candidates. The text counts with the mean log-probability of its tokens; the authors' code takes its exponential. A
    candidate is written after ``[Relevant]``, and ISUSE is read after the likeliest token of ISSUP.

    Args:
        model: Writes and judges.
        reflection: ``"tokens"``, ``"prompts"``, or ``"auto"``: tokens where the vocabulary has them.
        retrieve: ``"on_demand"``: only where the model says that it needs passages; or ``"always"``.
        retrieve_above: It does where the normalised probability is above this.
        candidates: How many passages get a candidate, at most: the first ones.
        weights: Of the terms of the score.
        reflection_prompts: The graded prompts.
        prompts: ``standard`` and ``answer_header`` are used, where the model has no reflection tokens.
        max_answer_tokens: The limit of an answer, in tokens.

    ``answer.critiques`` has the judgements of every candidate.

    Raises:
        InvalidInputError: A setting out of range or of the wrong type, or a model without what ``reflection`` needs.
    """

    model: LanguageModel
    reflection: ReflectionKind = "auto"
    retrieve: Literal["on_demand", "always"] = "on_demand"
    retrieve_above: float = 0.2
    candidates: int = 10
    weights: ReflectionWeights = field(default_factory=ReflectionWeights)
    reflection_prompts: ReflectionPrompts = field(default_factory=ReflectionPrompts)
    prompts: Prompts | None = None
    max_answer_tokens: int = 24
    _critic: Critic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checked_model(self.model, self.prompts, self.max_answer_tokens)
        check_count(candidates=self.candidates)
        check_shares(retrieve_above=self.retrieve_above)
        check_types(
            weights=(self.weights, ReflectionWeights, "a ReflectionWeights"),
            reflection_prompts=(self.reflection_prompts, ReflectionPrompts, "a ReflectionPrompts"),
        )
        if self.reflection not in get_args(ReflectionKind):
            raise InvalidInputError(f"reflection must be 'auto', 'tokens' or 'prompts', got {self.reflection!r}")
        if self.retrieve not in ("on_demand", "always"):
            raise InvalidInputError(f"retrieve must be 'on_demand' or 'always', got {self.retrieve!r}")
        object.__setattr__(self, "_critic", self._made_critic())

    def _made_critic(self) -> Critic:
        if self.reflection == "tokens":
            check_reflection_tokens(self.model)
        if self.reflection == "tokens" or (self.reflection == "auto" and has_reflection_tokens(self.model)):
            return TokenCritic(ReflectionModel(self.model, self.max_answer_tokens))
        check_yes_no(self.model, "model of SelfReflectiveRAG")
        return PromptCritic(self.model, self.texts, self.reflection_prompts, self.max_answer_tokens)

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return texts_for(self.model, self.prompts)

    async def astream(self, question: str, passages: Iterable[Any]) -> AsyncGenerator[Event, None]:
        asked = Asked.of(question, passages, Clock(None))
        if not asked.kept:
            yield AnswerReady(asked.without_passages())
            return
        needed, judging = await self._needed(asked)
        read = asked.kept[: self.candidates] if needed else ()
        subsets = tuple((at,) for at in read) or ((),)
        yield SubsetsChosen(subsets, "none")
        with asked.clock.measure("draft"):
            made = await self._critic.write(
                asked.question,
                [Assignment(i, subset, tuple(asked.passages[at] for at in subset)) for i, subset in enumerate(subsets)],
            )
        drafts = [draft for draft in made if isinstance(draft, Draft)]
        failures = [failure for failure in made if isinstance(failure, DraftFailure)]
        for failure in failures:
            yield DraftFailed(failure)
        if not drafts:
            raise DraftingError(f"all {len(failures)} candidates failed; the first: {failures[0].error}")
        for draft in drafts:
            yield DraftDone(draft)
        if needed:
            with asked.clock.measure("grade"):
                critiques, usage = await self._critic.judge(asked.question, drafts)
            judging += usage
            verdicts = [self._verdict(*pair) for pair in zip(drafts, critiques, strict=True)]
            shown = [_row(*pair) for pair in zip(verdicts, critiques, strict=True)]
        else:  # there is one candidate, and nothing to compare it with
            asked.notes.append("the model answers without passages: it says that it needs none")
            verdicts, shown = [Verdict(draft, log_draft=draft_score(draft)) for draft in drafts], []
        for verdict in verdicts:
            yield VerdictReady(replace(verdict, log_score=None))
        asked.notes.extend(note for draft in drafts for note in draft.notes)
        usage = sum((draft.usage for draft in drafts), Usage())
        ranked = sorted(verdicts, key=_rank)
        yield AnswerReady(
            answer_of(asked, ranked, drafter_usage=usage, verifier_usage=judging, critiques=shown, failures=failures)
        )

    def _verdict(self, draft: Draft, critique: Critique) -> Verdict:
        return Verdict(draft, log_draft=draft_score(draft), log_score=self.weights.score(critique))

    async def _needed(self, asked: Asked) -> tuple[bool, Usage]:
        """Whether the model needs passages."""
        if self.retrieve == "always":
            return True, Usage()
        with asked.clock.measure("grade"):
            value, usage = await self._critic.needs_passages(asked.question)
        return value > self.retrieve_above, usage


def _row(verdict: Verdict, critique: Critique) -> dict[str, Any]:
    """A judgement as ``SpeculativeAnswer.critiques`` shows it."""
    return {"passage": verdict.draft.subset[0], **critique.to_row(), "score": verdict.log_score}


def _rank(verdict: Verdict) -> tuple[bool, float]:
    """Candidates that abstain come last, the others by their score."""
    return verdict.draft.abstained, -(verdict.log_score or 0.0)
