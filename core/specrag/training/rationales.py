"""Extractive rationales β: the sentence of the passage that holds a known answer. They need no second model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from specrag.schema import Passage
from specrag.text import MAX_EVIDENCE_WORDS, evidence, normalize_answer, sentences, whole_words


def answer_in(passage: Passage, answers: Sequence[str]) -> str | None:
    """The longest of ``answers`` that the passage contains as whole words, as the passage spells it."""
    found = (_find(answer, passage.text) for answer in sorted(answers, key=len, reverse=True))
    return next((match.group() for match in found if match), None)


def extractive_rationale(
    question: str, answer: str, passage: Passage, max_words: int = MAX_EVIDENCE_WORDS
) -> str | None:
    """The sentence of ``passage`` that holds ``answer`` and most of the question's words, after the passage's title.

    A long sentence is cut to ``max_words`` words around the answer. ``None``: no sentence holds the answer.
    """
    asked = set(normalize_answer(question).split())
    best: tuple[int, int, int] | None = None  # words of the question, and where the answer stands
    for start, end in sentences(passage.text):
        match = _find(answer, passage.text[start:end])
        shared = len(asked & set(normalize_answer(passage.text[start:end]).split()))
        if match and (best is None or shared > best[0]):
            best = (shared, start + match.start(), start + match.end())
    return None if best is None else evidence(passage, best[1], best[2], max_words)


def _find(answer: str, text: str) -> re.Match[str] | None:
    pattern = whole_words(answer)
    return pattern.search(text) if pattern else None
