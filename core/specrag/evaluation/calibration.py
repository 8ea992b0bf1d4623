"""Calibration for a user's own models: questions with known answers, asked once, and how well the result holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import calibration_error_by_chance, contains_answer, expected_calibration_error
from specrag.evaluation.records import Question
from specrag.speculative.confidence import Calibration, features, fit_calibration
from specrag.speculative.pipeline import SpeculativeRAG

#: (what is known of the choice, whether it is right), per question.
Examples = Sequence[tuple[Mapping[str, float], bool]]
# Held-out questions per bin of the calibration error, at least, and bins at most.
_PER_BIN, _BINS = 10, 10


def calibration_examples(
    rag: SpeculativeRAG,
    records: Sequence[Question],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Mapping[str, float], bool]]:
    """Ask every question, and compare the first choice with the right answers.

    A choice is right when it contains one of the right answers. On a question without right answers, every choice is
    wrong. A question on which all drafts abstain has no choice, and is left out.

    Args:
        rag: Its calibration and what depends on it are not used.
        progress: Called with (questions asked, all questions).

    Raises:
        SpecRAGError: The pipeline could not answer a question.
    """
    bare = rag.replace(calibration=None, min_confidence=None, escalate=None)
    made: list[tuple[Mapping[str, float], bool]] = []
    for number, record in enumerate(records, 1):
        ranked = bare.answer(record.question, record.passages).verdicts
        if ranked and not ranked[0].draft.abstained:
            made.append((features(ranked), contains_answer(ranked[0].draft.text, record.answers)))
        progress(number, len(records))
    return made


def calibrate(rag: SpeculativeRAG, examples: Examples) -> Calibration:
    """The calibration of ``rag``'s models, fitted on all ``examples``.

    Raises:
        InvalidInputError: There are fewer than 50 examples, or all are right, or none.
    """
    drafters, verifier = rag.roles.names
    return fit_calibration(examples, drafters, verifier, rag.roles.settled.mode)


@dataclass(frozen=True)
class HeldOut:
    """How a calibration that is fitted on one half of the questions holds on the other.

    Attributes:
        questions: Of the other half.
        right: Share of them that are right.
        confidence: The mean probability that was stated for them.
        error: The expected calibration error, in [0, 1], over ``bins`` bins that hold equally many questions.
        chance: The mean error of a confidence that is exactly right, on as many questions.
    """

    questions: int
    right: float
    confidence: float
    error: float
    bins: int
    chance: float


def held_out_error(examples: Examples) -> HeldOut | None:
    """Fit on a random half, and measure on the other; ``None`` where a half is all right or all wrong.

    Both halves have the same share of right ones.
    """
    shuffled = [examples[int(i)] for i in np.random.default_rng(0).permutation(len(examples))]
    ordered = sorted(shuffled, key=lambda example: example[1])
    fitted, others = ordered[::2], ordered[1::2]
    try:
        made = fit_calibration(fitted, (), "", "", least=2)
    except InvalidInputError:
        return None
    stated = [(probability, right) for found, right in others if (probability := made.probability(found)) is not None]
    if not stated:
        return None
    sure, right = [probability for probability, _ in stated], [truth for _, truth in stated]
    bins = max(1, min(_BINS, len(stated) // _PER_BIN))
    return HeldOut(
        questions=len(stated),
        right=sum(right) / len(right),
        confidence=sum(sure) / len(sure),
        error=expected_calibration_error(right, sure, bins),
        bins=bins,
        chance=calibration_error_by_chance(sure, bins)[0],
    )
