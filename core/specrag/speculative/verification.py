"""Verification: each draft gets its scores (Wang et al., arXiv 2407.08223, section 3.3).

``Verifier`` does it with a language model. What the pipeline needs of a verifier is ``verify``: a batch of drafts goes
in, and a verdict or failure per draft comes out. Log-probabilities are in nats, at temperature 1. Which scores count
and which draft wins is decided in ``selection``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError, LogProbsUnavailableError
from specrag.models.base import GenerationRequest, LanguageModel, Score, Segment, Stage, Turn
from specrag.schema import ALL_SCORES, OWN_SCORES, Draft, DraftFailure, ScoreName, Usage, Verdict
from specrag.speculative.affirmation import yes_log_probability
from specrag.speculative.prompts import Prompts
from specrag.speculative.work import Work, working_on

Mode = Literal["auto", "pointwise", "listwise"]
Evidence = Literal["rationale", "passages", "both"]
Normalization = Literal["mixed", "sum", "mean"]

#: How many likely tokens a server is asked for when P("Yes") comes from a generated token. OpenAI gives no more.
TOP_LOG_PROBS = 20
#: The note on an answer whose P("Yes") comes from generated tokens.
SUBSTITUTE_NOTE = (
    'the verifier gives no log-probabilities of given text: P("Yes") is that of its first generated token, '
    "and self-containment is left out"
)


@dataclass(frozen=True)
class Scoring:
    """How drafts are scored, and which scores count.

    Args:
        scores: Those that count. By default all that the mode makes: ``"draft"`` (ρ_draft), ``"self_contain"`` (ρ_SC)
            and ``"self_reflect"`` (ρ_SR); or ``"draft"`` and ``"listwise"`` (ρ_L); where a reader verifies, ``"draft"``
            and ``"span"``. Drafters that were trained to judge their own drafts (``specrag train --verdict``) give
            ``"verdict"``, which is named, or counts with ``"draft"`` where they draft alone and ``mode`` is ``"auto"``.
        normalization: Of the pointwise scores. ``"sum"`` over tokens, as in the paper, which favours short drafts;
            ``"mean"`` per token; or ``"mixed"``: the sum for ρ_draft and the mean for the verifier's scores, which
            measures best (docs/results.md).
        evidence: What a pointwise verifier sees beside the answer: the rationale, the passages in its place (paper,
            Table 8), or both.
        threshold: Abstain when no draft's log-score is above it, in nats. Its scale depends on the other settings.
        mode: ``"pointwise"``: the paper's scores, of each draft alone. ``"listwise"``: all drafts are compared in one
            prompt (``specrag.speculative.listwise``). ``"auto"``: listwise where a language model verifies the drafts
            of a reader, else pointwise.
        weights: What each score is multiplied with before they are summed; 1 where nothing is given.
        second_order_below: Listwise: the drafts are shown a second time, in the opposite order, where the two best ones
            are closer than this, in nats. ``None``: always; 0: never.

    Raises:
        InvalidInputError: An unknown name, a score named twice, or a number that is not one.
    """

    scores: tuple[ScoreName, ...] | None = None
    normalization: Normalization = "mixed"
    evidence: Evidence = "rationale"
    threshold: float | None = None
    mode: Mode = "auto"
    weights: Mapping[ScoreName, float] | None = None
    second_order_below: float | None = 2.0

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("normalization", Normalization), ("evidence", Evidence)):
            if getattr(self, name) not in get_args(kind):
                *others, last = map(repr, get_args(kind))
                raise InvalidInputError(f"{name} must be {', '.join(others)} or {last}, got {getattr(self, name)!r}")
        check_numbers(threshold=self.threshold, second_order_below=self.second_order_below)
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(self.scores))
        named = (*(self.scores or ()), *(self.weights or ()))
        if unknown := [name for name in named if name not in get_args(ScoreName)]:
            raise InvalidInputError(f"unknown scores {unknown}: choose among {', '.join(get_args(ScoreName))}")
        if self.scores is not None and len(set(self.scores)) < len(self.scores):
            raise InvalidInputError(f"scores are named twice: {self.scores}")
        for what, value in (("threshold", self.threshold), ("second_order_below", self.second_order_below)):
            if value is not None and math.isnan(value):
                raise InvalidInputError(f"{what} must be a number, got NaN")
        if self.weights is not None:
            check_numbers(**{f"the weight of {name}": weight for name, weight in self.weights.items()})
        if not all(math.isfinite(weight) for weight in (self.weights or {}).values()):
            raise InvalidInputError(f"weights must be finite numbers, got {self.weights}")

    @property
    def counted(self) -> tuple[ScoreName, ...]:
        """The scores that count, where the mode is settled."""
        if self.scores is not None:
            return self.scores
        return ("draft", "listwise") if self.mode == "listwise" else ALL_SCORES

    def weight(self, score: ScoreName) -> float:
        """What ``score`` is multiplied with."""
        return (self.weights or {}).get(score, 1.0)


def with_self_reflection(scoring: Scoring) -> Scoring:
    """``scoring`` for a pipeline with a statement R of its own: where nothing else is said, a verifier answers it."""
    return replace(scoring, mode="pointwise") if scoring.mode == "auto" and scoring.scores is None else scoring


def draft_score(draft: Draft, normalization: Normalization = "sum") -> float | None:
    """Log ρ_draft = logaddexp(log P(β | Q, δ), log P(α | Q, δ, β)), in nats (paper, equation 1, in log space).

    The two terms are sums over tokens; with ``"mean"``, means per token. A draft without a rationale has no first term.
    ``None`` where the drafter gives no log-probabilities. Of a copied draft only the answer counts: its log-probability
    is that of its spans.
    """
    if draft.places:
        return draft.log_answer
    mean = normalization == "mean"
    answer = _per_token(draft.log_answer, draft.answer_tokens) if mean else draft.log_answer
    rationale = _per_token(draft.log_rationale, draft.rationale_tokens) if mean else draft.log_rationale
    if answer is None or (rationale is None and draft.rationale):
        return None
    if not draft.rationale or rationale is None:
        return answer
    high, low = max(answer, rationale), min(answer, rationale)
    return high if math.isinf(high) else high + math.log1p(math.exp(low - high))


def with_own_scores(draft: Draft, normalization: Normalization = "sum") -> Verdict:
    """``draft`` with the scores that its drafter gives, and no verifier's."""
    return Verdict(draft, log_draft=draft_score(draft, normalization), log_verdict=draft.log_verdict)


