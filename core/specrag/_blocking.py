"""Runs async code from blocking code, also while another event loop runs (notebooks, servers).

One event loop lives in a daemon thread and serves every blocking call of the process, so that
connection pools stay open between calls. The caller's context variables go along.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from specrag._abandoned import wait_for_abandoned

T = TypeVar("T")

# Seconds that an interrupt waits for threads to stop.
_LONGEST_FAREWELL = 3.0

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner: int | None = None  # the process that started the loop's thread: a fork has the loop but no thread


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            thread = threading.Thread(target=_loop.run_forever, name="specrag", daemon=True)
            thread.start()
            atexit.register(_stop, _loop, thread, _owner)
        return _loop


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, owner: int) -> None:
    """End the loop's thread before the interpreter ends: one that still frees tensors then aborts the process."""
    if owner == os.getpid():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_LONGEST_FAREWELL)


def _submit(coroutine: Coroutine[Any, Any, T]) -> tuple[Future[T], threading.Event]:
    """The outcome of ``coroutine``, and an event that is set when it has ended, also where nobody waited for it."""
    loop = _background_loop()
    outcome: Future[T] = Future()
    ended = threading.Event()

    def start() -> None:
        task = loop.create_task(coroutine)
        outcome.add_done_callback(lambda done: loop.call_soon_threadsafe(task.cancel) if done.cancelled() else None)

        def finish(done: asyncio.Task[T]) -> None:
            ended.set()
            with contextlib.suppress(InvalidStateError):  # the waiting side gave up first
                if done.cancelled():
                    outcome.cancel()
                elif (error := done.exception()) is not None:
                    outcome.set_exception(error)
                else:
                    outcome.set_result(done.result())

        task.add_done_callback(finish)

    loop.call_soon_threadsafe(start, context=contextvars.copy_context())
    return outcome, ended


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` to its end and return its result; an interrupt cancels it.

    Raises:
        RuntimeError: When called from a coroutine that this module itself runs: it would wait for itself.
    """
    _refuse_own_thread(coroutine)
    outcome, ended = _submit(coroutine)
    try:
        return outcome.result()
    except BaseException as error:
        outcome.cancel()
        if isinstance(error, KeyboardInterrupt):
            wait_for_abandoned(ended, _LONGEST_FAREWELL)
        raise


def iterate(stream: AsyncIterator[T]) -> Iterator[T]:
    """The items of ``stream``, one by one, as they come. Leaving the loop early closes ``stream``."""
    items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    async def pump() -> None:
        try:
            async for item in stream:
                items.put((True, item))
            items.put((False, None))
        except BaseException as error:
            items.put((False, error))
            if not isinstance(error, Exception):
                raise
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    coroutine = pump()
    _refuse_own_thread(coroutine)
    outcome, ended = _submit(coroutine)
    try:
        while True:
            more, item = items.get()
            if more:
                yield item
            elif item is not None:
                raise item
            else:
                return
    except KeyboardInterrupt:
        outcome.cancel()
        wait_for_abandoned(ended, _LONGEST_FAREWELL)
        raise
    finally:
        outcome.cancel()


def serves_blocking_call() -> bool:
    """Whether the running task is part of a blocking call. Only then it runs on this module's event loop."""
    try:
        return asyncio.get_running_loop() is _loop and _owner == os.getpid()
    except RuntimeError:
        return False


def _refuse_own_thread(coroutine: Coroutine[Any, Any, Any]) -> None:
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        return
    if running is _loop and _owner == os.getpid():
        coroutine.close()
        raise RuntimeError(
            "a blocking specrag call was made from inside specrag's own event loop: await the async form"
        )
