"""The loop: draft, verify in one forward pass, accept, roll back (Chen et al., arXiv 2502.20330, section 3).

The loop owns no mathematics and no cache: it moves tokens between a proposer, the target and the functions of
``acceptance``, and text to whoever listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from specrag.errors import InvalidInputError
from specrag.models.tokenization import IncrementalDecoder, StopStrings
from specrag.rapid.acceptance import TAILS, TRANSFERS, Tail, Transfer, accept, accept_greedy, augmented_target
from specrag.rapid.draft_length import MODEL, Controller
from specrag.rapid.proposers import CachedModel, Drawing, Proposal, Proposer


@dataclass(frozen=True)
class RapidSettings:
    """What is sampled. See ``specrag.rapid.acceptance`` for transfer, strength (η) and tail."""

    transfer: Transfer = "rapid"
    strength: float = 10.0
    tail: Tail = "drafter"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.transfer not in TRANSFERS:
            raise InvalidInputError(f"transfer must be one of {', '.join(TRANSFERS)}; got {self.transfer!r}")
        if self.tail not in TAILS:
            raise InvalidInputError(f"tail must be one of {', '.join(TAILS)}; got {self.tail!r}")
        if not self.strength >= 0:
            raise InvalidInputError(f"transfer strength must be 0 or more, got {self.strength}")
        if not self.temperature >= 0:
            raise InvalidInputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_k must be 0 or more and top_p in (0, 1], got {self.top_k} and {self.top_p}")


@dataclass
class RapidStats:
    """What a generation did. Times in seconds; ``schedule`` is γ a round and can be given back as ``candidates``."""

    schedule: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    candidates: int = 0
    accepted: int = 0
    from_target: int = 0  # tokens drawn from p itself: bonus tokens and steps without candidates
    prefill_seconds: float = 0.0
    startup_seconds: float = 0.0  # the drafter's own prefill, of decode_seconds
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0  # inside the models, of decode_seconds
    first_token_seconds: float = 0.0
    finish: str = "length"
    notes: list[str] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """Share of the candidates that were accepted."""
        return self.accepted / self.candidates if self.candidates else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, prefill not counted."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a framework's metadata."""
        return {**asdict(self), "acceptance": self.acceptance, "tokens_per_second": self.tokens_per_second}


def decode(
    target: CachedModel,
    first_logits: Tensor,  # [vocabulary], after the prompt that the target's cache holds
    proposer: Proposer | None,
    settings: RapidSettings,
    controller: Controller,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    end_tokens: frozenset[int] = frozenset(),
    seed: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    stats: RapidStats | None = None,
    startup_seconds: float = 0.0,
) -> Iterator[str]:
    """Generate, yielding text as it is certain: no half characters, nothing that may become a stop string.

    Each round drafts γ candidates, feeds the last token and the candidates to the target in one pass, and accepts
    from the left. ``max_new_tokens`` is exact; an end token or stop string inside an accepted run ends it there.

    ``startup_seconds``: What reading one token of its own prompt will cost the proposer, about.
    """
    if max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    stats = stats if stats is not None else RapidStats()
    random = _generator(target.lm.device, seed)
    drawing = Drawing(settings.temperature, settings.top_k, settings.top_p, random)
    output = _Output(IncrementalDecoder(target.lm.tokenizer), StopStrings(stop), end_tokens, max_new_tokens)
    began, forwards = time.perf_counter(), _inside(target, proposer)
    needs_bonus = settings.transfer == "augmented" and proposer is not None and proposer.from_model

    emitted = [int(drawing.draw(drawing.distribution(first_logits)))]
    stats.from_target += 1
    while True:
        piece = output.add(emitted)
        stats.tokens = len(output.tokens)
        stats.decode_seconds = time.perf_counter() - began
        stats.forward_seconds = _inside(target, proposer) - forwards
        if piece:
            paused = time.perf_counter()
            yield piece
            began += time.perf_counter() - paused  # what the listener does is not decoding
        if output.finish is None and cancelled():
            output.finish = "cancelled"
        if output.finish is not None:
            stats.finish = output.finish
            controller.finished(len(output.tokens))
            last = output.rest()
            if last:
                yield last
            return
        left = max_new_tokens - len(output.tokens)
        proposal = source = None
        start = time.perf_counter()
        if proposer is not None:
            source = proposer.source(output.tokens, bonus=needs_bonus)
        count = min(controller.next(source), left - 1) if source is not None else 0
        if proposer is not None and (count > 0 or needs_bonus):
            unread = proposer.startup_tokens if source is MODEL else 0
            if unread and (needs_bonus or controller.may_start(unread, startup_seconds, left)):
                proposer.prepare()
                stats.startup_seconds += time.perf_counter() - start
                controller.started(unread, time.perf_counter() - start)
                start = time.perf_counter()
            proposal = proposer.propose(output.tokens, max(count, 1), drawing, bonus=needs_bonus and count > 0)
        drafted = time.perf_counter()
        emitted, accepted, own = _verify_round(
            target, output.tokens[-1], proposal, count, settings, drawing, needs_bonus
        )
        verified = time.perf_counter()
        used = 0 if proposal is None else min(count, len(proposal.tokens))
        late = 0.0 if proposal is None else proposal.catch_up_seconds
        controller.observe(used, accepted, drafted - start - late, verified - drafted, late, source or MODEL)
        stats.schedule.append(used)
        stats.candidates += used
        stats.accepted += accepted
        stats.from_target += own
        stats.draft_seconds += drafted - start
        stats.verify_seconds += verified - drafted


