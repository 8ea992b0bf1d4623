"""What the routes share: the state and the owner of a request, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from specrag.serving.errors import ClientGoneError
from specrag.serving.keys import Owner
from specrag.serving.state import State

T = TypeVar("T")


def _state(request: Request) -> State:
    found: State = request.app.state.serving
    return found


def _owner(request: Request) -> Owner:
    found: Owner = request.state.owner
    return found


StateOf = Annotated[State, Depends(_state)]
OwnerOf = Annotated[Owner, Depends(_owner)]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` returns. It is cancelled when the client closes the connection.

    The body must have been read.

    Raises:
        ClientGoneError: The client has closed it.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
    both: tuple[asyncio.Future[Any], ...] = (task, gone)
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await request.receive())
