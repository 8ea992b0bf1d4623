"""The decoding loop: draft, verify in one forward pass, accept, roll back (Chen et al., arXiv 2502.20330, section 3).

``_Rounds.next`` is one round. The mathematics is in ``acceptance``, the caches are in ``cached_model``, candidates come
from ``proposers``, γ from ``draft_length``, and ``output`` turns tokens into text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specrag.engine.trees import chain
from specrag.models.base import Sampling
from specrag.rapid.acceptance import KnowledgeTransfer, accept, accept_greedy, augmented_target
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.draft_length import MODEL, DraftLength, Round, Source
from specrag.rapid.draft_tree import DraftTree, walk
from specrag.rapid.drawing import Drawing
from specrag.rapid.output import Limits, Output
from specrag.rapid.proposers import Proposal, Proposer


@dataclass(frozen=True)
class TracedRound:
    """One round of decoding, in tokens.

    Attributes:
        candidates: What was proposed. Of a tree, the path that was taken and the first path below it.
        accepted: How many of them were kept, from the left.
        following: The token that the round added after them.
    """

    candidates: tuple[int, ...]
    accepted: int
    following: int


@dataclass
class RapidStats:
    """What a generation did. All times are in seconds.

    Attributes:
        schedule: γ per round; of a tree, its longest path. Give it back as ``candidates`` to repeat the run.
        prompt_tokens: Tokens of context and question.
        tokens: Tokens of the answer.
        candidates: Candidates that were verified; of a tree, those of its longest path.
        accepted: Candidates that were accepted.
        tree_tokens: Candidates of trees that were verified, on all paths.
        from_target: Tokens drawn from p itself: bonus tokens and steps without candidates.
        prefill_seconds: Reading the question.
        startup_seconds: The drafter's own prefill. It is part of ``decode_seconds``.
        draft_seconds: Drafting, with the reading of tokens that were generated without the drafter.
        verify_seconds: The target's forward passes after the prefill, and the acceptance.
        decode_seconds: From the end of the prefill to the end, without the caller's time between two pieces.
        forward_seconds: Inside the models' forward passes. It is part of ``decode_seconds``.
        first_token_seconds: From the call to the first token's logits.
        finish: ``"stop"``, ``"length"`` or ``"cancelled"``.
        notes: What else a user should know, in words.
        trace: Give an empty list to have every round written down, the first token as a round of its own. ``None``
            (the default): no trace.
    """

    schedule: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    candidates: int = 0
    accepted: int = 0
    tree_tokens: int = 0
    from_target: int = 0
    prefill_seconds: float = 0.0
    startup_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0
    first_token_seconds: float = 0.0
    finish: str = "length"
    notes: list[str] = field(default_factory=list)
    trace: list[TracedRound] | None = None

    @property
    def acceptance(self) -> float:
        """Share of the candidates that were accepted."""
        return self.accepted / self.candidates if self.candidates else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding. The prefill is not counted."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a framework's metadata, without the trace."""
        plain = asdict(replace(self, trace=None))
        del plain["trace"]
        return {**plain, "acceptance": self.acceptance, "tokens_per_second": self.tokens_per_second}


def decode(
    target: CachedModel,
    first_logits: Tensor,  # [vocabulary], after the prompt that the target's cache holds
    proposer: Proposer | None,
    transfer: KnowledgeTransfer,
    sampling: Sampling,
    length: DraftLength,
    limits: Limits,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    stats: RapidStats | None = None,
    startup_seconds: float = 0.0,
    exact: bool = False,
) -> Iterator[str]:
    """Generate text, piece by piece, as soon as it is certain: no incomplete characters, no part of a stop string.

    Args:
        target: With the prompt in its cache.
        first_logits: The logits after the prompt.
        proposer: Where candidates come from; ``None``: plain decoding.
        transfer: How the target learns from the drafter.
        sampling: Of target and drafter alike.
        length: Chooses γ.
        limits: What ends the text. ``max_tokens`` is exact, unless the text ends before, also inside an accepted run.
        cancelled: Asked between rounds.
        stats: Filled in on the way.
        startup_seconds: An estimate of the seconds per token of the proposer's own prompt.
        exact: At temperature 0, verification repeats single steps. A target that cannot do so decodes alone.
    """
    stats = stats if stats is not None else RapidStats()
    drawing, output = Drawing(sampling, target.lm.device), Output(target.lm.tokenizer, limits)
    rounds = _Rounds(target, proposer, transfer, drawing, length, stats, startup_seconds, exact)
    began, forwards = time.perf_counter(), rounds.forward_seconds

    emitted = [int(drawing.draw(drawing.distribution(first_logits)))]
    stats.from_target += 1
    if stats.trace is not None:
        stats.trace.append(TracedRound((), 0, emitted[0]))
    while True:
        piece = output.add(emitted)
        stats.tokens = len(output.tokens)
        stats.decode_seconds = time.perf_counter() - began
        stats.forward_seconds = rounds.forward_seconds - forwards
        if piece:
            paused = time.perf_counter()
            yield piece
            began += time.perf_counter() - paused  # the caller's time is not decoding
        if output.finish is None and cancelled():
            output.finish = "cancelled"
        if output.finish is not None:
            stats.finish = output.finish
            length.finished(len(output.tokens))
            last = output.rest()
            if last:
                yield last
            return
        emitted = rounds.next(output.tokens, limits.max_tokens - len(output.tokens))


