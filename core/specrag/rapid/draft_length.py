"""How many candidates to draft: a number, a schedule, or what the measured costs and acceptance make best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from specrag.errors import InvalidInputError

MAX_CANDIDATES = 12
# What a drafter's own prefill may cost of the decoding time before anything is known of its acceptance.
_START_SHARE = 0.04
# A source's prior is believed in as firmly as if so many candidates had been verified: a few unlucky ones shall not end
# drafting for good.
_PRIOR_CANDIDATES = 8
# What the step from one token to several costs, and then a candidate, as shares of a plain step, until they are measured.
_JUMP_GUESS, _EXTRA_GUESS = 0.3, 0.1
# The newest measurement's weight in the running estimates, and in that of the acceptance at least.
_WEIGHT, _ACCEPTANCE_WEIGHT = 0.25, 0.04
# A plain step after so many rounds with candidates: machines change their speed, and it is what they are judged by.
_REFRESH = 20
# A step that took longer than so many times the estimate was interrupted, and counts as that.
_SPIKE = 1.5
# What older rounds count for in the lines after each round.
_MEMORY = 0.9
# Drafting that does not seem to pay is tried again when this share of the time has made up for what the last round of it lost.
_PROBE_SHARE = 0.02
# What drafting must promise: what it promises is the best of many noisy guesses.
_MARGIN = 1.03
# Candidates of the first rounds with any, and how many such rounds before they are judged.
_FIRST_GUESS = 2
_TRIALS = 2


@dataclass(frozen=True)
class Line:
    """Seconds of a round against its candidates: a least-squares line through the latest rounds and a guess of its beginning.

    Steps of several tokens cost more than their candidates make up (the first one beyond a token is the dearest), so that a cost
    a candidate, measured at one γ, misjudges every other.
    """

    rounds: float = 0.0  # sums over the rounds, the older the less
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def with_round(self, candidates: int, seconds: float) -> Line:
        """The line with one round more."""
        sums = (self.rounds, self.x, self.xx, self.y, self.xy)
        new = (1.0, candidates, candidates**2, seconds, candidates * seconds)
        return Line(*(_MEMORY * old + value for old, value in zip(sums, new, strict=True)))

    def at(self, candidates: int, beginning: float) -> float:
        """Seconds of a round with so many candidates. ``beginning`` counts as one round of γ = 0."""
        n, y = self.rounds + 1, self.y + beginning
        spread = n * self.xx - self.x**2
        slope = max(0.0, (n * self.xy - self.x * y) / spread) if spread > 0 else 0.0
        return max(0.0, (y - slope * self.x) / n + slope * candidates)


@dataclass(frozen=True)
class Source:
    """Where candidates come from. What is learned of one source says nothing of another.

    ``prior``: the acceptance that is believed in before any candidate was verified. ``drafts``: whether a model makes them,
    whose cost must be tried before it can be judged.
    """

    name: str
    prior: float = 0.7
    drafts: bool = True


MODEL = Source("model")


@dataclass(frozen=True)
class Experience:
    """What is known of a source."""

    acceptance: float
    judged: int = 0  # candidates that were accepted or refused
    draft: Line = Line()
    rounds: int = 0  # on this context
    debt: float = 0.0  # seconds that its latest round lost against plain steps, less what is forgiven


@dataclass
class Estimates:
    """Running estimates, kept from one generation to the next. Seconds; ``None``: never measured."""

    sources: dict[Source, Experience] = field(default_factory=dict)
    plain: float | None = None  # a step without candidates
    verify: Line = Line()
    startup: float | None = None  # a token of the drafter's own prompt, prefilled
    tokens: float | None = None  # of an answer
    undrafted: float = 0.0  # decoding time since a drafter was last tried
    plain_rounds: int = 0  # on this context

    def of(self, source: Source) -> Experience:
        """What is known of ``source``."""
        return self.sources.get(source) or Experience(source.prior)

    def for_another_context(self) -> Estimates:
        """What is known of the models, without what depends on the context's length."""
        sources = {source: replace(known, rounds=0) for source, known in self.sources.items()}
        return replace(self, sources=sources, plain=None, verify=Line(), plain_rounds=0)


