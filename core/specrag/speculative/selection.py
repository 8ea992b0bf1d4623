"""Selection: scored drafts -> the answer, or an abstention (Wang et al., arXiv 2407.08223, section 3.3).

Pure functions over verdicts. Log-scores are in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from specrag.schema import ScoreName, Verdict
from specrag.text import normalize_answer


@dataclass(frozen=True)
class Choice:
    """Which draft wins, and why.

    Attributes:
        ranked: All verdicts with their log-scores, best first; drafts that abstain come last.
        scores_used: The scores that counted.
        reason: Why no draft wins; ``None`` when the first of ``ranked`` does.
        notes: What was not done as asked.
    """

    ranked: tuple[Verdict, ...]
    scores_used: tuple[ScoreName, ...]
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> Verdict | None:
        """The best verdict, unless the choice is to abstain."""
        return self.ranked[0] if self.reason is None else None


def choose(
    verdicts: Sequence[Verdict],
    wanted: Sequence[ScoreName],
    threshold: float | None = None,
    *,
    weights: Mapping[ScoreName, float] | None = None,
    merge: bool = False,
) -> Choice:
    """The best of ``verdicts`` by the ``wanted`` scores, or an abstention.

    Abstains when no verdict is there, when every draft abstains, or when the best log-score is not above ``threshold``.

    Args:
        verdicts: One per draft.
        wanted: The scores that shall count.
        threshold: In nats.
        weights: What each score is multiplied with; 1 by default.
        merge: Make one verdict of those with the same answer (``merged``).
    """
    ranked, counting = rank(merged(verdicts) if merge else verdicts, wanted, weights)
    notes: tuple[str, ...] = ()
    if not counting and any(not verdict.draft.abstained for verdict in ranked):
        notes = ("no score was available for every draft: agreement among drafts, then retrieval rank, decided",)
    elif counting and (missing := [name for name in wanted if name not in counting]):
        notes = (f"not available for every draft, so left out: {', '.join(missing)}",)
    return Choice(ranked, counting, _reason_to_abstain(ranked, threshold), notes)


def merged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict per answer, in order: that of the draft with the best score of its own.

    Its ``same`` names the other drafts with this answer, and ``log_agreement`` is the log of their share, itself
    included, of all drafts that do not abstain. Its ``log_verdict`` is the largest of theirs.
    """
    answers: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if not verdict.draft.abstained:
            answers.setdefault(normalize_answer(verdict.draft.text) or verdict.draft.text, []).append(verdict)
    total = sum(map(len, answers.values()))
    kept = []
    for group in answers.values():
        best = max(group, key=lambda v: _number(v.log_draft))
        same = tuple(v.draft.index for v in group if v is not best)
        judged = [v.log_verdict for v in group if v.log_verdict is not None]
        kept.append(
            replace(best, same=same, log_agreement=math.log(len(group) / total), log_verdict=max(judged, default=None))
        )
    return [*kept, *(verdict for verdict in verdicts if verdict.draft.abstained)]


def _reason_to_abstain(ranked: Sequence[Verdict], threshold: float | None) -> str | None:
    if not ranked:
        return "no draft was verified in time"
    best = ranked[0]
    if best.draft.abstained:  # these come last, so there is no other
        return "every draft says that the passages do not answer"
    if threshold is not None and best.log_score is not None and best.log_score <= threshold:
        return f"no draft scores above the threshold: {best.log_score:.3f} <= {threshold:.3f}"
    return None


def rank(
    verdicts: Sequence[Verdict], wanted: Sequence[ScoreName], weights: Mapping[ScoreName, float] | None = None
) -> tuple[tuple[Verdict, ...], tuple[ScoreName, ...]]:
    """All verdicts with their log-scores, best first, and the scores that counted.

    Drafts that abstain come last and do not decide what counts. Where no score counts, the answer that most drafts
    agree on comes first, then the one with the better ranked passages.
    """
    contest = [verdict for verdict in verdicts if not verdict.draft.abstained]
    abstaining = [replace(verdict, log_score=None) for verdict in verdicts if verdict.draft.abstained]
    counting = scores_counting(contest, wanted)
    if counting:
        ranked = sorted(
            (combine(verdict, counting, weights) for verdict in contest), key=lambda v: -_number(v.log_score)
        )
    else:
        votes = Counter(normalize_answer(verdict.draft.text) for verdict in contest)
        by_vote = sorted(contest, key=lambda v: (-votes[normalize_answer(v.draft.text)], v.draft.subset))
        ranked = [replace(verdict, log_score=None) for verdict in by_vote]
    return (*ranked, *abstaining), counting


def scores_counting(verdicts: Sequence[Verdict], wanted: Sequence[ScoreName]) -> tuple[ScoreName, ...]:
    """Those of the ``wanted`` scores that every verdict has. A score that one draft lacks counts for none."""
    if not verdicts:
        return ()
    return tuple(name for name in wanted if all(getattr(v, f"log_{name}") is not None for v in verdicts))


def combine(verdict: Verdict, scores: Sequence[ScoreName], weights: Mapping[ScoreName, float] | None = None) -> Verdict:
    """``verdict`` with log ρ, the weighted sum of ``scores`` (with weights of 1, the paper's product in log space)."""
    if not scores:
        return replace(verdict, log_score=None)
    weighted = (_weighted(getattr(verdict, f"log_{name}"), (weights or {}).get(name, 1.0)) for name in scores)
    return replace(verdict, log_score=float(sum(weighted)))


def _weighted(value: float, weight: float) -> float:
    return 0.0 if weight == 0 else weight * value  # 0 times minus infinity is not a number


def _number(value: float | None) -> float:
    return -math.inf if value is None else value