def _inside(target: CachedModel, proposer: Proposer | None) -> float:
    """Seconds inside forward passes so far."""
    return target.forward_seconds + (proposer.forward_seconds if proposer is not None else 0.0)


def _verify_round(
    target: CachedModel,
    last: int,
    proposal: Proposal | None,
    count: int,
    settings: RapidSettings,
    drawing: Drawing,
    needs_bonus: bool,
) -> tuple[list[int], int, int]:
    """Feed the last token and the candidates; the tokens to emit, how many were accepted, how many came from p."""
    before = target.length
    if proposal is None or count == 0:
        logits = target.feed([last])
        if needs_bonus and proposal is not None:  # augmented sampling needs the drafter at every position
            q = proposal.probabilities[0].to(logits.device)
            hat = augmented_target(
                drawing_logits(logits[0], drawing), q, settings.strength, settings.temperature, settings.tail
            )
            return [int(drawing.draw(hat))], 0, 0
        return [int(drawing.draw(drawing.distribution(logits[0])))], 0, 1
    device = target.lm.device
    candidates = proposal.tokens.to(device)
    count = len(candidates)
    logits = target.feed(torch.cat([torch.tensor([last], device=device), candidates]))
    limited = drawing_logits(logits, drawing)
    p = drawing.distribution(logits)
    q = proposal.probabilities.to(device)
    learns = torch.tensor([*proposal.from_model, *([True] if len(q) > count else [])], device=device)
    # Where no model stands behind a candidate η is 0: the target would copy a one-hot distribution blindly.
    strength = torch.where(learns, settings.strength if settings.transfer != "none" else 0.0, 0.0)[:, None]
    hat = augmented_target(limited[: len(q)], q, strength, settings.temperature, settings.tail)
    bonus = hat[count] if len(q) > count else None
    if drawing.temperature == 0:
        accepted, following = accept_greedy(p, hat[:count], candidates, bonus)
    else:
        accepted, following = accept(p, q[:count], hat[:count], candidates, settings.transfer, bonus, drawing.generator)
    kept, token = torch.stack([accepted, following]).tolist()  # the round's one wait for the device
    target.rollback_to(before + 1 + kept)
    return [*candidates[:kept].tolist(), token], kept, int(kept == count and bonus is None)


def drawing_logits(logits: Tensor, drawing: Drawing) -> Tensor:  # [..., vocabulary]
    """Logits with -inf where top-k or top-p rule a token out, on the unscaled scale that ``augmented_target`` takes."""
    if drawing.top_k == 0 and drawing.top_p == 1:
        return logits.float()
    allowed = drawing.distribution(logits) > 0
    return logits.float().masked_fill(~allowed, float("-inf"))


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class _Output:
    """Tokens and text as they are certain; decides when to end."""

    def __init__(self, decoder: IncrementalDecoder, stop: StopStrings, end_tokens: frozenset[int], limit: int) -> None:
        self._decoder, self._stop, self._end, self._limit = decoder, stop, end_tokens, limit
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._shown = 0  # characters that were yielded
        self._until: int | None = None  # where the text ends, once a stop string was found

    def add(self, tokens: Sequence[int]) -> str:
        for token in tokens:
            self.tokens.append(token)
            if token in self._end:
                self.finish = "stop"
                break
            known = len(self._decoder.text)
            self._decoder.add(token)
            self._until = self._stop.find(self._decoder.text, known)
            if self._until is not None:
                self.finish = "stop"
                break
            if len(self.tokens) == self._limit:
                self.finish = "length"
                break
        return self._take(
            len(self._decoder.text) - self._stop.held_back(self._decoder.text) if self.finish is None else self._shown
        )

    def rest(self) -> str:
        """What is left to show at the end."""
        if self._until is None:
            self._decoder.flush()
        return self._take(len(self._decoder.text) if self._until is None else self._until)

    def _take(self, end: int) -> str:
        piece = self._decoder.text[self._shown : max(end, self._shown)]
        self._shown += len(piece)
        return piece
