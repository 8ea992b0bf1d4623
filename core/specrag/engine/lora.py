"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) that are merged into a model's weights: W + (α / r) B A.

The format is peft's (``adapter_config.json``, ``adapter_model.safetensors``); peft itself is not needed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from torch import nn

from specrag._files import path_of
from specrag.engine.tensor_files import load_checked
from specrag.errors import InvalidInputError, ModelNotFoundError

_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight$")


def merge_lora(model: nn.Module, folder: str | Path) -> None:
    """Add the adapter in ``folder`` to the weights of ``model`` in place. Raises what ``read_lora`` raises."""
    with torch.no_grad():
        for weight, delta in read_lora(model, folder):
            weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))


def adapter_files(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config of the adapter in ``folder``, and its tensors by name.

    Raises:
        ModelNotFoundError: There is no adapter, or it cannot be read.
        InvalidInputError: Its config is no mapping, or its weights hold numbers that are not finite.
    """
    folder = path_of(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors, _ = load_checked(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"no LoRA adapter could be read from {folder}: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInputError(f"the adapter in {folder} is damaged: adapter_config.json needs r and lora_alpha")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidInputError(f"the adapter in {folder} is damaged: {name} holds numbers that are not finite")
    return config, tensors


def _positive(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def read_lora(model: nn.Module, folder: str | Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weights of ``model`` that the adapter in ``folder`` changes, each with what must be added. All are checked.

    Raises:
        ModelNotFoundError: There is no adapter, or it cannot be read.
        InvalidInputError: It is damaged, was made for another model, or is more than a plain LoRA.
    """
    config, tensors = adapter_files(folder)
    unsupported = [
        name for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        raise InvalidInputError(
            f"the adapter in {folder} is no plain LoRA ({', '.join(unsupported) or config.get('peft_type')}): "
            "merge it with peft and give the merged model"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _positive(rank) or not _positive(alpha):
        raise InvalidInputError(
            f"the adapter in {folder} is damaged: adapter_config.json needs r and lora_alpha, numbers above 0"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise InvalidInputError(f"the adapter in {folder} has a tensor that is no LoRA factor: {key}")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    modules = dict(model.named_modules())
    updates: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, pair in factors.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or set(pair) != {"A", "B"} or not pair["A"].ndim == pair["B"].ndim == 2:
            raise InvalidInputError(f"the adapter in {folder} was made for another model: it changes {name}")
        expected = (pair["B"].shape[0], pair["A"].shape[1])
        if config.get("fan_in_fan_out"):
            expected = expected[::-1]
        if tuple(weight.shape) != expected:
            raise InvalidInputError(
                f"the adapter in {folder} was made for another model: {name} is {tuple(weight.shape)} here, "
                f"{expected} in the adapter"
            )
        if pair["B"].shape[1] != pair["A"].shape[0]:
            raise InvalidInputError(f"the adapter in {folder} is damaged: the two factors of {name} differ in rank")
        delta = scale * pair["B"].float() @ pair["A"].float()
        updates.append((weight, delta.T if config.get("fan_in_fan_out") else delta))
    return updates
