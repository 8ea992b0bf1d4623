"""Fast linear layers for a few rows at a time on x86 CPUs. The results differ from torch's in the order of sums only.

Decoding multiplies each weight matrix with one row, drafting and verification with five to ten. torch gives such
products to MKL, which takes up to four times as long as oneDNN (``benchmarks/linear.py``). oneDNN's product is what
torch's own compiler emits for the CPU. It is faster still over weights in oneDNN's blocked layout. Weights in
bfloat16 have half the bytes to read; they gain from the layout only, and only where the CPU multiplies bfloat16.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from specrag.engine.blocks import BlockLinear, unpack_blocks

# Private to torch; without them no layer is replaced.
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_pack: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)

# oneDNN makes and keeps a kernel for every number of rows (0.6 MB each). Above this number it is rounded up.
_EXACT_ROWS, _ROUNDED_TO, _MOST_ROWS = 16, 32, 512


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [..., in] -> [..., out]
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count <= _EXACT_ROWS or (count <= _MOST_ROWS and count % _ROUNDED_TO == 0):
        return _product(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    made = []
    for part in rows.split(_MOST_ROWS):
        padded = nn.functional.pad(part, (0, 0, 0, -len(part) % _ROUNDED_TO))
        made.append(_product(padded, weight, bias, "none", [], "")[: len(part)])
    return (torch.cat(made) if len(made) > 1 else made[0]).view(*x.shape[:-1], -1)


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN where no gradient is needed. Its parameters are the plain layer's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        plain = x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu"
        if plain or torch.is_grad_enabled():
            return super().forward(x)
        return _multiply(x, weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer whose weights exist in oneDNN's blocked layout only. For inference on the CPU."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = _pack(linear.weight.detach())  # opaque: no parameter, no buffer
        self.bias = linear.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed"

    def forward(self, x: Tensor) -> Tensor:
        return _multiply(x.detach(), self.packed, self.bias)

    def unpacked(self) -> nn.Linear:
        """The plain layer again."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.packed.to_dense())
        linear.bias = self.bias  # type: ignore[assignment]
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed.to_dense()


def product(
    layer: nn.Module, x: Tensor, *, silu: bool = False, add: Tensor | None = None, times: Tensor | None = None
) -> Tensor:  # [..., in] -> [..., out]
    """``layer(x)``, with SiLU, plus ``add`` or times ``times`` (one of the two).

    Where oneDNN can, it takes one pass over the output.
    """
    few = x.shape[:-1].numel() <= _EXACT_ROWS and not torch.is_grad_enabled()
    weight: Any = None
    if few and type(layer) is PackedLinear:
        weight = layer.packed
    elif few and type(layer) is OneDNNLinear and layer.weight.dtype == torch.float32 and layer.weight.is_cpu:
        weight = layer.weight
    if weight is None or weight.dtype != x.dtype:
        out: Tensor = layer(x)
        out = nn.functional.silu(out) if silu else out
        return out + add if add is not None else out * times if times is not None else out
    bias: Any = layer.bias
    if add is None and times is None:
        return _product(x, weight, bias, "swish" if silu else "none", [], "")  # type: ignore[no-any-return]
    other = times if add is None else add
    return _product.binary(x, other, weight, bias, "mul" if add is None else "add")  # type: ignore[no-any-return]


def available() -> bool:
    """Whether this machine and this torch have the product."""
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return capable and _product is not None and _pack is not None


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and _cpu_multiplies_bfloat16()


@cache
def _cpu_multiplies_bfloat16() -> bool:
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(asked() for asked in known if asked is not None)


def multiplies(weight: Tensor) -> bool:
    """Whether this module multiplies weights of this type on this device."""
    if not weight.is_cpu:
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _cpu_multiplies_bfloat16())


def use_onednn(model: nn.Module, *, pack: bool = False) -> None:
    """Make every plain linear layer of ``model`` multiply with oneDNN, in place, where oneDNN is available.

    That is for float32, and with ``pack`` for bfloat16. Weights of other types or on other devices stay as they are.

    Args:
        model: Changed in place.
        pack: Convert the weights that no other module shares to oneDNN's layout too. ``unpack`` undoes it, which
            training and other devices need first.
    """
    if not available():
        return
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    packed = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or type(child) not in (nn.Linear, OneDNNLinear):
                continue
            if not multiplies(child.weight):
                continue
            if pack and uses[id(child.weight)] == 1:
                setattr(parent, name, PackedLinear(child))
                packed = True
            elif child.weight.dtype == torch.float32:
                child.__class__ = OneDNNLinear
    if packed:  # a parameter that is a view of the checkpoint file would keep the whole file mapped
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def unpack(model: nn.Module) -> None:
    """Plain layers again: undo ``use_onednn``, and ``specrag.engine.blocks.use_blocks``."""
    if any(isinstance(module, BlockLinear) for module in model.modules()):
        unpack_blocks(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                setattr(parent, name, child.unpacked())
            elif type(child) is OneDNNLinear:
                child.__class__ = nn.Linear  # type: ignore[assignment]
