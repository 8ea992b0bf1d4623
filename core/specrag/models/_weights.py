"""What the weights of a model are kept as, on a CPU: the formats of ``TransformersLM(quantization=...)``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from specrag.engine import step
from specrag.engine.blocks import Kind, use_blocks
from specrag.engine.int8 import quantize_int8
from specrag.engine.native import library, unavailable
from specrag.engine.onednn import multiplies_bfloat16, use_onednn
from specrag.errors import InvalidInputError
from specrag.models._gguf import load_blocks
from specrag.models._loading import load_causal_lm, loading, quiet_transformers, source_of
from specrag.models._room import check_weights_fit
from specrag.models.base import Quantization


def check_quantization(quantization: str | None, model: Any, device: torch.device, device_map: Any) -> None:
    """Refuse what does not go together.

    Raises:
        InvalidInputError: With what was given and what to do.
    """
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        names = ", ".join(map(repr, get_args(Quantization)))
        raise InvalidInputError(f"quantization must be None or one of {names}, got {quantization!r}")
    if device.type != "cpu" or device_map is not None:
        raise InvalidInputError(f"quantization={quantization!r} runs on the CPU: give device='cpu'")
    if quantization == "gguf" and (not isinstance(model, str | Path) or Path(model).suffix != ".gguf"):
        raise InvalidInputError(
            f"quantization='gguf' keeps the weights of a .gguf file as they are, got {model!r}: use 'int8' or 'int4'"
        )


def load_model(
    source: str | Path,
    quantization: str | None,
    dtype: torch.dtype | None,
    device: torch.device = torch.device("cpu"),
    device_map: Any = None,
) -> Any:
    """The model in ``source``: with ``"gguf"`` in the file's own blocks, else in floating point.

    Args:
        source: A folder, a ``.gguf`` file or a hub id.
        quantization: ``"int8"`` and ``"int4"`` are left to ``lay_out``.
        dtype: Of the weights; with ``"gguf"``, of those that are no matrices. The default is float32.
        device: Where the weights will be moved. They are loaded on the CPU.
        device_map: See ``TransformersLM``. With it the memory is not checked.

    Raises:
        ModelNotFoundError: None could be loaded from there.
        ModelError: The weights need more memory than is free. Nothing was loaded.
        InvalidInputError: A GGUF file with an architecture, or a format, that is not read.
    """
    if quantization != "gguf":
        dtype = dtype or torch.float32
        if device_map is None:
            check_weights_fit(source, quantization, dtype, device)
        return load_causal_lm(source, dtype, device_map=device_map)
    if library() is None:
        fallback = torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32
        name = str(fallback).removeprefix("torch.")
        warnings.warn(f"{source} is unpacked to {name}, as there is no native engine: {unavailable()}", stacklevel=3)
        check_weights_fit(source, None, dtype or fallback, device)
        return load_causal_lm(source, dtype or fallback)
    source_of(source, "model")  # whether it is there
    with quiet_transformers(), loading(source, "a causal language model"):
        return load_blocks(Path(source).expanduser(), dtype or torch.float32)


def lay_out(model: nn.Module, quantization: str | None, *, loaded_here: bool) -> None:
    """Round the weights of ``model`` and lay them out for the products of this CPU, in place.

    ``"int8"`` and ``"int4"`` are Q8_0 and Q4_1 (with Q8_0 for the output layer): a scale, and with Q4_1 a minimum, for
    every 32 weights. Without the native engine, or where a layer's columns are no multiple of 32, both are torch's
    int8.

    Args:
        model: Changed in place.
        quantization: As ``TransformersLM`` takes it.
        loaded_here: Nobody else needs the weights as they lie.
    """
    if quantization in ("int8", "int4"):
        _round(model, to_int4=quantization == "int4")
    elif quantization is None and loaded_here and _multiplies_natively(model):
        use_blocks(model, Kind.BF16)
    use_onednn(model, pack=loaded_here)


def _round(model: nn.Module, *, to_int4: bool) -> None:
    try:
        if to_int4:
            use_blocks(model, Kind.Q4_1, logits=Kind.Q8_0)
        else:
            use_blocks(model, Kind.Q8_0)
    except InvalidInputError as error:
        if to_int4:
            warnings.warn(f"the weights are kept in 8 bits, not in 4: {error}", stacklevel=4)
        quantize_int8(model)


def _multiplies_natively(model: Any) -> bool:
    """Whether the native engine runs ``model`` in bfloat16."""
    return model.dtype == torch.bfloat16 and model.device.type == "cpu" and step.knows(model) and library() is not None


class NativeOf:
    """The native forward pass of a model, where its weights lie in blocks and its architecture is known.

    It is made when it is first asked for, and anew when the model's layers were replaced since.
    """

    def __init__(self) -> None:
        self._output: Any = None
        self._decoder: step.NativeDecoder | None = None

    def __call__(self, model: Any) -> step.NativeDecoder | None:
        output = model.get_output_embeddings()
        if self._output is None or output is not self._output:
            self._output = output
            self._decoder = step.NativeDecoder(model) if step.supports(model) else None
        return self._decoder
