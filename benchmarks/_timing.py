"""What the benchmarks share: the time spent inside model forwards, and a few statistics."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from statistics import median

import torch
import transformers
from torch import nn


@dataclass
class Forwards:
    """Every forward pass of a model while attached: seconds and tokens."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def attach(self, model: nn.Module) -> Forwards:
        def before(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.tokens.append(ids.numel())
            self._start = time.perf_counter()

        def after(module, args, kwargs, output):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self._start)

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True)
        return self

    def take(self) -> tuple[list[float], list[int]]:
        taken = self.seconds, self.tokens
        self.seconds, self.tokens = [], []
        return taken


def machine() -> str:
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


__all__ = ["Forwards", "machine", "median"]
