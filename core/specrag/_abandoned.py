"""Work in threads that ends soon after nobody waits for it any more.

A thread cannot be stopped from outside. So long work looks now and then whether it is still wanted: a model between
tokens, between groups of conversations and before each of its layers.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from specrag.errors import described

T = TypeVar("T")

_given_up: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("specrag_given_up", default=None)

_running: set[threading.Event] = set()  # the flags of the threads that work


class AbandonedError(Exception):
    """Nobody waits for this work. It is raised in its own thread, and nobody sees it."""


def stop_if_abandoned() -> None:
    """Raise ``AbandonedError`` where the caller of ``in_thread`` or ``in_own_thread`` was cancelled."""
    flag = _given_up.get()
    if flag is not None and flag.is_set():
        raise AbandonedError


async def in_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a blocking ``function`` returns, from a thread. The thread is told when the caller is cancelled.

    The event loop has few such threads, and the process ends after them: they are for work that keeps a core busy.
    """
    flag, context = _flagged()

    def work() -> T:
        _running.add(flag)
        try:
            return context.run(function, *args, **options)
        finally:
            _running.discard(flag)

    try:
        return await asyncio.get_running_loop().run_in_executor(None, work)
    except asyncio.CancelledError:
        flag.set()
        raise


async def in_own_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """``in_thread`` for calls that mostly wait, such as those of another library's client of a server.

    Calls do not wait for each other's threads. The thread does not keep the process alive, and no interrupt waits for
    it.
    """
    flag, context = _flagged()
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if outcome.done():  # nobody waits any more
            return
        if error is None:
            outcome.set_result(result)
        elif isinstance(error, StopIteration):  # a future cannot hold one
            outcome.set_exception(RuntimeError(described(error)))
        else:
            outcome.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = context.run(function, *args, **options)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="specrag-call", daemon=True).start()
    try:
        return await outcome
    except asyncio.CancelledError:
        flag.set()
        raise


def _flagged() -> tuple[threading.Event, contextvars.Context]:
    """The flag that tells a thread to stop, and the caller's context with it."""
    flag, context = threading.Event(), contextvars.copy_context()
    context.run(_given_up.set, flag)
    return flag, context


def wait_for_abandoned(told: threading.Event, seconds: float) -> None:
    """Wait until the threads that were told to stop have stopped, ``seconds`` at most, through further interrupts.

    An interpreter that ends while a thread is inside torch is aborted.

    Args:
        told: Set when all threads that shall stop have been told.
        seconds: The longest wait.
    """
    with _deaf():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if told.wait(0.02) and not any(flag.is_set() for flag in list(_running)):
                return
            time.sleep(0.01)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Interrupts are ignored; they come to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
