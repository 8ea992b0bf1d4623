"""Values out of the metadata of documents, where anything may stand under any name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def title_of(value: Any) -> str | None:
    """A title that stands in metadata, where anything may stand: a text or a number; ``None`` for all else."""
    if isinstance(value, str):
        return value.strip() or None
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return str(value) if known and math.isfinite(value) else None


def vector_of(value: Any) -> np.ndarray | None:
    """A vector that stands in metadata, where anything may stand; ``None`` for what is no vector of finite numbers."""
    if not isinstance(value, list | tuple | np.ndarray):
        return None
    try:
        vector = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return vector if vector.ndim == 1 and vector.size and np.isfinite(vector).all() else None
