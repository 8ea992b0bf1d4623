"""How many candidates to draft per round: a fixed number, a replayed schedule, or what measurements make best.

Before each round, the decoding loop asks a ``DraftLength`` for γ, and for the width of the tree where a drafter makes
trees. After the round, it reports what happened. ``Estimates`` holds what was measured and predicts from it;
``AdaptiveLength`` decides. All times are in seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from specrag.errors import InvalidInputError

Candidates = int | Sequence[int] | Literal["auto"]

# --- constants of the adaptive length -------------------------------------------------------------------

#: The largest γ that is considered.
MAX_CANDIDATES = 12
# γ of the first rounds with candidates: one candidate alone tells little about the cost of more.
_FIRST_GUESS = 2
# This many rounds with candidates are measured before a source is judged, and as many plain steps before any drafting.
_TRIALS = 2
# Drafting must be expected to be this much faster than plain decoding: the best of many noisy estimates is too high.
_MARGIN = 1.03
# Drafting that did not pay is tried again when this share of the time has made up for what its last round lost.
_PROBE_SHARE = 0.02
# A drafter's own prefill may cost this share of the decoding time while nothing is known of its acceptance.
_START_SHARE = 0.04
# After this many rounds with candidates, one plain step is measured again, because a machine's speed changes.
_REFRESH = 20
# A step that takes longer than this multiple of the estimate was interrupted. It counts as this multiple.
_SPIKE = 1.5
# The prior acceptance weighs as much as this many judged candidates, so that a few rejections do not end drafting.
_PRIOR_CANDIDATES = 8
# The chance, before any sibling was verified, that one is taken when the ones before it were not.
_SIBLING = 0.2
# The weight of the newest measurement in the running estimates, and the least weight of a candidate in the acceptance.
_WEIGHT, _ACCEPTANCE_WEIGHT = 0.25, 0.04
# Before they are measured, as shares of a plain step: the extra cost of several tokens at once, and of each candidate.
_JUMP_GUESS, _EXTRA_GUESS = 0.3, 0.1
# What the older rounds of a ``Line`` keep of their weight with each new round.
_MEMORY = 0.9


# --- what is measured -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where candidates come from. Nothing that is learned of one source is applied to another.

    Args:
        name: Shown in messages.
        prior: The acceptance that is assumed before any candidate was verified.
        drafts: Whether a model makes the candidates. Its cost must be tried before it can be judged.
    """

    name: str
    prior: float = 0.7
    drafts: bool = True


MODEL = Source("model")


@dataclass(frozen=True)
class Round:
    """A finished round.

    Args:
        candidates: How many were verified; of a tree, those of its longest path. 0 is a plain step.
        accepted: How many of them, from the left, were accepted.
        draft_seconds: Time to draft them.
        verify_seconds: Time of the target's forward pass and of the acceptance.
        catch_up_seconds: Time in which the drafter read the tokens of plain steps before it drafted.
        source: Where the candidates came from.
        width: Tokens at each step of the path: a candidate and its siblings. 1 is no tree.
        sibling: Which sibling was taken after the last candidate that was accepted, counted from 1; 0: none. It is
            part of ``accepted``.
    """

    candidates: int
    accepted: int
    draft_seconds: float
    verify_seconds: float
    catch_up_seconds: float = 0.0
    source: Source = MODEL
    width: int = 1
    sibling: int = 0


@dataclass(frozen=True)
class Line:
    """Seconds of a round as a linear function of its candidates and their siblings: least squares over the latest.

    A step of several tokens costs more than its candidates add up to (the step from one token to two costs most).
    A cost per candidate that was measured at one γ is therefore wrong at every other γ; a line is not.
    """

    rounds: float = 0.0  # sums over the rounds; older rounds count less
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def with_round(self, candidates: int, seconds: float) -> Line:
        """The line with one more round."""
        sums = (self.rounds, self.x, self.xx, self.y, self.xy)
        new = (1.0, candidates, candidates**2, seconds, candidates * seconds)
        return Line(*(_MEMORY * old + value for old, value in zip(sums, new, strict=True)))

    def at(self, candidates: int, beginning: float) -> float:
        """Seconds of a round with ``candidates`` candidates. ``beginning`` counts as one measured round of γ = 0."""
        n, y = self.rounds + 1, self.y + beginning
        spread = n * self.xx - self.x**2
        slope = max(0.0, (n * self.xy - self.x * y) / spread) if spread > 0 else 0.0
        return max(0.0, (y - slope * self.x) / n + slope * candidates)


