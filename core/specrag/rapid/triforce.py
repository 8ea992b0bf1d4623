"""Speculation in two levels (TriForce; Sun et al., arXiv 2404.11912)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specrag.errors import InvalidInputError
from specrag.rapid.acceptance import accept, accept_greedy
from specrag.rapid.drawing import Drawing
from specrag.rapid.proposers import ModelProposer, Proposal, Proposer

# Candidates of the lower level's rounds. They cost little, and seldom are more accepted.
_LOWER_CANDIDATES = 3


class TriForceProposer(Proposer):
    """A small drafter proposes to a middle model, and what that makes of it are the candidates for the target.

    The lower level is lossless speculative decoding: each candidate is drawn from the distribution of the middle model,
    whatever the small one proposes. So the upper level, which verifies these candidates, is exact too.

    Args:
        middle: The target on its own keys and values of a part of the context.
        small: A drafter that sees the beginning and the end of the context.
        candidates: What ``small`` proposes at once, at most.

    Raises:
        InvalidInputError: ``candidates`` is less than 1.
    """

    def __init__(self, middle: ModelProposer, small: ModelProposer, *, candidates: int = _LOWER_CANDIDATES) -> None:
        if candidates < 1:
            raise InvalidInputError(f"the small drafter must propose at least 1 candidate, got {candidates}")
        self.middle, self.small, self._candidates = middle, small, candidates

    @property
    def startup_tokens(self) -> int:
        return self.middle.startup_tokens + self.small.startup_tokens

    def prepare(self) -> None:
        self.middle.prepare()
        self.small.prepare()

    @property
    def forward_seconds(self) -> float:
        return self.middle.forward_seconds + self.small.forward_seconds

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        if self.startup_tokens:
            return None
        made: list[int] = []
        rows: list[Tensor] = []
        caught_up = 0.0
        while len(made) < count:
            known = [*generated, *made]
            proposed = min(self._candidates, count - len(made) - 1)  # a round adds one token more than it accepts
            lower = self.small.propose_path(known, proposed, drawing) if proposed else None
            candidates = [] if lower is None else lower.tokens.tolist()
            logits, late = self.middle.read(known, candidates)
            q = drawing.distribution(logits)
            made_now = _verified(q, lower, drawing)
            made += made_now
            rows.append(q[: len(made_now)])
            caught_up += late + (0.0 if lower is None else lower.catch_up_seconds)
        if bonus:
            logits, late = self.middle.read([*generated, *made])
            rows.append(drawing.distribution(logits))
            caught_up += late
        q = torch.cat(rows)
        return Proposal(torch.tensor(made, device=q.device), q, (True,) * count, caught_up)


def _verified(
    p: Tensor,  # [candidates + 1, vocabulary], the middle model
    lower: Proposal | None,
    drawing: Drawing,
) -> list[int]:
    """The accepted candidates and the token after them. They are distributed as p."""
    if lower is None:
        return [int(drawing.draw(p[0]))]
    candidates, below = lower.tokens.to(p.device), lower.probabilities.to(p.device)
    if drawing.sampling.greedy:
        accepted, following = accept_greedy(p, p[:-1], candidates)
    else:
        accepted, following = accept(p, below, p[:-1], candidates, "none", generator=drawing.generator)
    kept, token = torch.stack([accepted, following]).tolist()
    return [*lower.tokens[:kept].tolist(), token]
