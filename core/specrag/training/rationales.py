"""Extractive rationales β: the sentence of the passage that holds a known answer. They need no second model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from specrag.schema import Passage
from specrag.text import normalize_answer

# A rationale is cut to this many words around the answer. With its title it then has 37 tokens in the median, and
# 68 or more in one of a hundred.
MAX_WORDS = 26
# A full stop after an initial or a title ends no sentence.
_ABBREVIATED = (
    r"(?<!\b[A-Zc]\.)(?<!\b(?:Dr|Mr|Ms|St|Jr|Sr|No|vs|ca|Lt)\.)(?<!\b(?:Mrs|Sgt|Gen|Sen|Rep|Col)\.)(?<!\bProf\.)"
)
_SENTENCE = re.compile(rf"(?<=[.!?]){_ABBREVIATED}[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+")


def answer_in(passage: Passage, answers: Sequence[str]) -> str | None:
    """The longest of ``answers`` that the passage contains as whole words, as the passage spells it."""
    found = (_find(answer, passage.text) for answer in sorted(answers, key=len, reverse=True))
    return next((match.group() for match in found if match), None)


def extractive_rationale(question: str, answer: str, passage: Passage, max_words: int = MAX_WORDS) -> str | None:
    """The sentence of ``passage`` that holds ``answer`` and most of the question's words, under its title.

    A long sentence is cut to ``max_words`` words around the answer. ``None``: no sentence holds the answer.
    """
    asked = set(normalize_answer(question).split())
    sentences = (" ".join(sentence.split()) for sentence in _SENTENCE.split(passage.text))
    holding = [(sentence, match) for sentence in sentences if (match := _find(answer, sentence))]
    if not holding:
        return None
    sentence, match = max(holding, key=lambda pair: len(asked & set(normalize_answer(pair[0]).split())))
    cut = _around(sentence, match, max_words)
    return f"{passage.title}: {cut}" if passage.title else cut


def whole_words(answer: str) -> re.Pattern[str] | None:
    """A pattern that finds the words of ``answer`` in any case, with no other words between them.

    ``None`` when ``answer`` has no words.
    """
    pattern = r"\W+".join(re.findall(r"\w+", answer))
    return re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE) if pattern else None


def _find(answer: str, text: str) -> re.Match[str] | None:
    pattern = whole_words(answer)
    return pattern.search(text) if pattern else None


def _around(sentence: str, match: re.Match[str], max_words: int) -> str:
    words = sentence.split()
    if len(words) <= max_words:
        return sentence
    before = len(sentence[: match.start()].split())
    end = min(len(words), before + len(match.group().split()) + 4)
    begin = max(0, min(before, end - max_words))
    if begin == 0:
        end = min(len(words), max(end, max_words))
    return " ".join(words[begin:end])
