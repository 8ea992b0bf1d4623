"""Metrics of question answering. Every function is pure: texts, booleans and numbers in, numbers out.

Two normalisations are in use. Exact match and F1 follow SQuAD's published evaluation (Rajpurkar et al., arXiv
1806.03822) exactly. Containment uses ``specrag.text.normalize_answer``, which finds a short answer inside a
sentence. It differs in three points. Punctuation becomes a space and is not deleted ("Paris/London" holds "London").
The punctuation of every script counts, not that of ASCII alone ("1939–1945" holds "1939"). Case is folded, not
lowered ("Straße" is "strasse").
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from specrag._extras import require
from specrag.errors import InvalidInputError
from specrag.evaluation.records import choice_labels
from specrag.evaluation.statistics import wilson_interval
from specrag.text import normalize_answer

__all__ = [
    "abstention_rate",
    "calibration_error_by_chance",
    "contains_answer",
    "draft_coverage",
    "exact_match",
    "expected_calibration_error",
    "f1",
    "normalize_squad",
    "percentiles",
    "read_choice",
    "right_choice",
    "rouge_l",
    "selective_accuracy",
    "selective_area",
    "selective_curve",
    "verifier_efficiency",
    "wilson_interval",
]

# Of the simulation of calibration errors: so many at a time keep its memory small.
_DRAWS_AT_ONCE = 100
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


# --- one answer ------------------------------------------------------------------------------------


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` holds one of ``answers`` as whole words, both normalised by ``normalize_answer``."""
    padded = f" {normalize_answer(text)} "
    return any(f" {gold} " in padded for gold in map(normalize_answer, answers) if gold)


def normalize_squad(text: str) -> str:
    """A text as SQuAD's evaluation compares it: lower case; no ASCII punctuation, no a, an or the; single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether ``text`` equals one of ``answers``, as in SQuAD v2's evaluation.

    Without an answer that has a word left after normalisation, the question is unanswerable, and the empty text is
    right.
    """
    return normalize_squad(text) in _golds(answers)


def f1(text: str, answers: Sequence[str]) -> float:
    """The best token F1 of ``text`` against any of ``answers``, in [0, 1], as in SQuAD v2's evaluation.

    A text or an answer without words has an F1 of 1 with another such, and of 0 with any other.
    """
    words = normalize_squad(text).split()
    best = 0.0
    for gold in _golds(answers):
        golds = gold.split()
        if not words or not golds:
            best = max(best, float(words == golds))
            continue
        shared = sum((Counter(words) & Counter(golds)).values())
        best = max(best, 2 * shared / (len(words) + len(golds)))
    return best


def _golds(answers: Sequence[str]) -> list[str]:
    return [gold for gold in map(normalize_squad, answers) if gold] or [""]


def rouge_l(text: str, references: Sequence[str], *, variant: Literal["rougeL", "rougeLsum"] = "rougeL") -> float:
    """The best ROUGE-L F-measure of ``text`` against any of ``references``, in [0, 1].

    The package ``rouge-score`` computes it, without stemming.

    Args:
        text: The generated text.
        references: Texts of which any is right.
        variant: "rougeL" compares the texts whole. "rougeLsum" compares them line by line (union of the longest common
            subsequences; Lin 2004), which InfiniteBench's En.Sum reports.

    Raises:
        InvalidInputError: There is no reference, or the variant is unknown.
        MissingExtraError: ``rouge-score`` is not installed.
    """
    if not references or variant not in ("rougeL", "rougeLsum"):
        raise InvalidInputError(
            f"expected references and a variant, rougeL or rougeLsum; got {len(references)} references and {variant!r}"
        )
    require("rouge_score", "evaluation", "ROUGE-L")
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer([variant]).score_multi(list(references), text)
    return float(scores[variant].fmeasure)


# --- multiple choice -------------------------------------------------------------------------------

