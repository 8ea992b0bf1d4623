"""The C library of the engine: found or compiled at first use, and loaded; or the reason why it is not there.

The sources lie beside this file. A C compiler makes one shared library of them, for the instructions of this CPU, in
the user's cache. It takes some seconds, once per version and CPU. Without a compiler, on another operating system, or
on a CPU without AVX2, ``library`` returns ``None`` and torch does the work.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from specrag.engine.native.build import BuildError, CompilerError, compiled, instructions
from specrag.errors import SpecRAGError


class Matrix(Structure):
    """``Matrix`` of blocks.h."""

    _fields_ = (("kind", c_int64), ("rows", c_int64), ("columns", c_int64), ("panels", c_void_p))


class Heads(Structure):
    """``Heads`` of attention.h."""

    _fields_ = (("heads", c_int64), ("kv_heads", c_int64), ("size", c_int64), ("row_stride", c_int64))


class Sequence(Structure):
    """``Sequence`` of attention.h."""

    _fields_ = (
        ("first", c_int64),
        ("rows", c_int64),
        ("before", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("parents", c_void_p),
    )


class Layer(Structure):
    """``Layer`` of decoder.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("query_bias", "key_bias", "value_bias", "attended_bias")),
        *((name, Matrix) for name in ("query", "key", "value", "attended", "gate", "up", "down")),
    )


class Decoder(Structure):
    """``Decoder`` of decoder.h."""

    _fields_ = (
        ("layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", Heads),
        ("epsilon", c_double),
        ("attention_scale", c_double),
        ("rotary_scale", c_double),
        ("frequencies", c_void_p),
        ("norm", c_void_p),
        ("embeddings", Matrix),
        ("logits", Matrix),
        ("layer", POINTER(Layer)),
    )


class Pass(Structure):
    """``Pass`` of decoder.h."""

    _fields_ = (
        ("rows", c_int64),
        ("conversations", c_int64),
        ("wanted", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("counts", c_void_p),
        ("held", c_void_p),
        ("places", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("parents", c_void_p),
        ("wanted_rows", c_void_p),
        ("logits", c_void_p),
    )


# What exports.c has: name -> (result, arguments).
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "set_threads": (None, [c_int64]),
    "packed_bytes": (c_int64, [c_int64] * 3),
    "pack_blocks": (None, [c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p]),
    "pack_floats": (None, [c_int64, c_void_p, c_int64, c_int64, c_void_p]),
    "unpack_rows": (None, [POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p]),
    "multiply": (c_int64, [POINTER(Matrix), c_void_p, c_void_p, c_int64, c_void_p]),
    "attend": (c_int64, [POINTER(Heads), POINTER(Sequence), c_void_p, c_void_p]),
    "workspace": (c_void_p, []),
    "free_workspace": (None, [c_void_p]),
    "decode": (c_int64, [POINTER(Decoder), POINTER(Pass), c_void_p]),
}


class Library:
    """The functions of exports.c as methods: ``library.multiply(...)``. Calls release the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"specrag_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for type checkers: ``__init__`` has set them all
        raise AttributeError(name)

    def use_torch_threads(self) -> None:
        """Work with as many threads as torch does."""
        self.set_threads(torch.get_num_threads())


_lock = threading.Lock()


def library() -> Library | None:
    """The library, or ``None`` when this machine cannot have it: ``unavailable`` says why.

    The first call may take some seconds, for the compiler. When the compiler fails, that call warns.
    """
    with _lock:
        return _found()[0]


def unavailable() -> str:
    """Why there is no library; empty when there is one."""
    with _lock:
        return _found()[1]


@cache
def _found() -> tuple[Library | None, str]:
    try:
        return Library(compiled(instructions())), ""
    except CompilerError as error:
        warnings.warn(f"{error}; models run in torch, more slowly", RuntimeWarning, stacklevel=3)
        return None, str(error)
    except (BuildError, OSError, SpecRAGError) as error:
        return None, str(error)
