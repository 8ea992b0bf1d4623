"""Calls of models of other libraries, whose clients may be bound to the event loop that first used them.

Such a client keeps its connections, and on another event loop they fail with "Event loop is closed". So a blocking call
uses the blocking methods, in a thread. An awaited call uses the awaited methods, on the first event loop that did.
"""

from __future__ import annotations

import asyncio
import re
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from specrag import _blocking
from specrag._abandoned import in_own_thread

T = TypeVar("T")

# How many attributes below a model its HTTP client is: ChatOpenAI.async_client._client._client.
_DEPTH = 3
_OTHER_LOOP = re.compile(r"(?i)event loop is closed|(attached|bound) to a different (event )?loop")

_lock = threading.Lock()
# Per id of a model or client: a weak reference to it, which removes the entry when the object is freed, and its event
# loop.
_first: dict[int, tuple[weakref.ref[Any], weakref.ref[asyncio.AbstractEventLoop]]] = {}


class ForeignCalls:
    """Calls of one model of another library.

    Models that share an HTTP client share its event loop. All ``ChatOpenAI`` and ``OpenAIEmbeddings`` of one address
    share one.

    Args:
        models: The models that are called. For a wrapped model, the models inside it.
        awaits: Whether the awaited methods leave the event loop free.
    """

    def __init__(self, *models: Any, awaits: bool = True) -> None:
        self._models, self._awaits = models, awaits
        self._shared: list[Any] | None = None
        self._only_awaits = False  # the blocking method is not implemented

    async def call(self, blocking: Callable[[], T], awaited: Callable[[], Awaitable[T]]) -> T:
        """What one of the two methods returns: ``blocking`` is called in a thread, ``awaited`` on this event loop."""
        if self._only_awaits or not self.must_block():
            try:
                return await awaited()
            except Exception as error:
                if self._only_awaits or not _is_of_another_loop(error):
                    raise  # otherwise its connections belong to another event loop, and no request was sent
        try:
            return await in_own_thread(blocking)
        except (NotImplementedError, TypeError) as error:
            if isinstance(error, TypeError) and "synchronously" not in str(error):  # as LangChain says it
                raise
        self._only_awaits = True
        return await awaited()

    def must_block(self) -> bool:
        """Whether the running task must use the blocking methods.

        It must in a blocking call, and on another event loop than the first.
        """
        if not self._awaits or _blocking.serves_blocking_call():
            return True
        running = asyncio.get_running_loop()
        if self._shared is None:
            self._shared = [self, *_shared_of(self._models)]
        with _lock:
            found = [owner for one in self._shared if (owner := _owner_of(one)) is not None]
            if not found:
                for one in self._shared:
                    _set_owner(one, running)
        return any(owner() is not running for owner in found)


def _owner_of(one: Any) -> weakref.ref[asyncio.AbstractEventLoop] | None:
    known = _first.get(id(one))
    return known[1] if known is not None and known[0]() is one else None


def _set_owner(one: Any, loop: asyncio.AbstractEventLoop) -> None:
    key = id(one)
    _first[key] = weakref.ref(one, lambda gone: _first.pop(key, None)), weakref.ref(loop)


def _shared_of(models: tuple[Any, ...]) -> Iterator[Any]:
    """The models and their HTTP clients, as far as weak references to them are possible."""
    seen: set[int] = set()
    level = list(models)
    for depth in range(_DEPTH + 1):
        below: list[Any] = []
        for one in level:
            if id(one) in seen or isinstance(one, ModuleType | type) or not hasattr(one, "__dict__"):
                continue
            seen.add(id(one))
            if (depth == 0 or _is_http_client(one)) and getattr(type(one), "__weakrefoffset__", False):
                yield one
            below += [*vars(one).values(), *(getattr(one, "__pydantic_private__", None) or {}).values()]
        level = below


def _is_http_client(one: Any) -> bool:
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(one).__mro__}
    return bool(names & {"httpx.AsyncClient", "aiohttp.ClientSession"})


def _is_of_another_loop(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a connection belongs to another event loop."""
    while error is not None:
        if isinstance(error, RuntimeError) and _OTHER_LOOP.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