@dataclass(frozen=True)
class Experience:
    """What is known of a source."""

    acceptance: float
    judged: int = 0  # candidates that were accepted or rejected
    sibling: float = _SIBLING  # the chance of a sibling when it is its turn
    siblings: int = 0  # that were taken or passed over
    draft: Line = Line()
    rounds: int = 0  # on this context
    debt: float = 0.0  # seconds that its latest round lost against plain steps, less what was written off

    def judging(self, candidates: int, accepted: int) -> Experience:
        """With the verdicts of a round. Candidates after the first rejection say nothing."""
        acceptance, judged = self.acceptance, self.judged
        for i in range(min(accepted + 1, candidates)):
            weight = max(_ACCEPTANCE_WEIGHT, 1 / (_PRIOR_CANDIDATES + judged + 1))
            acceptance, judged = _blend(acceptance, float(i < accepted), weight), judged + 1
        return replace(self, acceptance=acceptance, judged=judged)

    def judging_siblings(self, width: int, taken: int) -> Experience:
        """With the verdicts on the siblings of a rejected candidate: one after the other, until one is taken."""
        chance, judged = self.sibling, self.siblings
        for i in range(1, (taken or width - 1) + 1):
            weight = max(_ACCEPTANCE_WEIGHT, 1 / (_PRIOR_CANDIDATES + judged + 1))
            chance, judged = _blend(chance, float(i == taken), weight), judged + 1
        return replace(self, sibling=chance, siblings=judged)


@dataclass
class Estimates:
    """Running estimates, kept from one generation to the next. ``None``: never measured."""

    sources: dict[Source, Experience] = field(default_factory=dict)
    plain: float | None = None  # seconds of a step without candidates
    verify: Line = Line()
    startup: float | None = None  # seconds per token of the drafter's own prompt
    tokens: float | None = None  # of an answer
    undrafted: float = 0.0  # seconds of decoding since a drafter was last tried
    plain_rounds: int = 0  # on this context

    def of(self, source: Source) -> Experience:
        """What is known of ``source``."""
        return self.sources.get(source) or Experience(source.prior)

    def for_another_context(self) -> Estimates:
        """What is known of the models, without what depends on the context's length."""
        sources = {source: replace(known, rounds=0) for source, known in self.sources.items()}
        return replace(self, sources=sources, plain=None, verify=Line(), plain_rounds=0)

    def observe(self, done: Round) -> None:
        """Take a finished round into account."""
        draft, verify = done.draft_seconds, done.verify_seconds
        forgiven = _PROBE_SHARE * (draft + verify) / max(len(self.sources), 1)
        self.sources = {source: replace(its, debt=its.debt - forgiven) for source, its in self.sources.items()}
        if done.candidates == 0:
            self.plain_rounds += 1
            usual = verify if self.plain is None else min(verify, _SPIKE * self.plain)
            self.plain = _settled(self.plain, usual, self.plain_rounds)
            self.undrafted += verify
            return
        its = self.of(done.source)
        its = replace(its, rounds=its.rounds + 1)
        if its.rounds > 1:  # the first one is slow, because kernels are made for its shape
            its = replace(its, draft=its.draft.with_round(done.candidates, draft))
            self.sources[done.source] = its
            self.verify = self.verify.with_round(done.candidates * done.width, verify)
            usual = min(draft + verify, _SPIKE * self.seconds(done.candidates, done.source, done.width))
            its = replace(its, debt=done.catch_up_seconds + usual - (done.accepted + 1) * (self.plain or 0.0))
        path = done.accepted - (done.sibling > 0)
        its = its.judging(done.candidates, path)
        if path < done.candidates:
            its = its.judging_siblings(done.width, done.sibling)
        self.sources[done.source] = its

    def seconds(self, count: int, source: Source, width: int = 1) -> float:
        """Expected seconds of a round of ``count`` candidates, each with ``width`` - 1 siblings."""
        plain = self.plain or 0.0
        if count == 0:
            return plain
        several = self.verify.at(count * width, plain * (1 + _JUMP_GUESS))
        if not self.verify.rounds:
            several += plain * _EXTRA_GUESS * count * width
        return max(plain, several) + self.of(source).draft.at(count, 0.0)

    def rate(self, count: int, source: Source, width: int = 1) -> float:
        """Expected tokens per second in rounds of ``count`` candidates, each with ``width`` - 1 siblings.

        With a chance a per candidate and s per sibling, a round makes 1 + a + ... + a^count tokens, and one more when
        a candidate is rejected and one of its siblings is taken: with (1 - a^count) (1 - (1 - s)^(width - 1)).
        """
        its = self.of(source)
        a = min(its.acceptance, 0.99)
        beside = (1 - a**count) * (1 - (1 - its.sibling) ** (width - 1))
        return float((1 - a ** (count + 1)) / (1 - a) + beside) / max(self.seconds(count, source, width), 1e-9)

    def best(self, source: Source, width: int = 1) -> int:
        """The fastest γ other than 0."""
        return max(range(1, MAX_CANDIDATES + 1), key=lambda count: self.rate(count, source, width))


