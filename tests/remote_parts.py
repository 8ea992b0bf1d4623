"""Handles as Ray Serve gives them, to workers in this process; and replicas that die, which real ones do not on cue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class ReplicaDiedError(Exception):
    """Stands in for Ray's ``ActorDiedError``."""


class RaisedError(Exception):
    """Stands in for Ray's ``RayTaskError``: what a replica raised is its ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback of many lines")
        self.cause = cause


class Handle:
    """A handle to one worker. ``dies``: so many calls end with ``ReplicaDiedError``; streams after ``pieces`` items."""

    def __init__(self, worker, *, dies: int = 0, pieces: int = 0) -> None:
        self.worker, self.dies, self.pieces = worker, dies, pieces
        self.calls: list[str] = []
        self.cancelled = 0
        self.keys: list[str] = []

    def __getattr__(self, name):
        return _Method(self, name)

    def options(self, *, stream: bool, multiplexed_model_id: str):
        assert stream
        self.keys.append(multiplexed_model_id)
        return self

    def broadcast(self, name, *args):
        return _Broadcast(_Response(self, getattr(self.worker, name)(*args)))

    def dead(self) -> bool:
        self.dies -= 1
        return self.dies >= 0


class _Broadcast:
    def __init__(self, response: _Response) -> None:
        self._response = response

    async def results_async(self, *, return_exceptions: bool):
        return await asyncio.gather(self._response, return_exceptions=return_exceptions)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args):
        self._handle.calls.append(self._name)
        made = getattr(self._handle.worker, self._name)(*args)
        return _Stream(self._handle, made) if hasattr(made, "__aiter__") else _Response(self._handle, made)


class _Response:
    def __init__(self, handle: Handle, coroutine) -> None:
        self._handle, self._coroutine = handle, coroutine

    def __await__(self):
        return self._answer().__await__()

    async def _answer(self):
        if self._handle.dead():
            self._coroutine.close()
            raise ReplicaDiedError
        try:
            return await self._coroutine
        except Exception as error:
            raise RaisedError(error) from None

    def cancel(self) -> None:
        self._handle.cancelled += 1


class _Stream:
    def __init__(self, handle: Handle, items: AsyncIterator) -> None:
        self._handle, self._items, self._given = handle, items, 0
        self._dies = handle.dead()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._dies and self._given == self._handle.pieces:
            raise ReplicaDiedError
        self._given += 1
        try:
            return await self._items.__anext__()
        except StopAsyncIteration:
            raise
        except Exception as error:
            raise RaisedError(error) from None

    def cancel(self) -> None:
        self._handle.cancelled += 1
        asyncio.get_running_loop().create_task(self._items.aclose())
