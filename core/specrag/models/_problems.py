"""The last problem of a piece of work that is still under way.

Who waits for a model, and gives up at a deadline, can so say what the model was waiting for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class LastProblem:
    """What went wrong last; "" where nothing did."""

    text = ""


_watched: ContextVar[LastProblem | None] = ContextVar("specrag_last_problem", default=None)


@contextmanager
def watching(problem: LastProblem) -> Iterator[None]:
    """Problems of what is awaited in the ``with`` block, and of the tasks that it starts, are kept in ``problem``."""
    token = _watched.set(problem)
    try:
        yield
    finally:
        _watched.reset(token)


def note_problem(text: str) -> None:
    """Something went wrong that will be tried again."""
    watched = _watched.get()
    if watched is not None:
        watched.text = text
