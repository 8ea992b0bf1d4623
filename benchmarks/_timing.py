"""What the benchmarks share: the time spent inside model forwards, and a few statistics."""

from __future__ import annotations

import functools
import platform
import time
from dataclasses import dataclass, field
from statistics import median

import torch
import transformers
from torch import nn

from specrag.engine import forward


@dataclass
class Forwards:
    """Every forward pass of a model while attached: seconds and tokens."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def attach(self, model: nn.Module) -> Forwards:
        """By the class, as hooks on a model keep it from our own forward pass; which is watched too."""

        def watched(forward):
            @functools.wraps(forward)
            def timed(own, *args, **kwargs):
                if own is not model:
                    return forward(own, *args, **kwargs)
                start = time.perf_counter()
                out = forward(own, *args, **kwargs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds.append(time.perf_counter() - start)
                self.tokens.append((args[0] if args else kwargs["input_ids"]).numel())
                return out

            return timed

        type(model).forward = watched(type(model).forward)
        forward.decoder_forward = watched(forward.decoder_forward)
        return self

    def take(self) -> tuple[list[float], list[int]]:
        taken = self.seconds, self.tokens
        self.seconds, self.tokens = [], []
        return taken


def machine() -> str:
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


__all__ = ["Forwards", "machine", "median"]