_STATED = (  # "the answer is B", "Answer: (c)"; "option B"
    re.compile(r"(?i:\banswer(?:\s+is)?)\s*[:=]?\s*(?:(?i:option|choice)\s+)?(?:[(\[]([A-Za-z])[)\]]|([A-Z])\b)"),
    re.compile(r"(?i:\b(?:option|choice))\s*[:=]?\s*(?:[(\[]([A-Za-z])[)\]]|([A-Z])\b)"),
)
_ALONE_OR_FIRST = (
    re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?"),  # "B", "(b)", "C."
    re.compile(r"[(\[]([A-Za-z])[)\]](?!\w).*", re.DOTALL),  # "(A) because"
    re.compile(r"([A-Za-z])(?:[):]|\.(?=\s|$)).*", re.DOTALL),  # "C) days become shorter"
)


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Which of ``choices``, shown as A, B, C, ..., a text chooses.

    ``None``: it chooses none, or cannot be understood.

    Tried in turn: the text is a letter ("B", "(b)", "C."); begins with one ("C) days become shorter", "(A) because");
    states one ("the answer is B"; the last statement counts); is, or begins with, a choice's text; holds the text of
    one choice alone, where a choice inside another's text does not count; names one letter in brackets.

    Raises:
        InvalidInputError: There are more than 26 choices.
    """
    labels = choice_labels(len(choices))
    plain = text.replace("*", "").strip().strip("`\"'").strip()
    for pattern in _ALONE_OR_FIRST:
        if (match := pattern.fullmatch(plain)) and match[1].upper() in labels:
            return labels.index(match[1].upper())
    for pattern in _STATED:
        stated = [match[1] or match[2] for match in pattern.finditer(plain)]
        if stated and stated[-1].upper() in labels:
            return labels.index(stated[-1].upper())
    return _by_text(plain, choices, otherwise=_in_brackets(plain, labels))


def _in_brackets(text: str, labels: tuple[str, ...]) -> int | None:
    """The one letter that stands in brackets, if there is one and no other."""
    letters = {letter for letter in re.findall(r"[\(\[]([A-Z])[\)\]]", text) if letter in labels}
    return labels.index(letters.pop()) if len(letters) == 1 else None


def _by_text(text: str, choices: Sequence[str], otherwise: int | None) -> int | None:
    """The choice whose text is, begins, or alone stands in ``text``; ``otherwise`` when there is none."""
    said = f" {normalize_answer(text)} "
    golds = [f" {normalize_answer(choice)} " for choice in choices]
    held = [i for i, gold in enumerate(golds) if gold.strip() and gold in said]
    beginning = [i for i in held if said.startswith(golds[i])]
    for candidates in (beginning, held):
        longest = [i for i in candidates if not any(golds[i] in golds[j] and golds[i] != golds[j] for j in candidates)]
        if len(longest) == 1:
            return longest[0]
    return otherwise


def right_choice(text: str, choices: Sequence[str], correct: Sequence[int]) -> bool:
    """Whether ``text`` chooses one of the positions ``correct``; a text that cannot be understood is wrong.

    Raises:
        InvalidInputError: No choice is marked as correct.
    """
    if not correct:
        raise InvalidInputError(f"none of the choices {list(choices)} is marked as correct")
    return read_choice(text, choices) in correct


# --- many answers ----------------------------------------------------------------------------------


def abstention_rate(abstained: Sequence[bool]) -> float:
    """The share of questions that were not answered."""
    return float(np.mean(_filled("abstained", abstained)))


def selective_accuracy(right: Sequence[bool], answered: Sequence[bool]) -> float | None:
    """The share of right answers among the questions that were answered; ``None`` when none was."""
    rights, given = _same_length(("right", right), ("answered", answered))
    return float(rights[given.astype(bool)].mean()) if given.any() else None


def selective_curve(right: Sequence[bool], confidence: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy when only the most confident share of the questions is answered (El-Yaniv and Wiener, JMLR 2010).

    Questions of equal confidence are answered in random order; the curve is the expectation over that order. An
    abstention has the confidence ``-inf`` and is wrong.

    Returns:
        Coverage 1/n, 2/n, ..., 1 and the accuracy at each; both of shape [n].
    """
    rights, sure = _same_length(("right", right), ("confidence", confidence))
    order = np.argsort(-sure, kind="stable")
    _, group, sizes = np.unique(-sure[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=rights[order]) / sizes)[group]
    counted = np.arange(1, len(rights) + 1)
    return counted / len(rights), np.cumsum(expected) / counted


def selective_area(right: Sequence[bool], confidence: Sequence[float]) -> float:
    """The area under ``selective_curve``, in [0, 1]: the mean accuracy over all coverages."""
    return float(selective_curve(right, confidence)[1].mean())


def separation(right: Sequence[bool], score: Sequence[float]) -> float | None:
    """How well a score tells right from wrong: the area under the ROC curve, in [0, 1]; 0.5 by chance.

    It is the probability that a right one has a higher score than a wrong one; a tie counts half (Hanley and McNeil,
    Radiology 143, 1982). ``None`` where all are right, or all wrong.

    Args:
        right: Whether each is right.
        score: The score of each.

    Raises:
        InvalidInputError: Lengths differ or are 0, or a score is NaN.
    """
    rights, scores = _same_length(("right", right), ("score", score))
    if np.isnan(scores).any():
        raise InvalidInputError("a score is not a number (NaN)")
    good, bad = scores[rights.astype(bool)], np.sort(scores[~rights.astype(bool)])
    if not len(good) or not len(bad):
        return None
    below, up_to = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return float((below + up_to).mean() / (2 * len(bad)))


