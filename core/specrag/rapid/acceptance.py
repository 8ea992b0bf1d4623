"""RAPID's acceptance rule as pure functions on tensors (Chen et al., arXiv 2502.20330, section 3).

Words:

- candidate: a token that the drafter proposes, drawn from the drafter's distribution q.
- target: the model that answers. Its distribution at the same position is p.
- augmented target: the target after one step of learning from the drafter, p̂. Without transfer p̂ = p.
- accepted token: a candidate that is kept. That happens with probability min(1, p̂(x) / q(x)).
- recovered token: the token that replaces a rejected candidate. It is drawn from the residual.
- bonus token: one more token, drawn from p when every candidate of a round was accepted.

Letters: z are the target's logits, T the temperature, p = softmax(z / T), η the transfer strength, γ the number of
candidates in a round.

Example, without transfer: p = (0.5, 0.5) and q = (0.8, 0.2). Candidate 0 is accepted with probability 0.5 / 0.8,
candidate 1 always. The residual max(p - q, 0) holds token 1 only, so a rejected 0 becomes 1. Token 0 is emitted with
probability 0.8 · 0.5 / 0.8 = 0.5, which is p.

All functions take any number of leading dimensions and compute in float32 whatever the model's dtype. None of them
waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from specrag.errors import InvalidInputError

Transfer = Literal["none", "rapid", "augmented"]
Tail = Literal["drafter", "target", "none"]
TRANSFERS: tuple[Transfer, ...] = get_args(Transfer)
TAILS: tuple[Tail, ...] = get_args(Tail)

# Tokens below this share of the likeliest token's probability are the tail, which transfer leaves alone (paper: 0.1).
TAIL_SHARE = 0.1


@dataclass(frozen=True)
class KnowledgeTransfer:
    """How the target learns from the drafter.

    Args:
        mode: What is sampled. See ``residual`` and ``output_distribution``.
        strength: η, 0 or more.
        tail: Which tokens the shift leaves alone. See ``augmented_target``.

    Raises:
        InvalidInputError: A value is out of range.
    """

    mode: Transfer = "rapid"
    strength: float = 10.0
    tail: Tail = "drafter"

    def __post_init__(self) -> None:
        if self.mode not in TRANSFERS:
            raise InvalidInputError(f"transfer must be one of {', '.join(TRANSFERS)}; got {self.mode!r}")
        if self.tail not in TAILS:
            raise InvalidInputError(f"tail must be one of {', '.join(TAILS)}; got {self.tail!r}")
        if not self.strength >= 0:
            raise InvalidInputError(f"transfer strength must be 0 or more, got {self.strength}")


def augmented_target(
    target_logits: Tensor,  # [..., vocab], z; -inf where top-k or top-p ruled a token out
    drafter_probs: Tensor,  # [..., vocab], q
    strength: float | Tensor,  # η >= 0; a tensor broadcasts, e.g. [..., 1]
    temperature: float = 1.0,  # T; 0 is read as 1
    tail: Tail = "drafter",
) -> Tensor:  # [..., vocab], p̂, float32
    """The target's distribution after one step of learning from the drafter at inference time.

    ẑ = z + ηT(q - p) is the gradient step on the distillation loss (paper, equations 4 and 5), and p̃ = softmax(ẑ / T).
    Then the tail is protected:

    - ``"drafter"`` (the authors' code): the shift is applied only where q >= 0.1 · max q.
    - ``"target"`` (the paper's formula): p̂ = p where p̃ < 0.1 · max p̃, else p̃, divided by the sum. A target token
      that the shift had pushed down gets its mass back, so the effect of η saturates.
    - ``"none"``: p̂ = p̃.

    Raises:
        InvalidInputError: η or T is negative, or ``tail`` is not one of the three.
    """
    if isinstance(strength, int | float) and not strength >= 0:
        raise InvalidInputError(f"transfer strength must be 0 or more, got {strength}")
    if not temperature >= 0:
        raise InvalidInputError(f"temperature must be 0 or more, got {temperature}")
    if tail not in TAILS:
        raise InvalidInputError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}")
    scaled = target_logits.float() / (temperature or 1.0)
    q = drafter_probs.float()
    p = scaled.softmax(-1)
    shift = strength * (q - p)  # of the scaled logits: ηT(q - p) / T
    if tail == "drafter":
        shift = torch.where(q >= TAIL_SHARE * q.amax(-1, keepdim=True), shift, torch.zeros_like(shift))
    learned = (scaled + shift).softmax(-1)
    if tail != "target":
        return learned
    kept = torch.where(learned < TAIL_SHARE * learned.amax(-1, keepdim=True), p, learned)
    return kept / kept.sum(-1, keepdim=True)


def acceptance_probability(
    p_hat: Tensor,  # [..., vocab]
    q: Tensor,  # [..., vocab]
    candidates: Tensor,  # [...], token ids drawn from q
) -> Tensor:  # [...], probabilities
    """min(1, p̂(x) / q(x)), the probability that a candidate is kept (paper, equation 6). It is 0 where q(x) is 0."""
    index = candidates[..., None]
    wanted, offered = p_hat.gather(-1, index)[..., 0], q.gather(-1, index)[..., 0]
    return torch.where(offered > 0, (wanted / offered.clamp(min=1e-38)).clamp(max=1.0), torch.zeros_like(wanted))


def residual(
    p: Tensor,  # [..., vocab]
    q: Tensor,  # [..., vocab]
    p_hat: Tensor,  # [..., vocab]; p itself for transfer "none"
    transfer: Transfer,
) -> Tensor:  # [..., vocab]
    """The distribution of the token that replaces a rejected candidate.

    - ``"none"``: max(p - q, 0), normalised.
    - ``"rapid"``: max(p - p̂, p - q, 0), normalised (paper, equation 7).
    - ``"augmented"``: max(p̂ - q, 0), normalised.

    Where nothing is left, no candidate can be rejected. There p (for ``"augmented"`` p̂) is returned, so that the
    result is a distribution everywhere.

    Raises:
        InvalidInputError: ``transfer`` is not one of the three.
    """
    if transfer == "none":
        goal, left = p, p - q
    elif transfer == "rapid":
        goal, left = p, p - torch.minimum(p_hat, q)
    elif transfer == "augmented":
        goal, left = p_hat, p_hat - q
    else:
        raise InvalidInputError(f"transfer must be one of {', '.join(TRANSFERS)}; got {transfer!r}")
    left = left.clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    return torch.where(mass > 0, left / mass.clamp(min=1e-38), goal)


def output_distribution(
    p: Tensor,  # [..., vocab]
    q: Tensor,  # [..., vocab]
    p_hat: Tensor,  # [..., vocab]
    transfer: Transfer = "rapid",
) -> Tensor:  # [..., vocab]
    """The distribution of the token at a position that had a candidate, in closed form.

    With a = min(q, p̂), it is a + (1 - Σa) · residual. It equals p for ``"none"`` and p̂ for ``"augmented"``. For
    ``"rapid"`` it exceeds p where both q > p and p̂ > p: that surplus is the method's knowledge transfer.
    """
    accepted = torch.minimum(q, p if transfer == "none" else p_hat)
    rejected = (1 - accepted.sum(-1, keepdim=True)).clamp(min=0)
    return accepted + rejected * residual(p, q, p if transfer == "none" else p_hat, transfer)


def accept(
    p: Tensor,  # [γ + 1, vocab], the target after each candidate; the last row is the bonus position
    q: Tensor,  # [γ, vocab]
    p_hat: Tensor,  # [γ, vocab]
    candidates: Tensor,  # [γ]
    transfer: Transfer,
    bonus: Tensor | None = None,  # [vocab], what the bonus token is drawn from; p's last row by default
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # accepted [], next token []
    """Accept candidates from the left until one is rejected, then draw the next token.

    Returns:
        The number of accepted candidates, and the token that follows them: a recovered token after a rejection, the
        bonus token when all γ were accepted.
    """
    hat = p[:-1] if transfer == "none" else p_hat
    draws = torch.rand(len(candidates), generator=generator, device=p.device)
    kept = (draws < acceptance_probability(hat, q, candidates)).long().cumprod(0)
    accepted = kept.sum()
    after = torch.cat([residual(p[:-1], q, hat, transfer), (p[-1] if bonus is None else bonus)[None]])
    following = torch.multinomial(after.index_select(0, accepted[None])[0], 1, generator=generator)[0]
    return accepted, following


def accept_greedy(
    p: Tensor,  # [γ + 1, vocab], or logits: only the order matters
    p_hat: Tensor,  # [γ, vocab]
    candidates: Tensor,  # [γ]
    bonus: Tensor | None = None,  # [vocab]
) -> tuple[Tensor, Tensor]:  # accepted [], next token []
    """``accept`` at temperature 0: a candidate is kept if it is argmax p̂, else argmax p̂ is emitted."""
    best = torch.cat([p_hat.argmax(-1), (p[-1] if bonus is None else bonus).argmax(-1)[None]])
    accepted = (best[:-1] == candidates).long().cumprod(0).sum()
    return accepted, best.index_select(0, accepted[None])[0]
