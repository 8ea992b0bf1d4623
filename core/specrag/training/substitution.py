"""Corpus substitution: another record's answer of the same kind replaces an answer.

A drafter that sees the same few passages for several rounds remembers their answers and no longer reads them.
When a passage holds another answer, only a drafter that reads the passage is right.
The method is that of Longpre et al. (arXiv 2109.05052, section 2.2).
They find the kinds of answers by named-entity recognition; here the question word and the answer's form decide.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from specrag.evaluation.data import Question
from specrag.text import whole_words, yes_or_no

_ASKING = re.compile(r"\b(who|whose|when|where|how many|how much|how long|how old|what|which)\b", re.IGNORECASE)
_MONTH = "(?:january|february|march|april|may|june|july|august|september|october|november|december)"
# A month is a date next to a number or alone. With other words it may be a name.
_DATE = re.compile(
    rf"\b(?:1\d|20)\d\d\b|\b{_MONTH},? \d|\d {_MONTH}\b|^(?:in |early |mid |late )?{_MONTH}$", re.IGNORECASE
)
_NUMBER = re.compile(
    r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand"
    r"|million|billion|first|second|third)\b",
    re.IGNORECASE,
)


class Substitutes:
    """The answers of a set of records by kind: a date, a number or a name that the same question word asks for."""

    def __init__(self, answered: Iterable[tuple[Question, str]]) -> None:
        self._by_kind: dict[tuple[str, str], list[str]] = defaultdict(list)
        for record, answer in answered:
            if kind := answer_kind(record.question, answer):
                self._by_kind[kind].append(answer)

    def substitute(
        self, record: Question, answer: str, rationale: str, random: np.random.Generator
    ) -> tuple[Question, str, str] | None:
        """``record``, answer and rationale with another answer of the same kind in place of ``answer``.

        ``None`` where that makes no sense: the answer is of no kind, the question names it, the rationale does not
        name it, the passages also spell it in another way, or no other answer of its kind is known.
        """
        kind = answer_kind(record.question, answer)
        own = whole_words(answer)
        if kind is None or own is None or own.search(record.question) or not own.search(rationale):
            return None
        known = " ".join([record.question, *(f"{p.title} {p.text}" for p in record.passages)]).casefold()
        others = [other for other in self._by_kind[kind] if other.casefold() not in known]
        if not others:
            return None
        other = others[int(random.integers(len(others)))]
        passages = list(record.passages)
        for i in record.gold:
            title = passages[i].title
            passages[i] = replace(
                passages[i],
                text=own.sub(lambda _: other, passages[i].text),
                title=own.sub(lambda _: other, title) if title else title,
            )
            if any((old := whole_words(text)) and old.search(passages[i].text) for text in record.answers):
                return None
        return (
            replace(record, answers=(other,), passages=tuple(passages)),
            other,
            own.sub(lambda _: other, rationale),
        )


def answer_kind(question: str, answer: str) -> tuple[str, str] | None:
    """The question word and the answer's form: ``date`` with its number of words, ``number`` or ``name``.

    ``None`` for any other text, and for yes and no, which no passage spells out.
    """
    if yes_or_no([answer]):
        return None
    asking = _ASKING.search(question)
    word = asking.group().casefold() if asking else ""
    if _DATE.search(answer):
        return word, f"date {min(len(answer.split()), 4)}"
    if _NUMBER.search(answer):
        return word, "number"
    words = [w for w in re.findall(r"\w+", answer) if len(w) > 3 or w[0].isupper()]
    return (word, "name") if words and all(w[0].isupper() for w in words) else None