def expected_calibration_error(right: Sequence[bool], confidence: Sequence[float], bins: int = 10) -> float:
    """The mean gap between confidence and accuracy, in [0, 1], over bins that hold equally many questions.

    Σ_b n_b / n · |accuracy_b − confidence_b| (Naeini et al., AAAI 2015, with the equal-mass bins of Nguyen and
    O'Connor, 2015).

    Args:
        right: Whether each answer is right.
        confidence: The probability of being right that was stated for each, in [0, 1].
        bins: At most as many as there are questions are used.

    Raises:
        InvalidInputError: Lengths differ or are 0, a confidence is not in [0, 1], or ``bins`` is less than 1.
    """
    rights, sure = _same_length(("right", right), ("confidence", confidence))
    _check_calibration(sure, bins)
    order = np.argsort(sure, kind="stable")
    gaps = [
        abs(float(rights[part].mean() - sure[part].mean())) * len(part)
        for part in np.array_split(order, min(bins, len(order)))
    ]
    return sum(gaps) / len(rights)


def calibration_error_by_chance(
    confidence: Sequence[float], bins: int = 10, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The expected calibration error that chance alone causes: that of confidences which are exactly right.

    With few questions per bin it is far from 0. Answers are drawn at random, each right with its stated confidence.

    Args:
        confidence: The probability of being right that was stated for each, in [0, 1].
        bins: As for ``expected_calibration_error``.
        draws: How often all answers are drawn.
        seed: Of the draws.

    Returns:
        The mean of the errors, and the value that 95 % of them do not exceed.

    Raises:
        InvalidInputError: There is no confidence, one is not in [0, 1], or ``bins`` or ``draws`` is less than 1.
    """
    _, sure = _same_length(("confidence", confidence), ("confidence", confidence))
    _check_calibration(sure, bins)
    if draws < 1:
        raise InvalidInputError(f"draws must be at least 1, got {draws}")
    sure, random = np.sort(sure), np.random.default_rng(seed)
    errors = np.zeros(draws)
    for part in np.array_split(sure, min(bins, len(sure))):
        for at in range(0, draws, _DRAWS_AT_ONCE):
            size = min(_DRAWS_AT_ONCE, draws - at)
            errors[at : at + size] += abs((random.random((size, len(part))) < part).sum(axis=1) - part.sum())
    errors /= len(sure)
    return float(errors.mean()), float(np.quantile(errors, 0.95))


def _check_calibration(sure: Any, bins: int) -> None:
    if bins < 1 or not ((sure >= 0) & (sure <= 1)).all():
        raise InvalidInputError(
            "expected at least 1 bin and confidences in [0, 1]; "
            f"got {bins} bins and confidences {sure.min()} to {sure.max()}"
        )


def draft_coverage(drafts_right: Sequence[Sequence[bool]]) -> float:
    """The share of questions for which at least one draft is right: what a perfect verifier would reach.

    Args:
        drafts_right: For each question, whether each of its drafts is right.
    """
    return float(np.mean(_filled("drafts_right", [any(drafts) for drafts in drafts_right])))


def verifier_efficiency(right: Sequence[bool], drafts_right: Sequence[Sequence[bool]]) -> float | None:
    """The share of right answers among the questions for which some draft is right.

    ``None``: there is no such question.

    Args:
        right: Whether the chosen answer of each question is right.
        drafts_right: For each question, whether each of its drafts is right.
    """
    return selective_accuracy(right, [any(drafts) for drafts in drafts_right])


def percentiles(values: Sequence[float], ranks: Sequence[float] = (50, 95)) -> Mapping[str, float]:
    """Percentiles by linear interpolation, as "p50", "p95", in the unit of ``values``.

    Raises:
        InvalidInputError: There are no values, or a rank is not in [0, 100].
    """
    if any(not 0 <= rank <= 100 for rank in ranks):
        raise InvalidInputError(f"expected ranks in [0, 100], got {list(ranks)}")
    found = np.percentile(_filled("values", values), list(ranks))
    return {f"p{rank:g}": float(value) for rank, value in zip(ranks, found, strict=True)}


def _filled(name: str, values: Sequence[float]) -> np.ndarray:
    if len(values) == 0:
        raise InvalidInputError(f"{name} is empty: there is nothing to measure")
    return np.asarray(values, dtype=np.float64)


def _same_length(*named: tuple[str, Sequence[float]]) -> list[np.ndarray]:
    lengths = {name: len(values) for name, values in named}
    if len(set(lengths.values())) > 1:
        raise InvalidInputError(f"expected one value per question in each, got {lengths}")
    return [_filled(name, values) for name, values in named]
