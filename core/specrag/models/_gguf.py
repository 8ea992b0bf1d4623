"""A model from a GGUF file with the file's own blocks: no weight is unpacked to a larger type.

transformers reads the file's configuration and tokenizer, which takes seconds for a large vocabulary. Both are then
kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from specrag.engine.blocks import BlockEmbedding, BlockLinear, BlockMatrix, Kind, allocate, packed_bytes
from specrag.engine.gguf_file import GGUFFile, GGUFTensor
from specrag.engine.memory import check_room
from specrag.errors import InvalidInputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_FLOAT32, _FLOAT16, _BFLOAT16 = 0, 1, 30
# Rows that show whether the output layer and the embeddings are one matrix, and how alike they are then.
_COMPARED, _ALIKE = 64, 0.98

# Where a layer's tensors belong, behind "blk.N." and "model.layers.N.".
_MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def load_blocks(path: Path, dtype: torch.dtype) -> nn.Module:
    """The model in ``path``, whose weights stay as they are quantised.

    Args:
        dtype: Of everything that is no matrix, and of activations outside the native engine.

    Raises:
        ModelNotFoundError: Not a GGUF file.
        ModelError: The weights need more memory than is free. Nothing was loaded.
        InvalidInputError: An architecture, or a format of weights, that is not read.
    """
    file = GGUFFile(path)
    check_readable(file)
    config = _remembered(file, "config", AutoConfig.from_pretrained)
    head_size = file.metadata.get(f"{file.metadata['general.architecture']}.attention.key_length")
    if head_size is not None:  # transformers does not read it
        config.head_dim = head_size
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config)
    reader = _Reader(file, config)
    for i, layer in enumerate(body.layers):
        for name, place in _NORMS.items():
            norm = layer.get_submodule(place) if f"blk.{i}.{name}.weight" in file.tensors else None
            if norm is not None:
                norm.weight = reader.vector(f"blk.{i}.{name}.weight", norm.weight, dtype)
        for name, place in _MATRICES.items():
            parent, _, child = place.rpartition(".")
            owner = layer.get_submodule(parent)
            setattr(owner, child, reader.linear(f"blk.{i}.{name}", getattr(owner, child), dtype))
    body.norm.weight = reader.vector("output_norm.weight", body.norm.weight, dtype)
    embeddings, output = reader.embeddings(model.lm_head.weight)
    body.embed_tokens = BlockEmbedding(embeddings, dtype)
    model.lm_head = BlockLinear(output)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInputError(f"{path} lacks tensors of its architecture")
    file.forget()
    return model  # type: ignore[no-any-return]


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file.

    Raises:
        ModelNotFoundError: Not a GGUF file.
        ValueError, OSError: transformers cannot read it.
    """
    return _remembered(GGUFFile(path), "tokenizer", AutoTokenizer.from_pretrained)  # type: ignore[no-any-return]


def _remembered(file: GGUFFile, part: str, read: Callable[..., Any]) -> Any:
    """What ``read`` makes of the file, from the user's cache where it is there."""
    folder = Path(platformdirs.user_cache_dir("specrag")) / "gguf" / f"{file.digest()[:16]}-{part}"
    if folder.exists():
        return read(folder)
    made = read(str(file.path.parent), gguf_file=file.path.name)
    with contextlib.suppress(OSError):  # where nothing can be written it is read anew each time
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            made.save_pretrained(Path(work) / part)
            (Path(work) / part).rename(folder)
    return made


