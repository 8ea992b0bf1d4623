"""How well a span reader reads: on questions that its passages answer, and on questions that they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specrag.evaluation.metrics import contains_answer
from specrag.evaluation.records import Question
from specrag.evaluation.statistics import wilson_interval
from specrag.models.base import Reader
from specrag.speculative.reading import distinct_spans
from specrag.text import passage_text


@dataclass(frozen=True)
class ReaderQuality:
    """How often a reader's best span is right, and how often it doubts that there is one.

    Attributes:
        answerable, unanswerable: Numbers of questions.
        right: Share of the answerable questions whose best span contains a right answer.
        right_interval: Its 95 % Wilson interval.
        wrongly_doubted: Share of the answerable questions to which "no span answers" has a probability above 1/2.
        rightly_doubted: The same share of the unanswerable questions.
    """

    answerable: int
    right: float
    right_interval: tuple[float, float]
    wrongly_doubted: float
    unanswerable: int
    rightly_doubted: float


def evaluate_reader(reader: Reader, records: Sequence[Question]) -> ReaderQuality:
    """Read each record's passages and count."""
    right = lost = kept = answerable = 0
    for record in records:
        texts = [passage_text(passage) for passage in record.passages]
        reading = reader.read(record.question, texts)
        doubted = reading.log_no_answer > math.log(0.5)
        if not record.answers:
            kept += doubted
            continue
        answerable += 1
        lost += doubted
        if groups := distinct_spans(reading, texts):
            best = groups[0][0]
            right += contains_answer(texts[best.passage][best.start : best.end], record.answers)
    unanswerable = len(records) - answerable
    return ReaderQuality(
        answerable=answerable,
        right=right / max(answerable, 1),
        right_interval=wilson_interval(right, answerable),
        wrongly_doubted=lost / max(answerable, 1),
        unanswerable=unanswerable,
        rightly_doubted=kept / max(unanswerable, 1),
    )
