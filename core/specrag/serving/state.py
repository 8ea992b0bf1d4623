"""What the parts of a running server share, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

from specrag.serving.errors import ApiError, busy
from specrag.serving.files import FileStore
from specrag.serving.metrics import Metrics
from specrag.serving.models import Models
from specrag.serving.rapid import RapidReplies
from specrag.serving.settings import ServerSettings

# How much of the mean time of a request the latest one makes.
_LATEST = 0.2


class Gate:
    """Lets so many requests work at once, and so many wait. Who comes first is served first.

    Args:
        concurrency: Requests that work at once.
        queue: Requests that wait.
        metrics: Told how many do.

    Attributes:
        waiting, running: How many requests wait, and how many work.
    """

    def __init__(self, concurrency: int, queue: int, metrics: Metrics) -> None:
        self._turns, self._concurrency, self._queue = asyncio.Semaphore(concurrency), concurrency, queue
        self._metrics = metrics
        self.waiting = self.running = 0
        self._seconds = 1.0  # that a request takes, a moving mean

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """The block is one request's turn; it is given the seconds that the request waited.

        Raises:
            ApiError: The queue is full (status 429).
        """
        if self._turns.locked() and self.waiting >= self._queue:
            wait = self._seconds * (self.waiting + 1) / self._concurrency
            raise busy(429, "the queue of this server is full: try again later", "rate_limit_exceeded", wait)
        began = perf_counter()
        self._count(+1)
        try:
            await self._turns.acquire()
        finally:
            self._count(-1)
        started = perf_counter()
        self._metrics.stage.labels("all", "queue").observe(started - began)
        self._work(+1)
        try:
            yield started - began
        finally:
            self._work(-1)
            self._turns.release()
            self._seconds += _LATEST * (perf_counter() - started - self._seconds)

    def _count(self, change: int) -> None:
        self.waiting += change
        self._metrics.queue_depth.set(self.waiting)

    def _work(self, change: int) -> None:
        self.running += change
        self._metrics.running.set(self.running)


@dataclass
class State:
    """A running server.

    Attributes:
        models: ``None`` until they are loaded.
        rapid: Who replies by RAPID; ``None`` until the models are loaded, and where RAPID is not served.
        failure: Why they could not be loaded.
        draining: The server was told to stop: it finishes what runs, and takes nothing new.
        in_flight: Requests under way.
    """

    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    models: Models | None = None
    rapid: RapidReplies | None = None
    failure: Exception | None = None
    draining: bool = False
    in_flight: int = 0
    gate: Gate = field(init=False)
    files: FileStore = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.settings.concurrency, self.settings.queue, self.metrics)
        self.files = FileStore(self.settings.max_files, self.settings.file_seconds)

    @property
    def loaded(self) -> Models:
        """The models.

        Raises:
            ApiError: They are not loaded yet (status 503).
        """
        if self.models is None:
            raise busy(503, "the models are still loading", "not_ready", 2.0)
        return self.models

    def check_rapid(self) -> None:
        """Whether RAPID is served.

        Raises:
            ApiError: RAPID is not served, or the models are not loaded yet.
        """
        if self.loaded.rapid is None or self.rapid is None:
            raise ApiError(404, "this server serves no RAPID", param="model", code="model_not_found")
