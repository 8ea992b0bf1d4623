"""How sure a measured figure is: intervals, and tests of two systems on the same questions.

Questions are the unit. Two systems that answered the same questions are compared in pairs, question by question, so
that easy and hard questions do not blur the difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from specrag.errors import InvalidInputError

_CELLS = 2**22  # resampled values held at a time


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; 95 % by default. (0, 1) when ``count`` is 0."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def bootstrap_interval(
    first: Sequence[float],
    second: Sequence[float],
    statistic: Literal["difference", "ratio"] = "difference",
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The paired percentile-bootstrap interval of a difference of means, or of a ratio of means (Efron 1979).

    Questions are drawn with replacement, each with its values from both systems.

    Args:
        first: A value per question, of the first system.
        second: The same questions, the second system.
        statistic: "difference": mean of ``first`` less mean of ``second``. "ratio": the one divided by the other, for
            positive values such as seconds or tokens per second.
        level: The share of intervals that cover the true value.
        samples: Resampled data sets.
        seed: The same seed gives the same interval.

    Raises:
        InvalidInputError: Lengths differ or are 0, a value is not finite, a ratio's value is not positive, or an
            option is out of range.
    """
    if statistic not in ("difference", "ratio") or not 0 < level < 1 or samples < 1:
        raise InvalidInputError(
            "expected statistic difference or ratio, level in (0, 1), at least 1 sample; "
            f"got {statistic!r}, {level}, {samples}"
        )
    a, b = _paired(first, second)
    if statistic == "ratio" and not ((a > 0).all() and (b > 0).all()):
        raise InvalidInputError("the ratio of two means needs positive values")
    drawn = []
    for size, random in _batches(samples, len(a), seed):
        at = random.integers(0, len(a), size=(size, len(a)))
        means = a[at].mean(axis=1), b[at].mean(axis=1)
        drawn.append(means[0] - means[1] if statistic == "difference" else means[0] / means[1])
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value of McNemar's exact test: are two systems right equally often on the same questions?

    Only the questions that one system alone gets right count. When both are equally good, each of these n is the
    first system's with probability 1/2: p = min(1, 2 · P(X ≤ min(n₁, n₂))) for X binomial with n and 1/2.

    Raises:
        InvalidInputError: Lengths differ or are 0, or a value is neither right (1) nor wrong (0).
    """
    a, b = _paired(first, second)
    if not _binary(a, b):
        raise InvalidInputError("McNemar's test needs right (1) and wrong (0); for scores, use randomization_test")
    won, lost = int((a > b).sum()), int((a < b).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def randomization_test(
    first: Sequence[float], second: Sequence[float], *, samples: int = 10_000, seed: int = 0
) -> float:
    """The two-sided p-value of a paired randomisation test of the difference of means, for scores such as F1.

    When the systems do not differ, each question's two values could as well be exchanged: the sign of each difference
    is drawn at random, and p is the share of draws whose mean is at least as far from 0 as the measured one, that one
    included (Phipson and Smyth, 2010).

    Raises:
        InvalidInputError: Lengths differ or are 0, or a value is not finite.
    """
    a, b = _paired(first, second)
    differences = a - b
    measured = abs(differences.sum()) * (1 - 1e-12)  # sums of the same numbers in another order are equal
    extreme = 0
    for size, random in _batches(samples, len(a), seed):
        signs = random.integers(0, 2, size=(size, len(a))) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= measured).sum())
    return (extreme + 1) / (samples + 1)


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same questions.

    Attributes:
        names: The first and the second system.
        difference: The mean of the first less that of the second.
        low: The lower end of the difference's interval.
        high: The upper end.
        p: The p-value of the paired test.
        test: "McNemar" for right and wrong, "randomisation" for other values.
        won: Questions on which the first is better.
        lost: Questions on which the second is better.
        count: Questions.
        level: The interval's level; a p-value below 1 − ``level`` is more than noise.
    """

    names: tuple[str, str]
    difference: float
    low: float
    high: float
    p: float
    test: Literal["McNemar", "randomisation"]
    won: int
    lost: int
    count: int
    level: float = 0.95

    @property
    def noise(self) -> bool:
        """Whether the data do not tell the two systems apart."""
        return self.p >= 1 - self.level

    def __str__(self) -> str:
        points = self.test == "McNemar"
        unit, scale = (" points", 100) if points else ("", 1)
        shown = [
            f"{value * scale:+.1f}" if points else f"{value:+.4g}" for value in (self.difference, self.low, self.high)
        ]
        verdict = "noise" if self.noise else f"{self.names[0 if self.difference > 0 else 1]} is better"
        return (
            f"{self.names[0]} less {self.names[1]}: {shown[0]}{unit} "
            f"({self.level:.0%} interval {shown[1]} to {shown[2]}, "
            f"{self.test} p = {self.p:.2g}, better on {self.won} and worse on {self.lost} of {self.count} questions): "
            f"{verdict}"
        )


def compare(
    first: Sequence[float],
    second: Sequence[float],
    names: tuple[str, str] = ("first", "second"),
    *,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two systems on the same questions, in the same order; more is better.

    Args:
        first: A value per question, of the first system: right or wrong, or a score such as F1.
        second: The same, of the second system.
        names: What to call them.
        level: The interval's level, and 1 less the p-value from which on a difference is noise.
        samples: Resampled data sets, for the interval and for the randomisation test.
        seed: The same seed gives the same result.

    Raises:
        InvalidInputError: As ``bootstrap_interval``.
    """
    a, b = _paired(first, second)
    binary = _binary(a, b)
    low, high = bootstrap_interval(first, second, level=level, samples=samples, seed=seed)
    return Comparison(
        names=names,
        difference=float(a.mean() - b.mean()),
        low=low,
        high=high,
        p=mcnemar(first, second) if binary else randomization_test(first, second, samples=samples, seed=seed),
        test="McNemar" if binary else "randomisation",
        won=int((a > b).sum()),
        lost=int((a < b).sum()),
        count=len(a),
        level=level,
    )


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise InvalidInputError(
            "expected one value per question for each system, and at least one question; "
            f"got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InvalidInputError("every value must be finite")
    return a, b


def _binary(*values: np.ndarray) -> bool:
    return bool(np.isin(np.concatenate(values), (0, 1)).all())


def _batches(samples: int, count: int, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Numbers of samples that fit into memory together, and the generator to draw them with."""
    random = np.random.default_rng(seed)
    size = max(1, _CELLS // count)
    for start in range(0, samples, size):
        yield min(size, samples - start), random