def _per_token(value: float | None, tokens: int) -> float | None:
    return None if value is None else value / max(tokens, 1)


@dataclass(frozen=True)
class RawScores:
    """What the verifier says of one draft, token by token, before normalisation.

    Attributes:
        self_contain: log P of each token of α and β.
        self_reflect: log P of each token of the affirmation ("Yes").
        usage: Tokens of the model call, counted once where several drafts share it.
        substitute: P("Yes") comes from a generated token.
        notes: Why one of the two is missing.
    """

    self_contain: tuple[float, ...] | None = None
    self_reflect: tuple[float, ...] | None = None
    usage: Usage = Usage()
    substitute: bool = False
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether some value is not a number."""
        return any(math.isnan(value) for part in (self.self_contain, self.self_reflect) for value in part or ())


@dataclass(frozen=True)
class Verification:
    """What a verifier says of a batch of drafts: a verdict or a failure per draft, in order."""

    outcomes: tuple[Verdict | DraftFailure, ...]
    usage: Usage = Usage()
    notes: tuple[str, ...] = ()


class DraftVerifier(Protocol):
    """What the pipeline needs of a verifier.

    Attributes:
        batched: One call with several drafts is faster than a call per draft.
        waits_for_all: The drafts are compared, so ``verify`` is called once, with all of them.
    """

    @property
    def batched(self) -> bool: ...

    @property
    def waits_for_all(self) -> bool: ...

    def needed_for(self, draft: Draft) -> bool:
        """Whether a score that counts for ``draft`` comes from this verifier."""

    def verdict(self, draft: Draft) -> Verdict:
        """``draft`` with the scores that its drafter gives."""

    async def verify(self, question: str, drafts: Sequence[Draft]) -> Verification:
        """A verdict or a failure per draft, in order."""


@dataclass(frozen=True)
class Verifier:
    """Scores drafts with a language model: all that are given, with one call of it.

    Args:
        lm: The model that scores them.
        prompts: What it reads.
        scoring: Which scores count and how they are made.
    """

    lm: LanguageModel
    prompts: Prompts = Prompts()
    scoring: Scoring = Scoring()

    #: Each draft is scored alone, so verification starts as drafts arrive.
    waits_for_all = False

    @property
    def batched(self) -> bool:
        """Whether one call with all drafts is faster than a call per draft."""
        return self.lm.capabilities.batched

    def needed_for(self, draft: Draft) -> bool:
        """Whether a score that counts for ``draft`` comes from this verifier."""
        return not draft.abstained and not set(self.scoring.counted) <= OWN_SCORES

    async def verify(self, question: str, drafts: Sequence[Draft]) -> Verification:
        """A verdict per draft, in order. Scores that are not numbers cost their draft alone.

        Raises:
            ModelError: The model failed.
        """
        with working_on(Work("verify", drafts[0].index)) if len(drafts) == 1 else nullcontext():
            raw_scores = await self.raw_scores(question, drafts)
        outcomes: list[Verdict | DraftFailure] = []
        for draft, raw in zip(drafts, raw_scores, strict=True):
            if raw.broken:
                outcomes.append(DraftFailure(draft.index, draft.subset, "the verifier's scores are not numbers (NaN)"))
            else:
                outcomes.append(self.verdict(draft, raw))
        substituted = any(raw.substitute and not raw.broken for raw in raw_scores)
        usage = sum((raw.usage for raw in raw_scores), Usage())
        notes = [SUBSTITUTE_NOTE] * substituted + [note for raw in raw_scores for note in raw.notes]
        return Verification(tuple(outcomes), usage, tuple(dict.fromkeys(notes)))

    def verdict(self, draft: Draft, raw: RawScores = RawScores()) -> Verdict:
        """``draft`` with its scores after normalisation. Their sum is made when all are known (``selection.rank``)."""
        kind = self.scoring.normalization
        contain = None if raw.self_contain is None else float(sum(raw.self_contain))
        return replace(
            with_own_scores(draft, kind),
            log_self_contain=contain if kind == "sum" else _per_token(contain, len(raw.self_contain or ())),
            log_self_reflect=None if raw.self_reflect is None else float(sum(raw.self_reflect)),
        )

    async def raw_scores(self, question: str, drafts: Sequence[Draft]) -> list[RawScores]:
        """The model's scores of ``drafts``, in order. Equal drafts are scored once.

        Raises:
            ModelError: The model failed.
        """
        conversations = [self.conversation(question, draft) for draft in drafts]
        distinct = list(dict.fromkeys(conversations))
        if self.lm.capabilities.prompt_log_probs is not False:
            try:
                scores = dict(zip(distinct, await self.lm.ascore(distinct), strict=True))
                first_use = {conversation: i for i, conversation in reversed(list(enumerate(conversations)))}
                return [
                    _raw(scores[conversation], first_use[conversation] == i)
                    for i, conversation in enumerate(conversations)
                ]
            except LogProbsUnavailableError:
                pass  # found out at the first call: the substitute serves from here on
        return await self._substitute(question, drafts)

    async def _substitute(self, question: str, drafts: Sequence[Draft]) -> list[RawScores]:
        """P("Yes") from the likeliest first tokens of the model's own reply; see ``yes_log_probability``."""
        if "self_reflect" not in self.scoring.counted or self.lm.capabilities.generation_log_probs is False:
            return [RawScores() for _ in drafts]
        requests = [
            GenerationRequest(
                turns=(*self._shown(question, draft), Turn.of("user", self.prompts.statement)),
                stages=(Stage(max_tokens=1),),
            )
            for draft in drafts
        ]
        completions = await self.lm.agenerate(requests, top_log_probs=TOP_LOG_PROBS)
        results = []
        for completion in completions:
            tops = completion.parts[0].top_log_probs
            value = yes_log_probability(tops[0], self.prompts.affirmation) if tops else None
            results.append(RawScores(None, None if value is None else (value,), completion.usage, substitute=True))
        return results

    def conversation(self, question: str, draft: Draft) -> tuple[Turn, ...]:
        """[Q, α, β, R, "Yes"] as turns. The segments whose tokens are scored have a name."""
        turns = list(self._shown(question, draft))
        if "self_reflect" in self.scoring.counted:
            turns.append(Turn.of("user", self.prompts.statement))
            turns.append(Turn("assistant", (Segment(self.prompts.affirmation, "self_reflect"),)))
        return tuple(turns)

    def _shown(self, question: str, draft: Draft) -> tuple[Turn, Turn]:
        contain = "self_contain" if "self_contain" in self.scoring.counted else None
        passages = draft.passages if self.scoring.evidence != "rationale" else None
        reply = [Segment(f"{self.prompts.answer_header} "), Segment(draft.text, contain)]
        if draft.rationale and self.scoring.evidence != "passages":
            reply += [Segment(f"\n{self.prompts.rationale_header} "), Segment(draft.rationale, contain)]
        return Turn.of("user", self.prompts.verify_text(question, passages)), Turn("assistant", tuple(reply))


def _raw(score: Score, counts: bool) -> RawScores:
    contain, reflect = score.log_probs.get("self_contain"), score.log_probs.get("self_reflect")
    return RawScores(contain or None, reflect or None, score.usage if counts else Usage(), notes=score.notes)
