"""Work in threads that ends soon after nobody waits for it any more.

A thread cannot be stopped from outside. So long work looks now and then whether it is still wanted: a model between
tokens, between groups of conversations and before each of its layers.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_given_up: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("specrag_given_up", default=None)


class AbandonedError(Exception):
    """Nobody waits for this work. It is raised in its own thread, and nobody sees it."""


def stop_if_abandoned() -> None:
    """Raise ``AbandonedError`` where the caller of ``in_thread`` was cancelled."""
    flag = _given_up.get()
    if flag is not None and flag.is_set():
        raise AbandonedError


async def in_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What a blocking ``function`` returns, from a thread. The thread is told when the caller is cancelled."""
    flag = threading.Event()
    context = contextvars.copy_context()
    context.run(_given_up.set, flag)
    try:
        return await asyncio.get_running_loop().run_in_executor(
            None, partial(context.run, partial(function, *args, **options))
        )
    except asyncio.CancelledError:
        flag.set()
        raise
