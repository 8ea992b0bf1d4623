"""Problems of work that is still under way: who gives up waiting for it can say what it was waiting for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_heard_by: ContextVar[Callable[[str], None] | None] = ContextVar("specrag_heard_by", default=None)


@contextmanager
def heard_by(hear: Callable[[str], None]) -> Iterator[None]:
    """Tasks that are started in the ``with`` block, and those that they start, tell ``hear`` of their problems."""
    token = _heard_by.set(hear)
    try:
        yield
    finally:
        _heard_by.reset(token)


def note_problem(text: str) -> None:
    """Something went wrong and will be tried again."""
    hear = _heard_by.get()
    if hear is not None:
        hear(text)
