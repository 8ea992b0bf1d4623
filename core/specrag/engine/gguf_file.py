"""What a GGUF file holds, without reading it: names, shapes, formats and places of its tensors.

The ``gguf`` package's own reader makes an object for every token of the vocabulary, which takes seconds. This one skips
them.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from specrag.errors import ModelNotFoundError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file. ``shape`` as in PyTorch; ``kind`` is GGML's number of its format."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int

    @property
    def kind_name(self) -> str:
        """The format's name, e.g. ``Q4_K``."""
        known = {int(kind): kind.name for kind in GGMLQuantizationType}
        return known.get(self.kind, f"format {self.kind}")

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.kind)]
        return prod(self.shape) // weights * size


class GGUFFile:
    """A GGUF file, mapped into memory. Values of the metadata that are arrays are skipped.

    Raises:
        ModelNotFoundError: It is not there, or not a GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.metadata, self.tensors = self._read_header()
        except (OSError, ValueError, struct.error, UnicodeDecodeError, KeyError) as error:
            raise ModelNotFoundError(f"{path} could not be read as a GGUF file: {error}") from error

    def read(self, tensor: GGUFTensor) -> Tensor:
        """Its bytes, uint8 [nbytes], copied: the file's pages may go."""
        return self.read_part(tensor, 0, tensor.nbytes)

    def read_part(self, tensor: GGUFTensor, first: int, count: int) -> Tensor:
        """``count`` of its bytes, from the byte ``first`` on; copied."""
        begin = self._begin + tensor.offset + first
        return torch.from_numpy(np.frombuffer(self._data, np.uint8, count, begin).copy())

    def digest(self) -> str:
        """A digest of everything but the tensors' values: architecture, vocabulary, names and shapes."""
        return hashlib.sha256(self._data[: self._begin]).hexdigest()

    def forget(self) -> None:
        """Let the system drop the pages that were read: they would count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _read_header(self) -> tuple[Mapping[str, object], Mapping[str, GGUFTensor]]:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 are known")
        tensors, values = self._scalar("Q"), self._scalar("Q")
        metadata = dict(self._values(int(values)))
        found = {tensor.name: tensor for tensor in self._infos(int(tensors))}
        alignment = int(metadata.get(_ALIGNMENT, 32))  # type: ignore[call-overload]
        self._begin = -(-self._at // alignment) * alignment
        return metadata, found

    def _values(self, count: int) -> Iterator[tuple[str, object]]:
        for _ in range(count):
            name, kind = self._string(), int(self._scalar("I"))
            if kind == _ARRAY:
                self._skip_array()
            elif kind == _STRING:
                yield name, self._string()
            else:
                yield name, self._scalar(_SCALARS[kind])

    def _infos(self, count: int) -> Iterator[GGUFTensor]:
        for _ in range(count):
            name, dimensions = self._string(), int(self._scalar("I"))
            shape = tuple(int(self._scalar("Q")) for _ in range(dimensions))[::-1]
            yield GGUFTensor(name, int(self._scalar("I")), shape, int(self._scalar("Q")))

    def _skip_array(self) -> None:
        kind, count = int(self._scalar("I")), int(self._scalar("Q"))
        if kind == _ARRAY:
            for _ in range(count):
                self._skip_array()
        elif kind == _STRING:
            data, at = self._data, self._at
            for _ in range(count):
                at += 8 + int.from_bytes(data[at : at + 8], "little")
            self._at = at
        else:
            self._at += count * struct.calcsize(f"<{_SCALARS[kind]}")

    def _scalar(self, form: str) -> int | float:
        value = struct.unpack_from(f"<{form}", self._data, self._at)[0]
        self._at += struct.calcsize(f"<{form}")
        return value  # type: ignore[no-any-return]

    def _string(self) -> str:
        length = int(self._scalar("Q"))
        value = self._data[self._at : self._at + length].decode("utf-8")
        self._at += length
        return value
