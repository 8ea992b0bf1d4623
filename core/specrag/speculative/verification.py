"""Verification: drafts -> scores -> the choice (paper, section 3.3).

The three scores and their combination are pure functions; ``Verifier`` only builds the conversations
and asks the model. Log-probabilities are in nats, at temperature 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from specrag.errors import InvalidInputError, LogProbsUnavailableError
from specrag.models.base import GenerationRequest, LanguageModel, Score, Segment, Stage, Turn
from specrag.schema import ALL_SCORES, Draft, ScoreName, Usage, Verdict
from specrag.speculative.prompts import Prompts
from specrag.text import normalize_answer

Evidence = Literal["rationale", "passages", "both"]
Normalization = Literal["mixed", "sum", "mean"]

# How many likely tokens a server is asked for when P("Yes") must come from a generated token; the most OpenAI gives.
TOP_LOG_PROBS = 20


@dataclass(frozen=True)
class Scoring:
    """Which scores count, and how they are made.

    Args:
        scores: Any of ``"draft"`` (ρ_draft), ``"self_contain"`` (ρ_SC), ``"self_reflect"`` (ρ_SR).
        normalization: ``"sum"`` over tokens, as in the paper, which favours short drafts; ``"mean"`` a token; or ``"mixed"``:
            ρ_draft by its sum, the verifier's scores by their mean, which measures best (docs/benchmarks.md).
        evidence: What the verifier sees beside the answer: the rationale, the passages in its place
            (paper, Table 8), or both.
        threshold: Abstain when no draft's log-score is above it. Its scale depends on the other three. ``None`` was chosen on dev:
            any threshold that abstains from more unanswerable questions loses right answers (docs/benchmarks.md).
    """

    scores: tuple[ScoreName, ...] = ALL_SCORES
    normalization: Normalization = "mixed"
    evidence: Evidence = "rationale"
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        if unknown := [name for name in self.scores if name not in ALL_SCORES]:
            raise InvalidInputError(f"unknown scores {unknown}: choose among {', '.join(ALL_SCORES)}")
        if len(set(self.scores)) < len(self.scores):
            raise InvalidInputError(f"scores are named twice: {self.scores}")
        if self.normalization not in get_args(Normalization):
            raise InvalidInputError(f"normalization must be 'mixed', 'sum' or 'mean', got {self.normalization!r}")
        if self.evidence not in get_args(Evidence):
            raise InvalidInputError(f"evidence must be 'rationale', 'passages' or 'both', got {self.evidence!r}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InvalidInputError("threshold must be a number, got NaN")


def draft_score(draft: Draft, normalization: Normalization = "sum") -> float | None:
    """Log ρ_draft = logaddexp(log P(β | Q, δ), log P(α | Q, δ, β)) (paper, equation 1, in log space).

    Of the sums over tokens, with ``"mean"`` of their means. A draft without a rationale has no first term. ``None`` where the drafter gave no log-probabilities.
    """
    mean = normalization == "mean"
    answer = _per_token(draft.log_answer, draft.answer_tokens) if mean else draft.log_answer
    rationale = _per_token(draft.log_rationale, draft.rationale_tokens) if mean else draft.log_rationale
    if answer is None or (rationale is None and draft.rationale):
        return None
    if not draft.rationale or rationale is None:
        return answer
    high, low = max(answer, rationale), min(answer, rationale)
    return high if math.isinf(high) else high + math.log1p(math.exp(low - high))


def _per_token(value: float | None, tokens: int) -> float | None:
    return None if value is None else value / max(tokens, 1)


def scores_counting(verdicts: Sequence[Verdict], wanted: Sequence[ScoreName]) -> tuple[ScoreName, ...]:
    """Of the ``wanted`` scores those that every verdict has: what one draft lacks counts for none."""
    if not verdicts:
        return ()
    return tuple(name for name in wanted if all(getattr(v, f"log_{name}") is not None for v in verdicts))


def combine(verdict: Verdict, scores: Sequence[ScoreName]) -> Verdict:
    """Log ρ = the sum of ``scores`` (the paper's product, in log space)."""
    if not scores:
        return replace(verdict, log_score=None)
    return replace(verdict, log_score=float(sum(getattr(verdict, f"log_{name}") for name in scores)))


def rank(verdicts: Sequence[Verdict], wanted: Sequence[ScoreName]) -> tuple[tuple[Verdict, ...], tuple[ScoreName, ...]]:
    """All verdicts with their log-scores, best first, and the scores that counted.

    Drafts that abstain come last and do not decide what counts. Without a score, the answer that most
    drafts agree on comes first, then the one with the better ranked passages.
    """
    contest = [v for v in verdicts if not v.draft.abstained]
    abstaining = [v for v in verdicts if v.draft.abstained]
    counting = scores_counting(contest, wanted)
    if counting:
        ranked = sorted((combine(v, counting) for v in contest), key=lambda v: -_number(v.log_score))
    else:
        votes = Counter(normalize_answer(v.draft.text) for v in contest)
        by_vote = sorted(contest, key=lambda v: (-votes[normalize_answer(v.draft.text)], v.draft.subset))
        ranked = [replace(v, log_score=None) for v in by_vote]
    return (*ranked, *(replace(v, log_score=None) for v in abstaining)), counting


def _number(value: float | None) -> float:
    return -math.inf if value is None else value


@dataclass(frozen=True)
class RawScores:
    """What the verifier said of one draft, before normalisation. ``substitute``: P("Yes") from a generated token."""

    self_contain: tuple[float, ...] | None = None
    self_reflect: tuple[float, ...] | None = None
    usage: Usage = Usage()
    substitute: bool = False


@dataclass(frozen=True)
class Verifier:
    """Scores drafts with a language model: all that are given, in one call of it."""

    lm: LanguageModel
    prompts: Prompts = Prompts()
    scoring: Scoring = Scoring()

    @property
    def needed(self) -> bool:
        """Whether any score that counts comes from the verifier."""
        return any(name != "draft" for name in self.scoring.scores)

    def conversation(self, question: str, draft: Draft) -> tuple[Turn, ...]:
        """[Q, α, β, R, "Yes"], with the scored pieces named."""
        turns = list(self._shown(question, draft))
        if "self_reflect" in self.scoring.scores:
            turns.append(Turn.of("user", self.prompts.statement))
            turns.append(Turn("assistant", (Segment(self.prompts.affirmation, "self_reflect"),)))
        return tuple(turns)

    def _shown(self, question: str, draft: Draft) -> tuple[Turn, Turn]:
        contain = "self_contain" if "self_contain" in self.scoring.scores else None
        passages = draft.passages if self.scoring.evidence != "rationale" else None
        reply = [Segment(f"{self.prompts.answer_header} "), Segment(draft.text, contain)]
        if draft.rationale and self.scoring.evidence != "passages":
            reply += [Segment(f"\n{self.prompts.rationale_header} "), Segment(draft.rationale, contain)]
        return Turn.of("user", self.prompts.verify_text(question, passages)), Turn("assistant", tuple(reply))

    async def raw_scores(self, question: str, drafts: Sequence[Draft]) -> list[RawScores]:
        """The verifier's scores of ``drafts``, in order. Equal drafts are scored once.

        Raises:
            ModelError: The verifier failed.
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
        """P("Yes") as the summed probability of its spellings among the likeliest first tokens of the reply.

        Where none of them is among the tokens that the server lists, the least likely listed token's
        log-probability stands in: an upper bound.
        """
        if "self_reflect" not in self.scoring.scores or self.lm.capabilities.generation_log_probs is False:
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

    def verdict(self, draft: Draft, raw: RawScores) -> Verdict:
        """``draft`` with its scores as they count; the total is made when all are known (``rank``)."""
        kind = self.scoring.normalization
        contain = None if raw.self_contain is None else float(sum(raw.self_contain))
        return Verdict(
            draft=draft,
            log_draft=draft_score(draft, kind),
            log_self_contain=contain if kind == "sum" else _per_token(contain, len(raw.self_contain or ())),
            log_self_reflect=None if raw.self_reflect is None else float(sum(raw.self_reflect)),
        )


def _raw(score: Score, counts: bool) -> RawScores:
    contain, reflect = score.log_probs.get("self_contain"), score.log_probs.get("self_reflect")
    return RawScores(contain, reflect, score.usage if counts else Usage())


def yes_log_probability(top: object, affirmation: str = "Yes") -> float | None:
    """Log of the summed probabilities of ``affirmation``'s spellings in {token text: log-probability}."""
    if not isinstance(top, dict) or not top:
        return None
    wanted = affirmation.strip().casefold()
    values = [value for token, value in top.items() if str(token).strip(" \u2581\u0120").casefold() == wanted]
    if not values:
        return float(min(top.values()))
    high = max(values)
    return float(min(0.0, high + math.log(sum(math.exp(value - high) for value in values))))


def broken(raw: RawScores) -> bool:
    """Whether the verifier returned something that is not a number."""
    return any(math.isnan(value) for part in (raw.self_contain, raw.self_reflect) for value in part or ())
