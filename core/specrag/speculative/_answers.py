"""From the drafts that are verified to the answer, with its confidence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from specrag.errors import DraftingError
from specrag.schema import OWN_SCORES, SpeculativeAnswer
from specrag.speculative._asked import Asked
from specrag.speculative._verified_drafts import VerifiedDrafts
from specrag.speculative.confidence import Calibration, features
from specrag.speculative.selection import Choice, choose
from specrag.speculative.verification import Scoring


@dataclass(frozen=True)
class Selection:
    """How the answer is chosen.

    Args:
        scoring: With its mode and its scores settled.
        calibration: Turns scores into confidence; ``None``: the answer has none.
        min_confidence: Abstain below it.
        merge: Make one verdict of the drafts with the same answer.
    """

    scoring: Scoring
    calibration: Calibration | None
    min_confidence: float | None
    merge: bool

    def answer(self, asked: Asked, drafts: VerifiedDrafts) -> SpeculativeAnswer:
        """The answer from the drafts that are verified.

        Where there is a deadline and no draft is verified by then, the draft with the best score of its drafter is the
        answer. A note says so. With a threshold or ``min_confidence``, which unverified drafts cannot meet, the answer
        is an abstention.

        Raises:
            DraftingError: Every draft failed.
            ModelError: The verifier failed for every draft, and there is no deadline.
        """
        if not drafts.verdicts and drafts.unverified and asked.clock.left is not None:
            if self.scoring.threshold is None and self.min_confidence is None:
                return self._unverified(asked, drafts)
        elif not drafts.timed_out and not drafts.verdicts and (drafts.errors or drafts.failures):
            if drafts.errors:
                raise drafts.errors[0]
            raise DraftingError(f"all {len(drafts.failures)} drafts failed; the first: {drafts.failures[0].error}")
        scoring = self.scoring
        choice = choose(drafts.verdicts, scoring.counted, scoring.threshold, weights=scoring.weights, merge=self.merge)
        found_nothing = not (drafts.timed_out or drafts.verdicts or drafts.unverified)
        confidence, reason = self._judged(choice, found_nothing=found_nothing)
        return _answer(asked, drafts, choice, confidence, reason)

    def _unverified(self, asked: Asked, drafts: VerifiedDrafts) -> SpeculativeAnswer:
        own = tuple(name for name in self.scoring.counted if name in OWN_SCORES) or ("draft",)
        choice = choose(drafts.by_their_own_scores(), own, weights=self.scoring.weights, merge=self.merge)
        note = "no draft was verified by the deadline: the drafter's own scores decided"
        return _answer(asked, drafts, replace(choice, notes=(note, *choice.notes)), None, choice.reason)

    def _judged(self, choice: Choice, *, found_nothing: bool) -> tuple[float | None, str | None]:
        """The confidence in ``choice``, and why it abstains, if it does."""
        if found_nothing:
            return None, "no passage holds a span that could answer"
        if choice.winner is None or self.calibration is None:
            return None, choice.reason
        confidence = self.calibration.probability(features(choice.ranked))
        if confidence is not None and self.min_confidence is not None and confidence < self.min_confidence:
            return confidence, f"the confidence is too low: {confidence:.2f} < {self.min_confidence:.2f}"
        return confidence, None


def _answer(
    asked: Asked, drafts: VerifiedDrafts, choice: Choice, confidence: float | None, reason: str | None
) -> SpeculativeAnswer:
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
        unverified=tuple(drafts.unverified),
        scores_used=choice.scores_used,
        embedding_source=drafts.embedding_source,
        timings=asked.clock.timings(),
        confidence=confidence,
        drafter_usage=drafts.drafter_usage,
        verifier_usage=drafts.verifier_usage,
        notes=(*asked.notes, *drafts.notes, *choice.notes),
    )
