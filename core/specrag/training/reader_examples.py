"""Training examples of a span reader: a question, a few passages, and the answers in them.

An example shows the gold passage of a record, alone or with hard negatives.
Hard negatives are the passages nearest to the question that hold none of its answers, also those of the same page.
A long passage is cut to a window that keeps an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from specrag.errors import InvalidInputError
from specrag.evaluation.data import Question
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.text import passage_text, spelled, whole_words, yes_or_no
from specrag.training.rationales import answer_in
from specrag.training.substitution import Substitutes

# Records per search for the nearest passages.
_CHUNK = 512


@dataclass(frozen=True)
class ReaderExample:
    """A question and passages.

    Attributes:
        answers: Texts that are right wherever the passages contain them. Without any, no span is right.
    """

    question: str
    passages: tuple[Passage, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReaderMixture:
    """Which passages the examples of a training round show.

    Args:
        alone: Share of the records shown without negatives. In [0, 1].
        most_negatives: All others have between 1 and this many negatives.
        nearest: Negatives are drawn from this many nearest passages.
        unanswerable: Share of the records whose gold passage is left out. In [0, 1].
        substituted: Share of the records in which another record's answer of the same kind replaces the answer.
            In [0, 1].
        words: All passages of an example are cut to windows of one size, between half of ``words`` and ``words``.
            Similar lengths need little padding, and the reader learns that a window may end anywhere.

    Raises:
        InvalidInputError: A value is out of range.
    """

    alone: float = 0.4
    most_negatives: int = 3
    nearest: int = 20
    unanswerable: float = 0.1
    substituted: float = 0.1
    words: int = 110

    def __post_init__(self) -> None:
        for name in ("alone", "unanswerable", "substituted"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("most_negatives", "nearest", "words"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")


def make_reader_examples(
    records: Sequence[Question],
    embedder: Embedder,
    *,
    rounds: int = 1,
    mixture: ReaderMixture = ReaderMixture(),
    seed: int = 0,
) -> list[list[ReaderExample]]:
    """``rounds`` rounds of examples. A round shows a record of weight w about w times, each time with other negatives.

    A record is left out when no gold passage contains one of its answers.
    A record without answers, or with yes or no as its answer, stays: then no span is right.

    Raises:
        InvalidInputError: No record can be used, or the records have one passage in all.
    """
    usable = [(record, answers) for record in records if (answers := _right(record)) is not None]
    if not usable:
        raise InvalidInputError(
            f"none of the {len(records)} records can be used: a gold passage must contain an answer verbatim"
        )
    # Passages that answer some question: a record's own distractors are negatives for that record alone.
    corpus = list({passage_text(p := record.passages[i]): p for record in records for i in record.gold}.items())
    if len(corpus) < 2 and all(len(record.passages) < 2 for record in records):
        raise InvalidInputError("the records have one passage in all: negatives need at least 2")
    negatives = _nearest([record for record, _ in usable], corpus, embedder, mixture.nearest)
    substitutes = Substitutes((record, answers[0]) for record, answers in usable if answers)
    random = np.random.default_rng(seed)
    made: list[list[ReaderExample]] = []
    for _ in range(rounds):
        part = []
        for (record, answers), near in zip(usable, negatives, strict=True):
            for _ in range(int(record.weight + random.random())):
                others = [corpus[i][1] for i in near]
                part.append(_example(record, answers, others, substitutes, mixture, random))
        made.append(part)
    return made


def _right(record: Question) -> tuple[str, ...] | None:
    """The answers that the gold passages contain, longest first.

    Empty where no span is right; ``None`` when the record cannot be used.
    """
    if all(yes_or_no([answer]) for answer in record.answers):
        return ()
    gold = [record.passages[i] for i in record.gold]
    found = [answer for answer in record.answers if any(answer_in(passage, [answer]) for passage in gold)]
    return tuple(sorted(found, key=len, reverse=True)) or None


def _nearest(
    records: Sequence[Question], corpus: Sequence[tuple[str, Passage]], embedder: Embedder, count: int
) -> list[list[int]]:
    """For each record, the positions in ``corpus`` of the nearest passages that hold no answer and are not its gold."""
    if not corpus:
        return [[] for _ in records]
    texts = [text for text, _ in corpus]
    folded = [text.casefold() for text in texts]
    vectors = embedder.embed(texts)
    found = []
    for at in range(0, len(records), _CHUNK):
        part = records[at : at + _CHUNK]
        near = embedder.embed([record.question for record in part]) @ vectors.T
        wide = min(4 * count, len(texts))
        for record, row in zip(part, near, strict=True):
            best = np.argpartition(-row, wide - 1)[:wide]
            own = {passage_text(record.passages[i]) for i in record.gold}
            answers = spelled(record.answers)
            kept = [
                int(i)
                for i in best[np.argsort(-row[best])]
                if texts[i] not in own and not any(answer in folded[i] for answer in answers)
            ]
            found.append(kept[:count])
    return found


def _example(
    record: Question,
    answers: tuple[str, ...],
    negatives: Sequence[Passage],
    substitutes: Substitutes,
    mixture: ReaderMixture,
    random: np.random.Generator,
) -> ReaderExample:
    # A reader has no rationale: the answer itself takes its place.
    substituted = answers and random.random() < mixture.substituted
    if substituted and (found := substitutes.substitute(record, answers[0], answers[0], random)):
        record, answers = found[0], (found[1],)
    gold = [record.passages[i] for i in record.gold]
    holding = [p for p in gold if any(answer_in(p, [answer]) for answer in answers)] if answers else gold
    others = [
        *negatives,
        *(p for p in record.passages if p not in gold and not any(answer_in(p, [a]) for a in answers)),
    ]
    alone = random.random() < mixture.alone
    count = 0 if alone else int(random.integers(1, mixture.most_negatives + 1))
    dropped = bool(others) and random.random() < mixture.unanswerable
    shown: list[Passage] = []
    if not dropped and holding:
        shown.append(holding[int(random.integers(len(holding)))])
    for i in random.permutation(len(others))[: max(count, 0 if shown else 1)]:
        shown.append(others[int(i)])
    right = answers if not dropped else ()
    size = int(random.integers(mixture.words // 2, mixture.words + 1))
    windows = tuple(_window(p, right, size, random) for p in shown)
    return ReaderExample(record.question, tuple(windows[int(i)] for i in random.permutation(len(windows))), right)


def _window(passage: Passage, answers: Sequence[str], size: int, random: np.random.Generator) -> Passage:
    """The passage, or ``size`` words of it, which contain one of its answers where it has one."""
    spans = [match.span() for match in re.finditer(r"\S+", passage.text)]
    if len(spans) <= size:
        return passage
    matches = [m for a in answers if (pattern := whole_words(a)) for m in pattern.finditer(passage.text)]
    low, high = 0, len(spans) - size
    if matches:
        match = matches[int(random.integers(len(matches)))]
        first = max(i for i, (begin, _) in enumerate(spans) if begin <= match.start())
        last = max(i for i, (begin, _) in enumerate(spans) if begin < match.end())
        low, high = max(0, last + 1 - size), min(high, first)
    begin = int(random.integers(low, high + 1)) if high > low else max(0, min(low, len(spans) - size))
    return replace(passage, text=passage.text[spans[begin][0] : spans[begin + size - 1][1]])
