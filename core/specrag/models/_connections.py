"""What a pool of servers has per event loop: the HTTP client, who is busy with how many requests, open probes.

The connections of a loop are closed with it. ``asyncio.run`` and the event loops of web frameworks close their
asynchronous generators first, and one of those holds the client. Loops that are closed without that are swept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx

from specrag.models._circuit import Server
from specrag.models._http import ENCODINGS


class Connection:
    """A pool's client and permits in one event loop.

    Args:
        client: Its connections belong to the running loop.
        servers: Those of the pool.
        permits: Requests that one server may have under way.
    """

    def __init__(self, client: httpx.AsyncClient, servers: Sequence[Server], permits: int) -> None:
        self.client = client
        self.busy = dict.fromkeys(servers, 0)
        self.probes: dict[Server, asyncio.Task[None]] = {}
        self.hedges = 0  # requests that run beside a late one
        self._permits = permits
        self._news = asyncio.Event()

    def free(self, servers: Sequence[Server]) -> Server | None:
        """The least busy of ``servers`` that has a permit left."""
        least = min(servers, key=lambda server: self.busy[server], default=None)
        return least if least is not None and self.busy[least] < self._permits else None

    def take(self, server: Server) -> None:
        """Take a permit of ``server``."""
        self.busy[server] += 1
        server.chosen()

    def give_back(self, server: Server) -> None:
        """Give it back, and wake those who wait for one."""
        self.busy[server] -= 1
        self._news.set()

    async def wait_for(self, servers: Callable[[], Sequence[Server]]) -> Server:
        """The least busy of ``servers()``, which are looked at again whenever a permit is given back."""
        while True:
            self._news.clear()
            if (server := self.free(servers())) is not None:
                return server
            try:
                await asyncio.wait_for(self._news.wait(), 0.5)  # circuits close by time alone
            except asyncio.TimeoutError:
                continue

    async def aclose(self) -> None:
        for probe in self.probes.values():
            probe.cancel()
        await asyncio.gather(*self.probes.values(), return_exceptions=True)
        await self.client.aclose()


class Connections:
    """The connections of a pool, by event loop. ``make`` makes one for the running loop."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._make = make
        self._of: dict[asyncio.AbstractEventLoop, tuple[Connection, AsyncGenerator[None, None]]] = {}

    async def current(self) -> Connection:
        """That of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._of:
            for other in [other for other in list(self._of) if other.is_closed()]:
                self._of.pop(other, None)  # the last reference to its sockets
            connection = self._make()
            closer = self._closing(loop, connection)
            self._of[loop] = connection, closer
            await anext(closer)  # the loop closes what was begun
        return self._of[loop][0]

    async def aclose(self) -> None:
        """Close that of the running event loop."""
        connection, closer = self._of.get(asyncio.get_running_loop(), (None, None))
        if connection is not None and closer is not None:
            await closer.aclose()

    async def _closing(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._of.pop(loop, None)
            await connection.aclose()


def client(headers: dict[str, str]) -> httpx.AsyncClient:
    """A client without limits of its own: permits and times are the pool's."""
    limits = httpx.Limits(max_connections=None)
    sent = {"Accept-Encoding": ", ".join(ENCODINGS), **headers}
    options: dict[str, Any] = {"limits": limits, "timeout": None, "headers": sent}
    return httpx.AsyncClient(**options)
