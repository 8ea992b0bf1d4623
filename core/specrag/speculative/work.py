"""What the running task works on, for adapters that attach a framework's traces to the models' calls."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Work:
    """A draft being made, or verified, one at a time. ``subset`` as in ``Draft.subset``."""

    stage: Literal["draft", "verify"]
    subset: tuple[int, ...]


#: Set in the task of a model call that concerns one draft alone; ``None`` elsewhere.
current_work: ContextVar[Work | None] = ContextVar("specrag_current_work", default=None)