def check_readable(file: GGUFFile) -> None:
    """Refuse what cannot be kept in blocks, before anything is allocated.

    Raises:
        InvalidInputError: With the names of what is not read.
    """
    architecture = str(file.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise InvalidInputError(
            f"{file.path} holds a model of architecture {architecture!r}; blocks are read of "
            f"{', '.join(ARCHITECTURES)}: load it without quantization"
        )
    for tensor in file.tensors.values():
        if len(tensor.shape) == 2 and _kind_of(tensor) is None:
            raise InvalidInputError(
                f"{tensor.name} in {file.path} is stored as {tensor.kind_name}, which is not read; "
                f"{', '.join(kind.name for kind in Kind)}, F16 and F32 are: load it without quantization"
            )


def _kind_of(tensor: GGUFTensor) -> Kind | None:
    if tensor.kind in (_FLOAT32, _FLOAT16):
        return Kind.BF16
    return Kind(tensor.kind) if tensor.kind in set(Kind) else None


class _Reader:
    """Reads matrices into one piece of memory, in the order in which a pass needs them."""

    def __init__(self, file: GGUFFile, config: Any) -> None:
        self._file, self._config = file, config
        self._tied = self._is_one_matrix()
        names = [f"blk.{i}.{name}.weight" for i in range(config.num_hidden_layers) for name in _MATRICES]
        names += ["token_embd.weight"] if self._tied is None else [self._tied]
        names += ["output.weight"] if self._tied is None else []
        tensors = [file.tensors[name] for name in names]
        shapes: Any = [(Kind(_kind_of(t)), *t.shape) for t in tensors]  # type: ignore[arg-type]
        needed = sum(packed_bytes(*shape) for shape in shapes)
        advice = "take a smaller model, or a file with fewer bits per weight"
        check_room(needed, torch.device("cpu"), f"the weights of {file.path}", advice)
        matrices = allocate(shapes)
        self._matrices = {name: self._fill(m, t) for name, m, t in zip(names, matrices, tensors, strict=True)}

    def vector(self, name: str, like: Tensor, dtype: torch.dtype) -> nn.Parameter:
        """The weight of a norm, in the shape of ``like``."""
        tensor = self._file.tensors[name]
        self._check_shape(name, tensor.shape, like)
        return nn.Parameter(self._floats(tensor).to(dtype), requires_grad=False)

    def linear(self, name: str, like: nn.Linear, dtype: torch.dtype) -> BlockLinear:
        """A linear layer in the shape of ``like``, with its bias where there is one."""
        matrix, bias = self._matrices[f"{name}.weight"], self._file.tensors.get(f"{name}.bias")
        self._check_shape(f"{name}.weight", (matrix.rows, matrix.columns), like.weight)
        held = None
        if bias is not None:
            self._check_shape(f"{name}.bias", bias.shape, like.weight[:, 0])
            order = self._row_order(bias)
            held = self._floats(bias).to(dtype)
            held = held if order is None else held[order]
        return BlockLinear(matrix, held)

    def embeddings(self, like: Tensor) -> tuple[BlockMatrix, BlockMatrix]:
        """Of the tokens, and the output layer, in the shape of ``like``; one object when they are one matrix."""
        names = ("token_embd.weight", "output.weight") if self._tied is None else (self._tied, self._tied)
        embeddings, output = (self._matrices[name] for name in names)
        for name, matrix in zip(names, (embeddings, output), strict=True):
            self._check_shape(name, (matrix.rows, matrix.columns), like)
        return embeddings, output

    def _check_shape(self, name: str, shape: tuple[int, ...], like: Tensor) -> None:
        if shape != tuple(like.shape):
            raise InvalidInputError(
                f"{name} in {self._file.path} has the shape {shape}, its configuration says {tuple(like.shape)}"
            )

    def _is_one_matrix(self) -> str | None:
        """The name of the better copy when embeddings and output layer are one matrix; ``None`` when they are two.

        Some files hold it twice, in two formats.
        """
        embeddings, output = (self._file.tensors.get(name) for name in ("token_embd.weight", "output.weight"))
        if output is None or embeddings is None:
            return "token_embd.weight"
        if embeddings.shape != output.shape:
            return None
        a, b = (self._sample(tensor) for tensor in (embeddings, output))
        alike = bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > _ALIKE)
        better = max(embeddings, output, key=lambda tensor: tensor.nbytes)
        return better.name if alike else None

    def _sample(self, tensor: GGUFTensor) -> Tensor:
        """The values of some rows, one after the other."""
        rows, columns = tensor.shape
        some = torch.arange(0, rows, max(1, rows // _COMPARED))
        size = tensor.nbytes // rows
        data = torch.stack([self._file.read_part(tensor, int(row) * size, size) for row in some])
        kind = _kind_of(tensor)
        assert kind is not None
        return _filled(BlockMatrix(kind, len(some), columns), tensor, data.view(-1)).unpack().view(-1)

    def _fill(self, matrix: BlockMatrix, tensor: GGUFTensor) -> BlockMatrix:
        filled = _filled(matrix, tensor, self._file.read(tensor), self._row_order(tensor))
        self._file.forget()
        return filled

    def _floats(self, tensor: GGUFTensor) -> Tensor:
        data = self._file.read(tensor)
        if tensor.kind not in (_FLOAT32, _FLOAT16, _BFLOAT16):
            raise InvalidInputError(f"{tensor.name} is stored as {tensor.kind_name}; F32, F16 or BF16 is expected")
        form = {_FLOAT32: torch.float32, _FLOAT16: torch.float16, _BFLOAT16: torch.bfloat16}[tensor.kind]
        return data.view(form).float().view(tensor.shape)

    def _row_order(self, tensor: GGUFTensor) -> Tensor | None:
        """GGUF's llama interleaves the halves of every head, transformers does not: which row comes where."""
        part = tensor.name.rpartition(".")[0].rpartition(".")[2]
        if self._file.metadata.get("general.architecture") != "llama" or part not in ("attn_q", "attn_k"):
            return None
        config = self._config
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        return torch.arange(tensor.shape[0]).view(heads, -1, 2).transpose(1, 2).reshape(-1).contiguous()


def _filled(matrix: BlockMatrix, tensor: GGUFTensor, data: Tensor, order: Tensor | None = None) -> BlockMatrix:
    """``matrix`` with the weights that ``data`` holds as ``tensor`` says."""
    if tensor.kind in (_FLOAT32, _FLOAT16):
        weights = data.view(torch.float32 if tensor.kind == _FLOAT32 else torch.float16).view(matrix.rows, -1)
        return matrix.read_floats(weights if order is None else weights[order])
    return matrix.read_blocks(data, order)