# --- what decides ---------------------------------------------------------------------------------------


class DraftLength(ABC):
    """Chooses γ round by round. One object serves one generation."""

    #: How wide the drafter's tree of the coming round is, once ``next`` was asked; ``None``: as it was made.
    width: int | None = None

    @abstractmethod
    def next(self, source: Source = MODEL) -> int:
        """γ of the coming round, whose candidates would come from ``source``."""

    def may_start(self, prompt_tokens: int, seconds_per_token: float, remaining: int) -> bool:
        """Whether a drafter may read its own prompt now.

        Args:
            prompt_tokens: Tokens that it would have to read.
            seconds_per_token: An estimate of their cost, used until it was measured.
            remaining: Tokens that may still be generated.
        """
        return True

    # Without a need to learn nothing is kept of what happens.
    def started(self, prompt_tokens: int, seconds: float) -> None:  # noqa: B027
        """The drafter has read its prompt."""

    def observe(self, done: Round) -> None:  # noqa: B027
        """A round is over."""

    def finished(self, tokens: int) -> None:  # noqa: B027
        """The generation is over, with this many tokens."""


class FixedLength(DraftLength):
    """Always the same γ."""

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates

    def next(self, source: Source = MODEL) -> int:
        return self.candidates


class ReplayedLength(DraftLength):
    """A schedule, γ by γ. Its last entry stays."""

    def __init__(self, schedule: Sequence[int]) -> None:
        self.schedule = tuple(schedule)
        self._round = 0

    def next(self, source: Source = MODEL) -> int:
        return self.schedule[min(self._round, len(self.schedule) - 1)]

    def observe(self, done: Round) -> None:
        self._round += 1


