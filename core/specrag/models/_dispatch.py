"""One request, sent from one server of a pool to the next until one of them gives a usable answer.

It goes to the least busy server that is well. Whatever is no usable answer counts against its server (``_circuit``),
and the request moves on. A server that takes much longer than is usual gets company: the request is also sent to
another one, and the first answer counts. So a server that hangs costs no question, and keeps no other one busy.
Where that other one has failed the request before, it is asked once more after a pause.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrag._fields import json_kind
from specrag.errors import ServerError
from specrag.models._circuit import Server
from specrag.models._connections import Connection
from specrag.models._http import RefusedError, UnavailableError, fetch
from specrag.models._problems import note_problem
from specrag.models._secrets import redacted

# A request is late after so many times the median of the last ones, in seconds at least; and before there is one.
LATE, LATE_LEAST, LATE_UNKNOWN = 3.0, 0.3, 2.0
# Seconds after which a late request is looked at again, where no other server can take it now.
LOOK_AGAIN = 0.1
# Seconds: the longest pause before a repetition, whatever the server asks for.
LONGEST_WAIT = 30.0
# Seconds that a server which is not well has for a request that another one has refused.
SECOND_OPINION = 10.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request, and what its reply must be: ``read`` raises a ``ServerError`` where it cannot be used."""

    method: str
    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Json], Any]

    @property
    def size(self) -> tuple[str, int]:
        """What takes about as long: the endpoint, and the power of two of how much is asked for."""
        body = self.body or {}
        asked = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        texts = body.get("input")
        return self.path, (len(texts) if isinstance(texts, list) else int(asked)).bit_length()


@dataclass
class Failures:
    """How a request failed, by server: the last failure of each."""

    of: dict[Server, ServerError] = field(default_factory=dict)

    @property
    def refusals(self) -> dict[Server, RefusedError]:
        """Of the servers that refused it."""
        return {server: error for server, error in self.of.items() if isinstance(error, RefusedError)}

    @property
    def away(self) -> bool:
        """Whether no server was reached."""
        return not any(self.reached(error) for error in self.of.values())

    @property
    def refused(self) -> bool:
        """Whether nobody listens at any of the addresses."""
        return all(isinstance(error, UnavailableError) and error.refused for error in self.of.values())

    @property
    def may_pass(self) -> bool:
        """Whether a server that did not refuse it was reached."""
        return any(self.reached(error) for server, error in self.of.items() if server not in self.refusals)

    @staticmethod
    def reached(error: ServerError) -> bool:
        """Whether the failure is an answer."""
        return not isinstance(error, UnavailableError) or error.reached


@dataclass
class _Round:
    """The state of a request that goes from one server of ``left`` to the next.

    Attributes:
        left: Servers that were not asked yet.
        running: The requests under way, with their servers and the times at which they began.
        again: Servers with a passing failure, and the time (``monotonic``) from which they may be asked once more.
        repeats: How often each was asked once more.
    """

    left: list[Server]
    running: dict[asyncio.Task[Any], tuple[Server, float]] = field(default_factory=dict)
    again: dict[Server, float] = field(default_factory=dict)
    repeats: Counter[Server] = field(default_factory=Counter)

    @property
    def fit(self) -> list[Server]:
        """Servers that may be asked now: their circuit is closed, or the pause after their failure is over."""
        now = time.monotonic()
        return [server for server in self.left if server.usable] + [s for s, at in self.again.items() if at <= now]

    @property
    def some_later(self) -> bool:
        """Whether any server may be asked, now or later."""
        return bool(self.left or self.again)

    def chosen(self, server: Server) -> None:
        """Note that ``server`` is asked."""
        if server in self.left:
            self.left.remove(server)
        else:
            self.repeats[server] += 1
            del self.again[server]

    def youngest(self) -> tuple[Server, float]:
        """The request that began last."""
        return max(self.running.values(), key=lambda one: one[1])


