"""How the tokens of one generation are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from specrag.engine.sampling import to_probabilities
from specrag.models.base import Sampling


class Drawing:
    """How the tokens of one generation are drawn, by target and drafter alike.

    Args:
        sampling: Temperature, top-k, top-p and seed. Without a seed every run differs.
        device: The device of the distributions.
    """

    def __init__(self, sampling: Sampling = Sampling(), device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def distribution(self, logits: Tensor) -> Tensor:  # [..., vocabulary] -> the same, float32
        """The distribution that tokens are drawn from. At temperature 0 it is that at temperature 1."""
        return to_probabilities(logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p)

    def allowed(self, logits: Tensor) -> Tensor:  # [..., vocabulary] -> the same, float32
        """The logits, not divided by the temperature, with -inf where top-k or top-p rules a token out."""
        if self.sampling.top_k == 0 and self.sampling.top_p == 1:
            return logits.float()
        return logits.float().masked_fill(~(self.distribution(logits) > 0), float("-inf"))

    def draw(self, probabilities: Tensor) -> Tensor:  # [vocabulary] -> []
        """One token; the likeliest at temperature 0."""
        if self.sampling.greedy:
            return probabilities.argmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[0]