class AdaptiveLength(DraftLength):
    """The γ with the most expected tokens per second; 0 when no γ pays.

    A source that did not pay is tried again from time to time, for about 2 % of the time. A drafter that must read its
    own prompt first is started when it is expected to save more than that reading costs. While nothing is known of it,
    it is started when the reading costs at most 4 % of the decoding so far and of half of the tokens still allowed.

    A wider tree must be expected to be 3 % faster than a narrower one. A sibling costs the target as much time as a
    candidate of the path.

    Args:
        known: Estimates of earlier generations. They are updated.
        widths: Of the drafter's trees, ascending: what is chosen from. The first rounds have the first one.
    """

    def __init__(self, known: Estimates | None = None, widths: Sequence[int] = (1,)) -> None:
        self.known = known if known is not None else Estimates()
        self._drafted = 0  # rounds with candidates since the last plain step
        self._widths = tuple(widths)
        self.width: int = self._widths[0]

    def next(self, source: Source = MODEL) -> int:
        self.width = self._widths[0] if source.drafts else 1
        if self.known.plain_rounds < _TRIALS or self._drafted >= _REFRESH:
            return 0  # everything is compared with the cost of a plain step
        its = self.known.of(source)
        if source.drafts and (not its.draft.rounds or 0 < its.rounds < _TRIALS):
            return _FIRST_GUESS
        best, self.width = self._best(source)
        if self.known.rate(best, source, self.width) > _MARGIN * self.known.rate(0, source):
            return best
        return max(best, _FIRST_GUESS) if its.debt <= 0 else 0

    def may_start(self, prompt_tokens: int, seconds_per_token: float, remaining: int) -> bool:
        known = self.known
        if prompt_tokens == 0:
            return True
        if known.plain is None:
            return False
        cost = prompt_tokens * (seconds_per_token if known.startup is None else known.startup)
        if not known.of(MODEL).draft.rounds:
            return cost <= _START_SHARE * (known.undrafted + 0.5 * remaining * known.plain)
        if cost <= min(_PROBE_SHARE * known.undrafted, _START_SHARE * 0.5 * remaining * known.plain):
            return True  # the earlier measurements may have been disturbed
        best, width = self._best(MODEL)
        rate = known.rate(best, MODEL, width)
        expected = remaining if known.tokens is None else min(remaining, known.tokens)
        return expected * (known.plain - 1 / rate) > cost

    def _best(self, source: Source) -> tuple[int, int]:
        """The fastest γ other than 0, and its width."""
        known, width = self.known, self._widths[0] if source.drafts else 1
        best = known.best(source, width)
        for wider in self._widths[1:] if source.drafts else ():
            count = known.best(source, wider)
            if known.rate(count, source, wider) > _MARGIN * known.rate(best, source, width):
                best, width = count, wider
        return best, width

    def started(self, prompt_tokens: int, seconds: float) -> None:
        self.known.undrafted = 0.0
        if prompt_tokens:
            self.known.startup = _blend(self.known.startup, seconds / prompt_tokens)

    def observe(self, done: Round) -> None:
        self.known.observe(done)
        self._drafted = self._drafted + 1 if done.candidates else 0

    def finished(self, tokens: int) -> None:
        self.known.tokens = _blend(self.known.tokens, float(tokens))


def draft_length(candidates: Candidates, known: Estimates | None = None, widths: Sequence[int] = (1,)) -> DraftLength:
    """The draft length for a setting: a number, a schedule, or ``"auto"``, which learns from and updates ``known``.

    ``"auto"`` chooses among ``widths`` too.

    Raises:
        InvalidInputError: See ``checked_candidates``.
    """
    candidates = checked_candidates(candidates)
    if isinstance(candidates, int):
        return FixedLength(candidates)
    return AdaptiveLength(known, widths) if isinstance(candidates, str) else ReplayedLength(candidates)


def checked_candidates(candidates: Candidates) -> int | tuple[int, ...] | Literal["auto"]:
    """``candidates`` as it is meant: a number, a tuple or ``"auto"``.

    Raises:
        InvalidInputError: It is none of them, or a number is negative.
    """
    if candidates == "auto":
        return "auto"
    if isinstance(candidates, int) and not isinstance(candidates, bool):
        schedule: tuple[int, ...] = (candidates,)
    elif isinstance(candidates, Sequence) and not isinstance(candidates, str):
        schedule = tuple(int(n) for n in candidates)
    else:
        raise InvalidInputError(f"candidates must be a number, a schedule or 'auto', got {candidates!r}")
    if not schedule or min(schedule) < 0:
        raise InvalidInputError(f"candidates must be 0 or more, got {candidates}")
    return candidates if isinstance(candidates, int) else schedule


def _blend(old: float | None, new: float, weight: float = _WEIGHT) -> float:
    return new if old is None else old + weight * (new - old)


def _settled(old: float | None, new: float, rounds: int) -> float:
    """The best of the first rounds, then the running mean."""
    return min(old if old is not None else new, new) if rounds <= _TRIALS else _blend(old, new)