class _Verified(NamedTuple):
    """The result of a round."""

    emitted: list[int]
    accepted: int
    from_target: int  # how many of the emitted tokens were drawn from p itself
    candidates: list[int]  # see ``TracedRound``
    width: int = 1  # this and the next: see ``Round``
    sibling: int = 0


class _Rounds:
    """The rounds of one generation."""

    def __init__(
        self,
        target: CachedModel,
        proposer: Proposer | None,
        transfer: KnowledgeTransfer,
        drawing: Drawing,
        length: DraftLength,
        stats: RapidStats,
        startup_seconds: float,
        exact: bool,
    ) -> None:
        self._exact = exact and drawing.sampling.greedy  # above temperature 0 the text is random anyway
        if self._exact and proposer is not None and not target.repeats_single_steps:
            stats.notes.append("exact: this target cannot verify several tokens as single steps do: it decodes alone")
            proposer = None
        self._target, self._proposer, self._transfer = target, proposer, transfer
        self._drawing, self._length, self._stats = drawing, length, stats
        self._startup_seconds = startup_seconds
        # Sampling from p̂ needs q at every position, the bonus position included.
        self._needs_bonus = transfer.mode == "augmented" and proposer is not None and proposer.from_model

    @property
    def forward_seconds(self) -> float:
        """Seconds inside forward passes so far."""
        return self._target.forward_seconds + (self._proposer.forward_seconds if self._proposer is not None else 0.0)

    def next(self, generated: Sequence[int], left: int) -> list[int]:
        """One round: the tokens that it adds to ``generated``, of which ``left`` more are allowed."""
        start = time.perf_counter()
        source = None
        if self._proposer is not None:
            source = self._proposer.source(generated, bonus=self._needs_bonus)
        count = min(self._length.next(source), left - 1) if source is not None else 0
        if self._proposer is not None and self._length.width is not None:
            self._proposer.widen(self._length.width)
        if self._started(source, count, left):
            start = time.perf_counter()
        proposal = self._draft(generated, count)
        drafted = time.perf_counter()
        if proposal is None or count == 0:
            made, used = self._plain_step(generated[-1], proposal), 0
        else:
            made, used = self._verify(generated[-1], proposal), proposal.depth
        verified = time.perf_counter()
        late = 0.0 if proposal is None else proposal.catch_up_seconds
        seconds = (drafted - start - late, verified - drafted, late)
        self._length.observe(Round(used, made.accepted, *seconds, source or MODEL, made.width, made.sibling))
        self._count(used, made, drafted - start, verified - drafted)
        return made.emitted

    def _started(self, source: Source | None, count: int, left: int) -> bool:
        """Let the drafter read its own prompt, where it has not and that is worth its time. Whether it did."""
        if self._proposer is None or source is not MODEL or not (count > 0 or self._needs_bonus):
            return False
        unread = self._proposer.startup_tokens
        if not unread:
            return False
        if not (self._needs_bonus or self._length.may_start(unread, self._startup_seconds, left)):
            return False
        start = time.perf_counter()
        self._proposer.prepare()
        self._stats.startup_seconds += time.perf_counter() - start
        self._length.started(unread, time.perf_counter() - start)
        return True

    def _draft(self, generated: Sequence[int], count: int) -> Proposal | DraftTree | None:
        if self._proposer is None or not (count > 0 or self._needs_bonus):
            return None
        bonus = self._needs_bonus and count > 0
        return self._proposer.propose(generated, max(count, 1), self._drawing, bonus=bonus)

    def _plain_step(self, last: int, proposal: Proposal | DraftTree | None) -> _Verified:
        """Feed the last token and draw the next, from p, or from p̂ where there is a proposal."""
        logits = self._target.feed([last])[0]
        drawing, transfer = self._drawing, self._transfer
        if not isinstance(proposal, Proposal):
            return _Verified([int(drawing.draw(drawing.distribution(logits)))], 0, 1, [])
        q = proposal.probabilities[0].to(logits.device)
        hat = augmented_target(
            drawing.allowed(logits), q, transfer.strength, drawing.sampling.temperature, transfer.tail
        )
        return _Verified([int(drawing.draw(hat))], 0, 0, [])

    def _verify(self, last: int, proposal: Proposal | DraftTree) -> _Verified:
        """Feed the last token and the candidates in one pass, accept from the left, and roll back the rest."""
        if isinstance(proposal, DraftTree):
            return self._verify_tree(last, proposal)
        target, drawing, transfer = self._target, self._drawing, self._transfer
        device, before = target.lm.device, target.length
        candidates = proposal.tokens.to(device)
        count = len(candidates)
        if self._exact:
            logits = target.feed_tree([last, *candidates.tolist()], chain(count + 1), exact=True)
        else:
            logits = target.feed(torch.cat([torch.tensor([last], device=device), candidates]))
        # p, the target [γ + 1, vocabulary]; q, the drafter [γ, vocabulary], with one more row where the bonus token
        # needs it; hat, the augmented target p̂, where q is known.
        p, q = drawing.distribution(logits), proposal.probabilities.to(device)
        # Where no model stands behind a candidate η is 0: with a one-hot q the target would copy it blindly.
        learns = torch.tensor([*proposal.from_model, *([True] if len(q) > count else [])], device=device)
        strength = torch.where(learns, transfer.strength if transfer.mode != "none" else 0.0, 0.0)[:, None]
        hat = augmented_target(
            drawing.allowed(logits)[: len(q)], q, strength, drawing.sampling.temperature, transfer.tail
        )
        bonus = hat[count] if len(q) > count else None
        if drawing.sampling.greedy:
            accepted, following = accept_greedy(p, hat[:count], candidates, bonus)
        else:
            accepted, following = accept(p, q[:count], hat[:count], candidates, transfer.mode, bonus, drawing.generator)
        kept, token = torch.stack([accepted, following]).tolist()  # the round's one wait for the device
        target.rollback_to(before + 1 + kept)
        proposed = candidates.tolist()
        return _Verified([*proposed[:kept], token], kept, int(kept == count and bonus is None), proposed)

    def _verify_tree(self, last: int, tree: DraftTree) -> _Verified:
        """The same for a tree: walk down its branches, and keep the path that was taken."""
        target, before = self._target, self._target.length
        tokens = [last, *tree.tokens]
        logits = target.feed_tree(tokens, tree.shape, exact=self._exact)
        found = walk(tree, logits, self._drawing)
        target.keep_path(before, found.rows)
        self._stats.tree_tokens += len(tree.tokens)
        taken = [tokens[row] for row in found.rows[1:]]
        rest = [tokens[row] for row in tree.longest_from(found.rows[-1])]
        made = _Verified([*taken, found.following], len(taken), int(found.from_target), [*taken, *rest])
        if tree.probabilities is None:  # of copied trees a branch is as long as another
            return made
        return made._replace(width=tree.width, sibling=tree.sibling(found.rows[-1]))

    def _count(self, used: int, made: _Verified, draft_seconds: float, verify_seconds: float) -> None:
        stats = self._stats
        if stats.trace is not None:
            stats.trace.append(TracedRound(tuple(made.candidates), made.accepted, made.emitted[-1]))
        stats.schedule.append(used)
        stats.candidates += used
        stats.accepted += made.accepted
        stats.from_target += made.from_target
        stats.draft_seconds += draft_seconds
        stats.verify_seconds += verify_seconds
