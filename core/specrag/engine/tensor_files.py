"""Safetensors files with a checksum of what they hold: a flipped bit in a weight would make another answer in silence.

Other programs read these files as any other, and files without a checksum are read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_DIGEST = "specrag_sha256"


def save_checked(tensors: Mapping[str, Tensor], file: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts about them, with a checksum of both."""
    facts = {"format": "pt", **(facts or {})}
    save_file(dict(tensors), file, metadata={**facts, _DIGEST: digest(tensors, facts)})


def load_checked(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the texts about them.

    Raises:
        OSError, SafetensorError: It cannot be read.
        ValueError: It has a checksum, and its content has changed.
    """
    with safe_open(file, "pt", device="cpu") as data:
        facts = dict(data.metadata() or {})
        tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118 - it is no mapping
    expected = facts.pop(_DIGEST, None)
    if expected is not None and expected != digest(tensors, facts):
        raise ValueError("its content has changed since it was written")
    return tensors, facts


def digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """The SHA-256 of tensors, with their names, shapes and types, and of texts about them."""
    found = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
