"""Linear layers whose product of a few rows is bound by reading the weights, as it should be, on x86 CPUs.

Decoding multiplies each weight matrix with one row, verification with about ten. torch hands float32 products to MKL, which takes
1.5 times as long as oneDNN for one row and twice as long for eleven, and reads the weights at a fraction of the memory's speed
(``benchmarks/linear.py``; AMD EPYC). oneDNN's product is what torch's own compiler emits for the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# torch's private; without it nothing is replaced.
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN wherever no gradient is asked for. Same parameters, nothing copied."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            x.dtype != torch.float32
            or weight.dtype != torch.float32
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
        ):
            return super().forward(x)
        assert _product is not None
        return _product(x, weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def available() -> bool:
    """Whether this machine and this torch have the product."""
    return (
        _product is not None
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


def use_onednn(model: nn.Module) -> None:
    """Make every plain linear layer of ``model`` a ``OneDNNLinear``, in place, where that is available."""
    if not available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
