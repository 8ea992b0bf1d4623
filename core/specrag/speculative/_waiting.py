"""What the pipeline waits with: drafts that arrive while other tasks run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Arrivals(Generic[T]):
    """The items of an asynchronous iterator, read in a task of its own.

    So a loop can wait for the next item and for other tasks at the same time.

    Args:
        items: What is read.
        announces: Whether an item announces the next ones. The iterator goes on after such an item only when the loop
            is done with it, so that whoever listens knows of the work before it begins.
    """

    def __init__(self, items: AsyncIterator[T], announces: Callable[[T], bool] = lambda item: False) -> None:
        self._ready: list[T] = []
        self._announces = announces
        self._seen = asyncio.Event()
        self._news = asyncio.Event()
        self._waiter: asyncio.Task[bool] | None = None
        self._reader = asyncio.create_task(self._read(items))

    async def _read(self, items: AsyncIterator[T]) -> None:
        async for item in items:
            self._ready.append(item)
            self._news.set()
            if self._announces(item):
                self._seen.clear()
                await self._seen.wait()

    @property
    def closed(self) -> bool:
        """Whether everything has arrived and was taken."""
        return self._reader.done() and not self._ready

    def pending(self) -> set[asyncio.Task[Any]]:
        """The tasks to wait for: one of them is done when an item arrives or the iterator ends.

        The loop is done with all items that it took before.
        """
        if not self._ready:
            self._seen.set()
        if self._reader.done():
            return {self._reader} if self._ready else set()
        if self._waiter is None or self._waiter.done():
            self._waiter = asyncio.create_task(self._news.wait())
        return {self._reader, self._waiter}

    def take(self) -> list[T]:
        """The items that arrived since the last call. Raises what the iterator raised."""
        if self._reader.done() and not self._reader.cancelled() and (error := self._reader.exception()) is not None:
            raise error
        taken, self._ready = self._ready, []
        self._news.clear()
        return taken

    async def close(self) -> None:
        """Stop reading."""
        tasks = [task for task in (self._reader, self._waiter) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(tasks: set[asyncio.Task[Any]], seconds: float | None) -> bool:
    """Wait until one of ``tasks`` is done; false when ``seconds`` passed before. Without tasks: true at once."""
    if not tasks:
        return True
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)
