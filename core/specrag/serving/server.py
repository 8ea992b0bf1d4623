"""The application under uvicorn: slow clients are cut off, and a signal to stop lets running requests end."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from specrag.errors import InvalidInputError
from specrag.serving.app import create_app
from specrag.serving.logs import log
from specrag.serving.settings import ServerSettings
from specrag.serving.state import State

# Seconds for what is cancelled to end, when the time for draining is over.
_FAREWELL = 2
# Connections at once; further ones get uvicorn's own 503.
_CONNECTIONS = 1024


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; ``port`` 0 takes a free one.

    Raises:
        InvalidInputError: The port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()  # another server that binds the same port from now on is told so
    except OSError as error:
        made.close()
        in_use = "is in use: give another --port, or stop what uses it"
        why = in_use if "in use" in str(error) else f"cannot be used: {error.strerror or error}"
        raise InvalidInputError(f"port {port} on {host} {why}") from None
    return made


def run(settings: ServerSettings, sockets: list[socket.socket]) -> None:
    """Serve until a signal to stop.

    Raises:
        Exception: What ``settings.load`` raised.
    """
    server = make_server(settings)
    server.run(sockets)
    if server.serving.failure is not None:
        raise server.serving.failure


def make_server(settings: ServerSettings) -> Server:
    """The application in a server that does not run yet."""

    class Protocol(PatientProtocol):
        header_timeout, send_timeout = settings.header_timeout, settings.send_timeout

    made: list[Server] = []
    app = create_app(settings, on_failure=lambda: made[0].stop())
    config = uvicorn.Config(
        app,
        http=Protocol,
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_FAREWELL,
    )
    made.append(Server(config, app.state.serving))
    return made[0]


class Server(uvicorn.Server):
    """Drains before it exits: running requests end, new ones get status 503. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, serving: State) -> None:
        super().__init__(config)
        self.serving = serving
        self._until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self.serving.draining:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
            return
        self._until = time.monotonic() + self.serving.settings.drain
        self.serving.draining = True

    def stop(self) -> None:
        """Exit without draining."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Exit once everything that runs has ended. uvicorn asks this ten times per second."""
        if self.serving.draining and (not self.serving.in_flight or time.monotonic() > self._until):
            log.info("drained", extra={"fields": {"cut_off": self.serving.in_flight}})
            self.should_exit = True
        return await super().on_tick(counter)


class PatientProtocol(H11Protocol):
    """uvicorn's protocol with an end to its patience: for headers, and for clients that take nothing.

    uvicorn itself ends connections that are idle between two requests (``timeout_keep_alive``), and no others.
    """

    header_timeout = 10.0
    send_timeout = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._headers_due: asyncio.TimerHandle | None = None
        self._taken_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._headers_due)
            self._headers_due = None
        elif self._headers_due is None and not self.transport.is_closing():
            self._wait_for_headers()  # of the next request, which has begun

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._headers_due)
        _cancel(self._taken_due)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taken_due = self.loop.call_later(self.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._taken_due)
        super().resume_writing()

    def _wait_for_headers(self) -> None:
        self._headers_due = self.loop.call_later(self.header_timeout, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
