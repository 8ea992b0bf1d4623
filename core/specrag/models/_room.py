"""Whether the weights of a model fit into memory, from the names and shapes in its files, before they are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specrag._files import path_of
from specrag.engine.gguf_file import GGUFFile
from specrag.engine.memory import check_room
from specrag.engine.native import library
from specrag.engine.onednn import available, multiplies_bfloat16
from specrag.errors import ModelNotFoundError

_CPU = torch.device("cpu")
# Safetensors' names of types.
_FORMS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Bytes per weight of what weights are rounded to, scales included; embeddings and output layer have 8 bits in both.
_ROUNDED = {"int8": 34 / 32, "int4": 20 / 32}
_INDEX, _SINGLE, _OUTPUT = "model.safetensors.index.json", "model.safetensors", "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "token_embd.weight", _OUTPUT)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file. ``form``: its type; ``None`` for a tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    form: torch.dtype | None


def check_weights_fit(source: str | Path, quantization: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Check that the weights of a folder of safetensors, or of a ``.gguf`` file that is unpacked, fit into memory.

    Weights that have the type ``dtype`` in the file already are mapped, not copied. On the CPU they take memory only
    when they are laid out anew. For another device they take memory only there. Other files (``.bin``, or a hub id that
    is not on this machine yet) say nothing before they are loaded, and are not checked.

    Args:
        source: A folder, a ``.gguf`` file or a hub id.
        quantization: ``None``, ``"int8"`` or ``"int4"``, as ``TransformersLM`` takes it.
        dtype: What the weights are loaded as.
        device: Where they will lie.

    Raises:
        ModelError: They do not fit; with both figures.
    """
    stored = _stored(source)
    if not stored:
        return
    what, name = f"the weights of {source}", str(dtype).removeprefix("torch.")
    loaded = sum(prod(tensor.shape) for tensor in stored) * dtype.itemsize
    copied = sum(prod(tensor.shape) for tensor in stored if tensor.form != dtype) * dtype.itemsize
    if device.type != "cpu":
        check_room(loaded, device, f"{what} ({name})", "take a smaller model, or device_map='auto'")
        advice = f"free some, for the file is converted to {name} on the CPU first"
        check_room(copied, _CPU, f"{what} ({name})", advice)
    elif quantization is None:
        kept = loaded if _laid_out(dtype) else 0
        fewer = "" if dtype.itemsize < torch.float32.itemsize else "dtype=torch.bfloat16, "
        advice = f"take a smaller model, {fewer}or quantization='int8' or 'int4'"
        check_room(max(kept, copied), _CPU, f"{what} ({name})", advice)
    else:
        kept = sum(_rounded(tensor, quantization, dtype) for tensor in stored)
        both = library() is not None  # all weights are rounded before one is dropped
        advice = "take a smaller model" + ("" if quantization == "int4" else ", or quantization='int4'")
        if copied:
            what += f", converted to {name} before they are rounded to {quantization},"
            advice += f"; dtype={stored[0].form or torch.bfloat16} needs no such copy, or a smaller one"
        check_room(kept + copied if both else max(kept, copied), _CPU, what, advice)


def _laid_out(dtype: torch.dtype) -> bool:
    """Whether plain weights on the CPU are copied into a layout of their own."""
    if dtype == torch.float32:
        return available()
    return dtype == torch.bfloat16 and ((available() and multiplies_bfloat16(_CPU)) or library() is not None)


def _rounded(tensor: _Stored, quantization: str, dtype: torch.dtype) -> int:
    """Bytes of a tensor when matrices are rounded."""
    count = prod(tensor.shape)
    if len(tensor.shape) != 2:
        return count * dtype.itemsize
    return int(count * _ROUNDED["int8" if tensor.name.endswith(_EMBEDDINGS) else quantization])


def _stored(source: str | Path) -> list[_Stored]:
    """The tensors in the files of ``source``; none where it cannot be told, or where loading will fail."""
    try:
        local = path_of(source)
        if local.suffix == ".gguf":
            return [_Stored(tensor.name, tensor.shape, None) for tensor in GGUFFile(local).tensors.values()]
        folder = local if local.exists() else _cached(str(source))
        return [] if folder is None else _in_folder(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, ModelNotFoundError):
        return []  # what is wrong with the files is said by the code that loads them


def _cached(name: str) -> Path | None:
    """The folder of a hub's model on this machine."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file) for file in (_SINGLE, _INDEX))
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _in_folder(folder: Path) -> list[_Stored]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:  # loaded by a library of its own
        return []
    files = {_SINGLE}
    if not (folder / _SINGLE).is_file():
        files = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    stored = []
    for file in sorted(files):
        with safe_open(folder / file, "pt") as data:
            for name in data.keys():  # noqa: SIM118 - it is no mapping
                part = data.get_slice(name)
                shape, form = tuple(part.get_shape()), _FORMS.get(part.get_dtype())
                # Older files hold causal masks too: booleans, or [1, 1, n, n]. They are not loaded.
                if form is not None and not (len(shape) == 4 and shape[:2] == (1, 1)):
                    stored.append(_Stored(name, shape, form))
    # A tied output layer that a file holds all the same is not loaded.
    untied = config.get("tie_word_embeddings") is False
    return [tensor for tensor in stored if untied or tensor.name != _OUTPUT]