class Dispatcher:
    """Sends requests for a pool.

    Args:
        timeout: Seconds for one request.
        retries: How often a server is asked once more while others have the request.
        backoff: Seconds before the first time, doubled for each further one.
        secrets: What must not stand in an error.
    """

    def __init__(self, timeout: float, retries: int, backoff: float, secrets: Sequence[str]) -> None:
        self._timeout, self._retries, self._backoff, self._secrets = timeout, retries, backoff, secrets
        self._seconds: dict[tuple[str, int], deque[float]] = {}  # that the last requests of each size took

    async def round(
        self, connection: Connection, ask: Ask, asked: Sequence[Server], failures: Failures
    ) -> tuple[bool, Any]:
        """Whether a server gave a usable answer, and the answer.

        Each of ``asked`` is asked once, and once more after a pause as long as another one is late with its answer.

        Raises:
            ServerBusyError: Too many requests wait.
        """
        now = _Round(list(asked))
        try:
            while now.left or now.running:
                connection.check_up()
                server = await self._next(connection, ask, now)
                if server is not None:
                    now.chosen(server)
                    timeout = self._timeout
                    if failures.refusals and not server.usable:
                        timeout = min(timeout, SECOND_OPINION)
                    connection.take(server)
                    sent = self._send(connection, server, ask, timeout, hedge=bool(now.running))
                    now.running[asyncio.ensure_future(sent)] = server, time.monotonic()
                seconds = self._until_late(connection, ask, now)
                done, _ = await asyncio.wait(now.running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    server, _ = now.running.pop(task)
                    if (error := task.exception()) is None:
                        return True, task.result()
                    if not isinstance(error, ServerError):
                        raise error
                    failures.of[server] = error
                    note_problem(f"{server}: {error}")
                    if isinstance(error, UnavailableError) and now.repeats[server] < self._retries:
                        now.again[server] = time.monotonic() + self.pause(now.repeats[server], error.wait)
            return False, None
        finally:
            for task in now.running:
                task.cancel()
            if now.running:
                await asyncio.gather(*now.running, return_exceptions=True)

    def pause(self, repeats: int, wait: float) -> float:
        """Seconds before a request is repeated: ``wait`` is what the server asks for."""
        return min(LONGEST_WAIT, max(self._backoff * 2**repeats, wait))

    async def _next(self, connection: Connection, ask: Ask, now: _Round) -> Server | None:
        """The server that gets the request now; ``None`` where those that have it are given more time."""
        if not now.running:
            return await connection.wait_for(lambda: now.fit or now.left)
        if self._until_late(connection, ask, now) != 0.0:
            return None
        return connection.free(now.fit)

    def _until_late(self, connection: Connection, ask: Ask, now: _Round) -> float | None:
        """Seconds until the request should go to another server too; ``None`` where there is none that may take it."""
        if not now.some_later:
            return None
        server, began = now.youngest()
        known_sick = server.failures > 0 and len(now.running) == 1  # others have found that out
        rest = began + (LATE_LEAST if known_sick else self._late_after(ask)) - time.monotonic()
        if rest > 0:
            return rest
        # Where all are late, more requests would make it worse.
        too_many = not known_sick and connection.hedges >= max(1, sum(connection.busy.values()) // 4)
        return LOOK_AGAIN if too_many or connection.free(now.fit) is None else 0.0

    def _late_after(self, ask: Ask) -> float:
        took = sorted(self._seconds.get(ask.size, ()))
        return max(LATE_LEAST, LATE * took[len(took) // 2]) if took else LATE_UNKNOWN

    async def _send(self, connection: Connection, server: Server, ask: Ask, timeout: float, *, hedge: bool) -> Any:
        """What ``server`` answers. The permit was taken before and is given back."""
        began, tried = time.monotonic(), server.failures > 0
        connection.hedges += hedge
        try:
            reply = await fetch(
                connection.client,
                server,
                ask.method,
                ask.path,
                ask.body,
                timeout=timeout,
                secrets=self._secrets,
            )
            value = self._read(ask, server, reply)
        except UnavailableError as error:
            server.failed(error.wait, silent=not error.reached, down=error.refused)
            raise
        except asyncio.CancelledError:
            if tried or time.monotonic() - began > self._late_after(ask):
                server.failed(silent=True, late=True)  # another server was much faster, or nobody waits so long
            else:
                server.released()
            raise
        except BaseException:  # it refused the request; or an error of another kind, or the end of the event loop
            server.released()
            raise
        else:
            server.answered()
            self._seconds.setdefault(ask.size, deque(maxlen=20)).append(time.monotonic() - began)
            return value
        finally:
            connection.hedges -= hedge
            connection.give_back(server)

    def _read(self, ask: Ask, server: Server, reply: Any) -> Any:
        if not isinstance(reply, dict):
            raise UnavailableError(f"{server} answered with JSON that is {json_kind(reply)}, expected an object")
        try:
            return ask.read(reply)
        except RefusedError:  # the reply says that the server has no such endpoint
            raise
        except ServerError as error:
            raise UnavailableError(redacted(f"{server}: {error}", self._secrets)) from error
