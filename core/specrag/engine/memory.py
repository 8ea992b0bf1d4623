"""Tells a lack of memory from every other failure of a forward pass."""

from __future__ import annotations

import torch

# What torch's allocators say where they raise a plain RuntimeError.
_WORDS = ("not enough memory", "can't allocate memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that no more memory could be allocated, on any device."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _WORDS))
