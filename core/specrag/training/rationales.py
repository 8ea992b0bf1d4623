"""Extractive rationales β: a sentence of the passages that supports a known answer. They need no second model.

For most answers it is the sentence that holds the answer. No sentence holds a "yes" or a "no": there it is the sentence
that shares most with the question.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from specrag.schema import Passage
from specrag.text import MAX_EVIDENCE_WORDS, evidence, normalize_answer, sentences, whole_words

# Words of a question that say nothing about its subject.
_COMMON = re.compile(
    "is|are|was|were|am|be|been|being|do|does|did|can|could|has|have|had|will|would|shall|should|may|might|must|"
    "and|or|not|no|nor|but|if|than|then|so|as|of|in|on|at|to|for|from|by|with|about|into|over|under|between|"
    "it|its|he|she|his|her|him|they|them|their|you|your|we|our|i|me|my|this|that|these|those|there|here|"
    "what|who|whom|whose|which|when|where|why|how|any|some|all|both|each|other|same|also|ever"
)
# Words of a long sentence that stay after its last word of the question.
_AFTER = 4


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


def supporting_rationale(question: str, passages: Sequence[Passage], max_words: int = MAX_EVIDENCE_WORDS) -> str | None:
    """The sentence of ``passages`` that shares most words with ``question``, after its passage's title.

    Words like "is" and "of" do not count, and a word counts the more, the fewer of the sentences have it.
    A long sentence is cut to ``max_words`` words, which hold most of the shared ones. Where no sentence shares any, it
    is the first. ``None``: the passages have no words.
    """
    bounds = [(passage, *bound) for passage in passages for bound in sentences(passage.text)]
    if not bounds:
        return None
    asked = {word for word in normalize_answer(question).split() if not _COMMON.fullmatch(word)}
    words = [
        [(m.group().casefold(), a + m.start(), a + m.end()) for m in re.finditer(r"\w+", passage.text[a:b])]
        for passage, a, b in bounds
    ]
    counts = Counter(word for part in words for word in {word for word, *_ in part} & asked)
    weights = {word: math.log(1 + len(bounds) / count) for word, count in counts.items()}
    best, passage, start, end = 0.0, *bounds[0][:2], bounds[0][1]
    for (of, *_), part in zip(bounds, words, strict=True):
        for i in range(len(part)):
            shared = [found for found in part[i : i + max(1, max_words - _AFTER)] if found[0] in weights]
            score = sum(weights[word] for word in {word for word, *_ in shared})
            if score > best + 1e-9:
                best, passage, start, end = score, of, shared[0][1], shared[-1][2]
    return evidence(passage, start, end, max_words)


def _find(answer: str, text: str) -> re.Match[str] | None:
    pattern = whole_words(answer)
    return pattern.search(text) if pattern else None
