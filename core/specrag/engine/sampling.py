"""From logits to the distribution that tokens are drawn from, as pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def to_probabilities(
    logits: Tensor,  # [..., vocab]
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:  # [..., vocab], float32
    """softmax(logits / temperature) over the tokens that top-k and top-p keep.

    Top-k comes first. Then top-p keeps the fewest likeliest tokens whose probabilities sum to ``top_p`` or more.
    A ``temperature`` of 0 is read as 1: greedy decoding takes the argmax, which no temperature moves.
    """
    return torch.softmax(restrict(logits.float() / (temperature or 1.0), top_k, top_p), dim=-1)


def restrict(
    logits: Tensor,  # [..., vocab]
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:  # [..., vocab]
    """``logits`` with -inf wherever top-k or top-p rules a token out."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ruled_out = (mass_before >= top_p).scatter(-1, order, mass_before >= top_p)
        logits = logits.masked_fill(ruled_out, float("-inf"))
    return logits


def draw(
    probabilities: Tensor,  # [rows, vocab], each row sums to a positive number
    generator: torch.Generator | None = None,
) -> Tensor:  # [rows]
    """One token per row."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
