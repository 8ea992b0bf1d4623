"""How many candidates to draft: a number, a schedule, or what the measured costs and acceptance make best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from specrag.errors import InvalidInputError

MAX_CANDIDATES = 12
# The newest measurement's weight in the running estimates.
_WEIGHT = 0.25
# Probing may cost this share of the time, no more.
_PROBE_SHARE = 0.03
_FIRST_GUESS = 4


class Controller:
    """Chooses γ round by round.

    Args:
        candidates: An int: always that many. A sequence: that schedule, then its last entry (a replay).
            ``"auto"``: the γ with the most expected tokens per second, from running estimates of what a drafted token,
            a plain step and a verified candidate cost and of how often candidates are accepted; 0 when none pays.
            It then probes from time to time, for at most 3 % of the time.
    """

    def __init__(self, candidates: int | Sequence[int] | Literal["auto"] = "auto") -> None:
        self._schedule: list[int] | None = None
        if isinstance(candidates, bool):
            raise InvalidInputError("candidates must be a number, a schedule or 'auto'")
        if isinstance(candidates, int):
            self._schedule = [candidates]
        elif candidates != "auto":
            self._schedule = [int(n) for n in candidates]
        if self._schedule is not None and (not self._schedule or min(self._schedule) < 0):
            raise InvalidInputError(f"candidates must be 0 or more, got {candidates}")
        self._round = 0
        self._acceptance: float | None = None
        self._draft: float | None = None  # seconds a drafted token
        self._plain: float | None = None  # seconds a step without candidates
        self._extra: float | None = None  # seconds a verified candidate adds to a step
        self._since_probe = 0.0

    @property
    def automatic(self) -> bool:
        """Whether γ depends on the clock."""
        return self._schedule is None

    def next(self) -> int:
        """γ of the coming round."""
        if self._schedule is not None:
            return self._schedule[min(self._round, len(self._schedule) - 1)]
        if self._plain is None:
            return 0  # what a plain step costs is what everything is compared with
        if self._acceptance is None:
            return _FIRST_GUESS
        best = self._best()
        if best == 0 and self._since_probe * _PROBE_SHARE >= self._loss(1):
            self._since_probe = 0.0
            return 1
        return best

    def observe(self, candidates: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Record a round. ``candidates`` that were drafted, ``accepted`` of them from the left."""
        self._round += 1
        if candidates == 0:
            self._plain = _blend(self._plain, verify_seconds)
            self._since_probe += verify_seconds
            return
        self._draft = _blend(self._draft, draft_seconds / candidates)
        if self._plain is not None:
            self._extra = _blend(self._extra, max(0.0, verify_seconds - self._plain) / candidates)
        tried = min(accepted + 1, candidates)  # candidates behind the first rejection say nothing
        for i in range(tried):
            self._acceptance = _blend(self._acceptance, float(i < accepted), 0.1)

    def _seconds(self, count: int) -> float:
        return (self._plain or 0.0) + count * ((self._draft or 0.0) + (self._extra or 0.0))

    def _tokens(self, count: int) -> float:
        a = min(self._acceptance or 0.0, 0.99)
        return float((1 - a ** (count + 1)) / (1 - a))

    def _loss(self, count: int) -> float:
        """Seconds that a round of ``count`` costs more than the same tokens by plain steps."""
        return max(0.0, self._seconds(count) - self._tokens(count) * self._seconds(0))

    def _best(self) -> int:
        return max(range(MAX_CANDIDATES + 1), key=lambda count: self._tokens(count) / max(self._seconds(count), 1e-9))


def _blend(old: float | None, new: float, weight: float = _WEIGHT) -> float:
    return new if old is None else old + weight * (new - old)
