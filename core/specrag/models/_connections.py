"""What a pool of servers has per event loop: the HTTP client, the number of requests per server, health checks.

The connections of a loop are closed with it. ``asyncio.run`` and the event loops of web frameworks close their
asynchronous generators first, and one of those holds the client. Loops that are closed without that are swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import httpx

from specrag.errors import ServerBusyError, ServerError
from specrag.models._circuit import Server
from specrag.models._http import ENCODINGS
from specrag.models._secrets import redacted


class Connection:
    """A pool's client and permits in one event loop.

    Args:
        client: Its connections belong to the running loop.
        servers: Those of the pool.
        permits: Requests that one server may have under way.
        max_waiting: Requests that may wait for a permit.
        look: Asks a server which models it has, and records the result (``_discovery.Look``).
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: Sequence[Server],
        permits: int,
        max_waiting: int,
        look: Callable[[Connection, Server], Coroutine[Any, Any, None]],
    ) -> None:
        self.client = client
        self.busy = dict.fromkeys(servers, 0)
        self.probes: dict[Server, asyncio.Task[None]] = {}
        self.hedges = 0  # requests that run beside a late one
        self._permits, self._max_waiting, self._waiting = permits, max_waiting, 0
        self._look = look
        self._news = asyncio.Event()

    def probe(self, server: Server) -> None:
        """Ask ``server`` which models it has, in a task of its own. At most one such task runs per server."""
        if server not in self.probes:
            self.probes[server] = asyncio.ensure_future(self._probe(server))

    def check_up(self) -> None:
        """Begin the health checks that are due. Requests call this, so a pool that nobody uses sends none."""
        for server in self.busy:
            if server.to_check:
                self.probe(server)

    async def _probe(self, server: Server) -> None:
        try:
            await self._look(self, server)
        finally:
            self.probes.pop(server, None)
            self._news.set()

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
        """The least busy of ``servers()``, which are looked at again whenever a permit is given back.

        Raises:
            ServerBusyError: None has a permit left, and too many requests wait already.
        """
        if (server := self.free(servers())) is not None:
            return server
        if self._waiting >= self._max_waiting:
            raise ServerBusyError(
                f"{self._waiting} requests wait for {', '.join(map(str, self.busy))} already: ask fewer questions at "
                "once, add servers, or raise max_waiting"
            )
        self._waiting += 1
        try:
            while True:
                self._news.clear()
                self.check_up()
                if (server := self.free(servers())) is not None:
                    return server
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), 0.5)  # circuits close by time alone
        finally:
            self._waiting -= 1

    def abandoned(self) -> None:
        """The loop was closed: requests that were under way will never end."""
        for server, running in self.busy.items():
            if running:
                server.released()

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
                left, _ = self._of.pop(other, (None, None))  # the last reference to its sockets
                if left is not None:
                    left.abandoned()
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


# Of the environment: a file with trusted certificates, and a folder of them.
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@functools.cache
def _certificates(*named: str | None) -> ssl.SSLContext:
    """The certificates that are trusted. They take 20 ms to read, and each event loop has a client.

    Args:
        named: The values of ``_CERTIFICATES``, which httpx reads.
    """
    return httpx.create_ssl_context()


def client(headers: dict[str, str]) -> httpx.AsyncClient:
    """A client without limits of its own: permits and times are the pool's.

    Raises:
        ServerError: The certificates or the proxy that the environment names cannot be used.
    """
    limits = httpx.Limits(max_connections=None)
    sent = {"Accept-Encoding": ", ".join(ENCODINGS), **headers}
    try:
        trusted = _certificates(*map(os.environ.get, _CERTIFICATES))
    except OSError as error:  # ssl.SSLError is one
        file = os.environ.get(_CERTIFICATES[0])
        raise ServerError(
            f"no certificates can be read from {_CERTIFICATES[0]}={file} ({error.strerror or error}): "
            "give a file of PEM certificates"
        ) from error
    options: dict[str, Any] = {"limits": limits, "timeout": None, "headers": sent, "verify": trusted}
    try:
        return httpx.AsyncClient(**options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        advice = "pip install 'httpx[socks]'" if isinstance(error, ImportError) else "give it as http://HOST:PORT"
        raise ServerError(
            f"the proxy of HTTPS_PROXY, HTTP_PROXY or ALL_PROXY cannot be used ({redacted(str(error))}): {advice}"
        ) from error
