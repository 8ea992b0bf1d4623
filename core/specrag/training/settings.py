"""How a drafter is trained, validated before anything loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError


def check_learning_rate(rate: float | None) -> None:
    """Whether the optimiser can use ``rate``.

    Raises:
        InvalidInputError: It is not a positive, finite number.
    """
    check_numbers(learning_rate=rate)
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidInputError(f"learning_rate must be a positive number, got {rate}")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a drafter is trained.

    Args:
        method: ``"lora"`` or ``"full"`` (all weights).
        rank, alpha: Of the LoRA. The update is scaled by alpha / rank.
        learning_rate: The peak; by default 5e-4 for LoRA and 1e-4 for full fine-tuning. It is reached after the share
            ``warmup`` of the steps and then falls to 0 as a cosine.
        batch_size: Examples per step of the optimiser.
        micro_batch_size: Examples in memory at once; gradients accumulate up to ``batch_size``.
        max_tokens: Longer examples are left out.
        checkpoint_steps: Steps between checkpoints. A killed run loses at most this many.
        evaluation_steps: Steps between evaluations on the held part; 0 evaluates at the end only.
        precision: ``"auto"`` computes in bfloat16 where the hardware multiplies it, with float32 weights.

    Raises:
        InvalidInputError: A value is out of range.
    """

    method: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: int = 64
    learning_rate: float | None = None
    warmup: float = 0.05
    batch_size: int = 8
    micro_batch_size: int = 8
    max_tokens: int = 1024
    checkpoint_steps: int = 50
    evaluation_steps: int = 0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        if self.method not in ("lora", "full"):
            raise InvalidInputError(f"method must be 'lora' or 'full', got {self.method!r}")
        for name in ("rank", "alpha", "batch_size", "micro_batch_size", "max_tokens", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise InvalidInputError(
                f"batch_size must be a multiple of micro_batch_size, got {self.batch_size} and {self.micro_batch_size}"
            )

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (5e-4 if self.method == "lora" else 1e-4)
