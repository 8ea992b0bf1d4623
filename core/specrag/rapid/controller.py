"""How many candidates to draft: a number, a schedule, or what the measured costs and acceptance make best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specrag.errors import InvalidInputError

MAX_CANDIDATES = 12
# What a drafter's own prefill may cost of the decoding time before anything is known of its acceptance.
_START_SHARE = 0.04
# The acceptance that is believed in before any candidate was verified: a few unlucky ones shall not end drafting for good.
_PRIOR = 0.7
# What a verified candidate adds to a step, as a share of the step, until it is measured.
_EXTRA_GUESS = 0.1
# The newest measurement's weight in the running estimates.
_WEIGHT = 0.25
# Probing may cost this share of the time, no more.
_PROBE_SHARE = 0.03
# Candidates of the first rounds with any, and how many such rounds before they are judged: a first round is slow for
# reasons of its own (kernels are made for its shape).
_FIRST_GUESS = 2
_TRIALS = 2


@dataclass
class Estimates:
    """Running estimates, kept from one generation to the next. Seconds; ``None``: never measured."""

    acceptance: float | None = None
    draft: float | None = None  # a drafted token
    plain: float | None = None  # a step without candidates
    extra: float | None = None  # what a verified candidate adds to a step
    startup: float | None = None  # a token of the drafter's own prompt, prefilled
    tokens: float | None = None  # of an answer
    undrafted: float = 0.0  # decoding time since a drafter was last tried
    plain_rounds: int = 0  # on this context
    drafted_rounds: int = 0

    def for_another_context(self) -> Estimates:
        """What is known of the models, without what depends on the context's length."""
        return replace(self, plain=None, extra=None, plain_rounds=0, drafted_rounds=0)


class Controller:
    """Chooses γ round by round.

    Args:
        candidates: An int: always that many. A sequence: that schedule, then its last entry (a replay).
            ``"auto"``: the γ with the most expected tokens per second, from running estimates of what a drafted token,
            a plain step and a verified candidate cost and of how often candidates are accepted; 0 when none pays.
            It then probes from time to time, for at most 3 % of the time. A drafter that must read its own prompt first
            is started when what it is expected to save is more than that costs; while nothing is known of it, when that
            costs at most 4 % of the decoding so far and half of the tokens still allowed.
        estimates: From earlier generations; they are brought up to date.
    """

    def __init__(
        self, candidates: int | Sequence[int] | Literal["auto"] = "auto", estimates: Estimates | None = None
    ) -> None:
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
        self.known = estimates if estimates is not None else Estimates()
        self._since_probe = 0.0

    @property
    def automatic(self) -> bool:
        """Whether γ depends on the clock."""
        return self._schedule is None

    def next(self) -> int:
        """γ of the coming round."""
        if self._schedule is not None:
            return self._schedule[min(self._round, len(self._schedule) - 1)]
        if self.known.plain_rounds < 2:
            return 0  # what a plain step costs is what everything is compared with
        if self.known.acceptance is None or 0 < self.known.drafted_rounds < _TRIALS:
            return _FIRST_GUESS
        best = self._best()
        if best == 0 and self._since_probe * _PROBE_SHARE >= self._loss(1):
            self._since_probe = 0.0
            return 1
        return best

    def may_start(self, prompt_tokens: int, seconds_a_token: float, remaining: int) -> bool:
        """Whether a drafter shall read its own prompt now.

        Args:
            prompt_tokens: What it would have to read.
            seconds_a_token: What that costs, as long as it was never measured.
            remaining: Tokens that may still be generated.
        """
        if self._schedule is not None or prompt_tokens == 0:
            return True
        if self.known.plain is None:
            return False
        cost = prompt_tokens * (seconds_a_token if self.known.startup is None else self.known.startup)
        if self.known.acceptance is None or self.known.draft is None:
            return cost <= _START_SHARE * (self.known.undrafted + 0.5 * remaining * self.known.plain)
        if cost <= min(_PROBE_SHARE * self.known.undrafted, _START_SHARE * 0.5 * remaining * self.known.plain):
            return True  # what was measured may have been a bad day
        best = self._best()
        expected = remaining if self.known.tokens is None else min(remaining, self.known.tokens)
        return expected * (self._seconds(0) - self._seconds(best) / self._tokens(best)) > cost

    def started(self, prompt_tokens: int, seconds: float) -> None:
        """The drafter has read its prompt."""
        self.known.undrafted = 0.0
        if prompt_tokens:
            self.known.startup = _blend(self.known.startup, seconds / prompt_tokens)

    def finished(self, tokens: int) -> None:
        """The generation is over."""
        self.known.tokens = _blend(self.known.tokens, float(tokens))

    def observe(self, candidates: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Record a round. ``candidates`` that were drafted, ``accepted`` of them from the left."""
        self._round += 1
        known = self.known
        if candidates == 0:
            known.plain_rounds += 1
            known.plain = _settled(known.plain, verify_seconds, known.plain_rounds)
            known.undrafted += verify_seconds
            self._since_probe += verify_seconds
            return
        known.drafted_rounds += 1
        known.draft = _settled(known.draft, draft_seconds / candidates, known.drafted_rounds)
        if known.plain is not None:
            extra = max(0.0, verify_seconds - known.plain) / candidates
            known.extra = _settled(known.extra, extra, known.drafted_rounds)
        tried = min(accepted + 1, candidates)  # candidates behind the first rejection say nothing
        for i in range(tried):
            known.acceptance = _blend(
                _PRIOR if known.acceptance is None else known.acceptance, float(i < accepted), 0.1
            )

    def _seconds(self, count: int) -> float:
        plain = self.known.plain or 0.0
        extra = _EXTRA_GUESS * plain if self.known.extra is None else self.known.extra
        return plain + count * ((self.known.draft or 0.0) + extra)

    def _tokens(self, count: int) -> float:
        a = min(self.known.acceptance or 0.0, 0.99)
        return float((1 - a ** (count + 1)) / (1 - a))

    def _loss(self, count: int) -> float:
        """Seconds that a round of ``count`` costs more than the same tokens by plain steps."""
        return max(0.0, self._seconds(count) - self._tokens(count) * self._seconds(0))

    def _best(self) -> int:
        return max(range(MAX_CANDIDATES + 1), key=lambda count: self._tokens(count) / max(self._seconds(count), 1e-9))


def _blend(old: float | None, new: float, weight: float = _WEIGHT) -> float:
    return new if old is None else old + weight * (new - old)


def _settled(old: float | None, new: float, rounds: int) -> float:
    """The best of the first rounds, then the running mean."""
    return min(old if old is not None else new, new) if rounds <= _TRIALS else _blend(old, new)