class Controller:
    """Chooses γ round by round.

    Args:
        candidates: An int: always that many. A sequence: that schedule, then its last entry (a replay).
            ``"auto"``: the γ with the most expected tokens per second, from running estimates of what a drafted token,
            a plain step and a verified candidate cost and of how often candidates are accepted; 0 when none pays.
            It then probes from time to time, for about 2 % of the time. A drafter that must read its own prompt first
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
        self._round = self._drafted = 0  # rounds, and those with candidates since the last plain step
        self.known = estimates if estimates is not None else Estimates()

    @property
    def automatic(self) -> bool:
        """Whether γ depends on the clock."""
        return self._schedule is None

    def next(self, source: Source = MODEL) -> int:
        """γ of the coming round, whose candidates would come from ``source``."""
        if self._schedule is not None:
            return self._schedule[min(self._round, len(self._schedule) - 1)]
        if self.known.plain_rounds < 2 or self._drafted >= _REFRESH:
            return 0  # what a plain step costs is what everything is compared with
        known = self.known.of(source)
        if source.drafts and (not known.draft.rounds or 0 < known.rounds < _TRIALS):
            return _FIRST_GUESS
        best = self._best(source)
        if self._rate(best, source) > _MARGIN * self._rate(0, source):
            return best
        return max(best, _FIRST_GUESS) if known.debt <= 0 else 0  # one candidate alone tells little of more

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
        if not self.known.of(MODEL).draft.rounds:
            return cost <= _START_SHARE * (self.known.undrafted + 0.5 * remaining * self.known.plain)
        if cost <= min(_PROBE_SHARE * self.known.undrafted, _START_SHARE * 0.5 * remaining * self.known.plain):
            return True  # what was measured may have been a bad day
        rate = self._rate(self._best(MODEL), MODEL)
        expected = remaining if self.known.tokens is None else min(remaining, self.known.tokens)
        return expected * (self.known.plain - 1 / rate) > cost

    def started(self, prompt_tokens: int, seconds: float) -> None:
        """The drafter has read its prompt."""
        self.known.undrafted = 0.0
        if prompt_tokens:
            self.known.startup = _blend(self.known.startup, seconds / prompt_tokens)

    def finished(self, tokens: int) -> None:
        """The generation is over."""
        self.known.tokens = _blend(self.known.tokens, float(tokens))

    def observe(
        self,
        candidates: int,
        accepted: int,
        draft_seconds: float,
        verify_seconds: float,
        catch_up_seconds: float = 0.0,
        source: Source = MODEL,
    ) -> None:
        """Record a round. ``candidates`` that were drafted by ``source``, ``accepted`` of them from the left.

        ``catch_up_seconds``: What the drafter took to read the tokens of plain steps, before it drafted.
        """
        self._round += 1
        known = self.known
        forgiven = _PROBE_SHARE * (draft_seconds + verify_seconds) / max(len(known.sources), 1)
        known.sources = {one: replace(its, debt=its.debt - forgiven) for one, its in known.sources.items()}
        if candidates == 0:
            known.plain_rounds += 1
            usual = verify_seconds if known.plain is None else min(verify_seconds, _SPIKE * known.plain)
            known.plain = _settled(known.plain, usual, known.plain_rounds)
            self._drafted = 0
            known.undrafted += verify_seconds
            return
        self._drafted += 1
        its = known.of(source)
        its = replace(its, rounds=its.rounds + 1)
        if its.rounds > 1:  # the first one is slow for reasons of its own: kernels are made for its shape
            known.sources[source] = its = replace(its, draft=its.draft.with_round(candidates, draft_seconds))
            known.verify = known.verify.with_round(candidates, verify_seconds)
            usual = min(draft_seconds + verify_seconds, _SPIKE * self._seconds(candidates, source))
            its = replace(its, debt=catch_up_seconds + usual - (accepted + 1) * (known.plain or 0.0))
        for i in range(min(accepted + 1, candidates)):  # candidates behind the first refusal say nothing
            weight = max(_ACCEPTANCE_WEIGHT, 1 / (_PRIOR_CANDIDATES + its.judged + 1))
            its = replace(its, acceptance=_blend(its.acceptance, float(i < accepted), weight), judged=its.judged + 1)
        known.sources[source] = its

    def _seconds(self, count: int, source: Source) -> float:
        plain = self.known.plain or 0.0
        if count == 0:
            return plain
        several = self.known.verify.at(count, plain * (1 + _JUMP_GUESS))
        if not self.known.verify.rounds:
            several += plain * _EXTRA_GUESS * count
        return max(plain, several) + self.known.of(source).draft.at(count, 0.0)

    def _rate(self, count: int, source: Source) -> float:
        """Tokens a second in rounds of ``count`` candidates."""
        a = min(self.known.of(source).acceptance, 0.99)
        return float((1 - a ** (count + 1)) / (1 - a)) / max(self._seconds(count, source), 1e-9)

    def _best(self, source: Source) -> int:
        """The fastest γ but 0."""
        return max(range(1, MAX_CANDIDATES + 1), key=lambda count: self._rate(count, source))


def _blend(old: float | None, new: float, weight: float = _WEIGHT) -> float:
    return new if old is None else old + weight * (new - old)


def _settled(old: float | None, new: float, rounds: int) -> float:
    """The best of the first rounds, then the running mean."""
    return min(old if old is not None else new, new) if rounds <= _TRIALS else _blend(old, new)
