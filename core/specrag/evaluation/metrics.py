"""Metrics of open-domain question answering: containment, exact match, F1, and a proportion's interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from specrag.text import normalize_answer


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` holds one of ``answers`` as whole words, both normalised as in SQuAD's evaluation."""
    padded = f" {normalize_answer(text)} "
    return any(f" {gold} " in padded for gold in map(normalize_answer, answers) if gold)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` equals one of ``answers`` after normalisation."""
    return normalize_answer(text) in {normalize_answer(answer) for answer in answers}


def f1(text: str, answers: Sequence[str]) -> float:
    """The best token F1 of ``text`` against any of ``answers``, in [0, 1]."""
    words = normalize_answer(text).split()
    best = 0.0
    for answer in answers:
        gold = normalize_answer(answer).split()
        shared = sum((Counter(words) & Counter(gold)).values())
        if shared:
            best = max(best, 2 * shared / (len(words) + len(gold)))
    return best


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; 95 % by default. (0, 1) when ``count`` is 0."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale
