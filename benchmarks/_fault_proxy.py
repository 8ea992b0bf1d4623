"""A proxy in front of a real server that makes faults on the wire. Tests use it too.

It takes one request per connection, passes it on, and does to the reply what its fault says. The fault may be changed
while requests run. A client that goes away ends the request at the server too.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["none", "reset", "hang", "rubbish", "half", "busy", "slow"]

BUSY = (
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Type: application/json\r\nContent-Length: 34\r\n"
    b'Connection: close\r\n\r\n{"error": {"message": "slow down"}}'
)
RUBBISH = random.Random(0).randbytes(2000)
# A slow network: seconds before the first byte, bytes of a piece, and seconds between two pieces.
LATENCY, PIECE, GAP = 0.5, 512, 0.05


class FaultProxy:
    """In front of ``upstream``, in a thread of its own, as a context manager.

    Args:
        upstream: A base URL up to and including ``/v1``.
        fault: What happens to the requests: "none"; "reset": the connection is reset when the request has arrived;
            "hang": no reply; "rubbish": random bytes; "half": half of the reply's bytes; "busy": status 429 with
            ``Retry-After: 1``; "slow": half a second of latency, then 10 KB per second.

    Attributes:
        url: The proxy's own base URL.
        fault: As above.
        asked: Requests other than GET that it took.
        left: Requests whose client went away before it had the reply.
        open: Requests that are under way.
    """

    def __init__(self, upstream: str, fault: Fault = "none") -> None:
        parts = urlsplit(upstream)
        self._upstream = parts.hostname or "127.0.0.1", parts.port or 80
        self.fault: Fault = fault
        self.asked = self.left = self.open = 0
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self.revive()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def kill(self) -> None:
        """As a process that is killed: open connections are reset, and nobody listens any more."""
        asyncio.run_coroutine_threadsafe(self._kill(), self._loop).result()

    def revive(self) -> None:
        """Listen again, at the same port."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _kill(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        try:
            request = await _request(reader)
            self.asked += not request.startswith(b"GET")
            answering = asyncio.ensure_future(self._answer(request, writer))
            leaving = asyncio.ensure_future(reader.read())  # a client sends no more: its end is its leaving
            done, _ = await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            self.left += answering not in done
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        if self.fault == "hang":
            await asyncio.Event().wait()
        if self.fault == "reset":
            writer.transport.abort()
            return
        reply = {"rubbish": RUBBISH, "busy": BUSY}.get(self.fault) or await self._passed_on(request)
        if self.fault == "half":
            reply = reply[: len(reply) // 2]
        if self.fault == "slow":
            await asyncio.sleep(LATENCY)
        for at in range(0, len(reply), PIECE if self.fault == "slow" else len(reply) or 1):
            writer.write(reply[at : at + PIECE] if self.fault == "slow" else reply)
            await writer.drain()
            await asyncio.sleep(GAP if self.fault == "slow" else 0)

    async def _passed_on(self, request: bytes) -> bytes:
        """All bytes of the server's reply, which says that the connection ends: else the client may use it again."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request)
            head, end, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.transport.abort()
        said = b"" if b"\r\nconnection:" in head.lower() or not end else b"\r\nConnection: close"
        return head + said + end + body


async def _request(reader: asyncio.StreamReader) -> bytes:
    """A whole request, which asks the server to close the connection after its reply."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    kept = [line for line in lines if not line.lower().startswith((b"connection:", b"host:"))]
    return b"\r\n".join([first, *kept, b"Host: 127.0.0.1", b"Connection: close", b"", b""]) + body
