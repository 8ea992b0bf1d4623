"""Wall-clock seconds of each stage, and the deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError
from specrag.schema import Timings

Stage = Literal["embed", "cluster", "draft", "verify", "escalate", "retrieve", "grade"]


def check_deadline(seconds: float | None) -> None:
    """Whether ``seconds`` is a deadline, or none.

    Raises:
        InvalidInputError: It is not a positive number.
    """
    check_numbers(deadline=seconds)
    if seconds is not None and not seconds > 0:
        raise InvalidInputError(f"deadline must be a positive number of seconds, got {seconds}")


class Clock:
    """Measures one question. ``deadline`` is in seconds from now; ``None`` means that there is none."""

    def __init__(self, deadline: float | None) -> None:
        self._start = time.perf_counter()
        self._end = None if deadline is None else self._start + deadline
        self._spent: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._began: dict[Stage, float] = {}

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, at least 0."""
        return None if self._end is None else max(0.0, self._end - time.perf_counter())

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """``stage`` lasts as long as its ``with`` blocks together."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] += time.perf_counter() - start

    def begin(self, stage: Stage) -> None:
        """``stage`` begins now, unless it began before."""
        self._began.setdefault(stage, time.perf_counter())

    def mark(self, stage: Stage) -> None:
        """Some work of ``stage`` has ended: the stage lasts from its beginning until now."""
        self._spent[stage] = time.perf_counter() - self._began.get(stage, self._start)

    def timings(self) -> Timings:
        """What was measured so far."""
        return Timings(**self._spent, total=time.perf_counter() - self._start)
