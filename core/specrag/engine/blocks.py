"""Weights in blocks of a few bits: matrices, and the linear layers and embeddings that hold them.

The formats are GGUF's: a block of 32 or 256 weights shares a scale, and in some formats a minimum. The native library
keeps their bits in a layout of its own (``native/blocks.h``). A product unpacks each weight once for up to eight rows,
and multiplies in int8 (activations have one scale for every 32 columns) or in bfloat16. The result of a row depends on
that row alone: not on the rows beside it, and not on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from specrag.engine.native import Library, Matrix, library, unavailable
from specrag.engine.pages import huge_bytes
from specrag.errors import InvalidInputError

_ALIGNED = 64  # bytes


class Kind(IntEnum):
    """Formats of weights, by GGUF's numbers. Bits per weight, scales included."""

    Q4_0 = 2  # 4.5
    Q4_1 = 3  # 5
    Q5_0 = 6  # 5.5
    Q5_1 = 7  # 6
    Q8_0 = 8  # 8.5
    Q4_K = 12  # 4.5
    Q5_K = 13  # 5.5
    Q6_K = 14  # 6.56
    BF16 = 30  # 16

    @property
    def block(self) -> int:
        """Weights of a block; a matrix has a multiple of it as columns."""
        return 256 if self in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K) else 32


def native() -> Library:
    """The library.

    Raises:
        InvalidInputError: This machine cannot have it.
    """
    found = library()
    if found is None:
        raise InvalidInputError(f"weights in blocks need the native engine: {unavailable()}")
    return found


class BlockMatrix:
    """A matrix [rows, columns] in blocks.

    Args:
        kind: The format.
        rows, columns: Its shape; columns: a multiple of ``kind.block``.
        data: ``packed_bytes`` of uint8, at an address divisible by 64; allocated when not given. Uninitialised.

    Raises:
        InvalidInputError: Columns that the format cannot hold, or no native engine.
    """

    def __init__(self, kind: Kind, rows: int, columns: int, data: Tensor | None = None) -> None:
        if rows < 1 or columns < 1 or columns % kind.block:
            raise InvalidInputError(
                f"a {kind.name} matrix has a multiple of {kind.block} columns, got {rows} x {columns}"
            )
        size = packed_bytes(kind, rows, columns)
        self.kind, self.rows, self.columns = kind, rows, columns
        self.data = huge_bytes(size) if data is None else data
        if self.data.numel() != size or self.data.data_ptr() % _ALIGNED:
            raise InvalidInputError(f"{kind.name} {rows} x {columns} needs {size} aligned bytes")

    @property
    def struct(self) -> Matrix:
        """As the library takes it; valid as long as this object."""
        return Matrix(self.kind, self.rows, self.columns, self.data.data_ptr())

    def read_blocks(self, blocks: Tensor, order: Tensor | None = None) -> BlockMatrix:
        """Take over GGUF's blocks.

        Args:
            blocks: uint8, contiguous, the rows as a file holds them.
            order: [rows], int64: which row of ``blocks`` becomes row i.

        Raises:
            InvalidInputError: The bytes are too many or too few.
        """
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        if blocks.numel() != self.rows * self.columns // weights * size:
            raise InvalidInputError(
                f"{blocks.numel()} bytes are not those of a {self.kind.name} matrix {self.rows} x {self.columns}"
            )
        held = None if order is None else order.contiguous()
        where = None if held is None else held.data_ptr()
        native().pack_blocks(self.kind, blocks.data_ptr(), self.rows, self.columns, where, self.data.data_ptr())
        return self

    def read_floats(self, weights: Tensor) -> BlockMatrix:
        """Round weights [rows, columns]; the format is Q4_1, Q8_0 or BF16."""
        if self.kind not in (Kind.Q4_1, Kind.Q8_0, Kind.BF16):
            raise InvalidInputError(f"weights are rounded to Q4_1, Q8_0 or BF16, not to {self.kind.name}")
        floats = weights.detach().float().contiguous()
        native().pack_floats(self.kind, floats.data_ptr(), self.rows, self.columns, self.data.data_ptr())
        return self

    def unpack(self, ids: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows as float32 or bfloat16: all, or those that ``ids`` [count] names.

        Raises:
            InvalidInputError: An id is not that of a row.
        """
        if ids is not None:
            check_ids(ids, self.rows)
        count = self.rows if ids is None else ids.numel()
        out = torch.empty(count, self.columns, dtype=dtype)
        which = None if ids is None else ids.contiguous()
        places = (out.data_ptr(), None) if dtype == torch.float32 else (None, out.data_ptr())
        native().unpack_rows(ctypes.byref(self.struct), None if which is None else which.data_ptr(), count, *places)
        return out

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x Wᵀ + bias: float32 [n, columns] -> float32 [n, rows]."""
        if not x.is_cpu or x.dtype != torch.float32:
            raise InvalidInputError(f"blocks are multiplied on the CPU with float32, got {x.dtype} on {x.device}")
        x = x.contiguous()
        out = torch.empty(len(x), self.rows)
        engine = native()
        engine.use_torch_threads()
        where = None if bias is None else bias.data_ptr()
        if not engine.multiply(ctypes.byref(self.struct), where, x.data_ptr(), len(x), out.data_ptr()):
            raise MemoryError(f"no memory to multiply {len(x)} rows")
        return out


def check_ids(ids: Tensor, rows: int) -> None:
    """Check that each of ``ids`` is at least 0 and below ``rows``. The library itself does not look.

    Raises:
        InvalidInputError: One is not.
    """
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < rows):
        raise InvalidInputError(f"token ids must be from 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}")


def packed_bytes(kind: Kind, rows: int, columns: int) -> int:
    """Bytes that a matrix takes."""
    return int(native().packed_bytes(kind, rows, columns))


def allocate(shapes: Sequence[tuple[Kind, int, int]]) -> list[BlockMatrix]:
    """Matrices side by side in one piece of memory, in large pages where the system has them."""
    sizes = [packed_bytes(*shape) for shape in shapes]
    memory = huge_bytes(sum(sizes))
    parts = memory.split(sizes)
    return [BlockMatrix(*shape, data=part) for shape, part in zip(shapes, parts, strict=True)]


def _save_as_weight(matrix: BlockMatrix, destination: dict[str, Any], prefix: str) -> None:
    """In a state dict, bfloat16 weights stand as those of a plain layer; blocks of fewer bits stay as they are."""
    if matrix.kind == Kind.BF16:
        del destination[f"{prefix}data"]
        destination[f"{prefix}weight"] = matrix.unpack(dtype=torch.bfloat16)


class BlockLinear(nn.Module):
    """A linear layer over a ``BlockMatrix``, for inference on the CPU. Input and output keep the caller's dtype."""

    data: Tensor  # the matrix's bytes
    bias: nn.Parameter | None

    def __init__(self, matrix: BlockMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.register_buffer("data", matrix.data)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.matrix.kind.name}"

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        out = self.matrix.multiply(x.detach().reshape(-1, self.in_features).float(), bias)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _save_as_weight(self.matrix, destination, prefix)

    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with these weights."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.matrix.unpack().to(dtype))
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.to(dtype))  # type: ignore[assignment]
        return linear


class BlockEmbedding(nn.Module):
    """Token embeddings over a ``BlockMatrix``, which may be the output layer's."""

    data: Tensor

    def __init__(self, matrix: BlockMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns
        self.register_buffer("data", matrix.data)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.kind.name}"

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.unpack(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _save_as_weight(self.matrix, destination, prefix)

    def unpacked(self, dtype: torch.dtype) -> nn.Embedding:
        """Plain embeddings with these weights."""
        return nn.Embedding.from_pretrained(self.matrix.unpack().to(dtype), freeze=False)


def use_blocks(model: nn.Module, kind: Kind, *, logits: Kind | None = None) -> None:
    """Round every linear layer and the token embeddings of ``model``, in place; tied embeddings stay tied.

    Args:
        kind: Q4_1, Q8_0 or BF16.
        logits: The output layer's, and the embeddings', if another.

    Raises:
        InvalidInputError: A layer whose columns do not fill blocks; nothing was changed.
    """
    found: Any = model
    output, embeddings = found.get_output_embeddings(), found.get_input_embeddings()
    tied = output is not None and output.weight is embeddings.weight
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not output]
    shapes = [(kind, *linear.weight.shape) for linear in linears]
    shapes += [(logits or kind, *module.weight.shape) for module in ((output,) if tied else (output, embeddings))]
    matrices = dict(zip([*linears, output, *([] if tied else [embeddings])], allocate(shapes), strict=True))
    dtype = embeddings.weight.dtype
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            child: Any = module
            if child not in matrices and child is not embeddings:
                continue
            matrix = matrices[output if tied and child is embeddings else child]
            if not (tied and child is embeddings):
                matrix.read_floats(child.weight)
            made = BlockEmbedding(matrix, dtype) if child is embeddings else BlockLinear(matrix, child.bias)
            setattr(parent, name, made)


def unpack_blocks(model: nn.Module) -> None:
    """Plain layers in place of those in blocks, in the dtype of the model's norms; tied embeddings are tied again."""
    found: Any = model
    embeddings, output = found.get_input_embeddings(), found.get_output_embeddings()
    tied = isinstance(embeddings, BlockEmbedding) and getattr(output, "matrix", None) is embeddings.matrix
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BlockLinear | BlockEmbedding):
                setattr(parent, name, child.unpacked(found.dtype))
    if tied:
        found.get_output_embeddings().weight = found.get_input_embeddings().weight
