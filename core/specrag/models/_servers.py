"""A pool of OpenAI-compatible servers that serve the same model: which one gets a request, and what if it fails.

A request goes from one server to the next until one gives a usable answer (``_dispatch``), and again after a pause
where the failures may pass. It is lost only when every server of the pool has failed it.

A pool knows no conversation: it sends JSON objects and returns JSON objects. What a request means is the caller's.

    ``ServerPool._request``   what is repeated, and after how long
    ``ServerPool.discover``   what each server says about itself
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from specrag._fields import check_numbers, check_whole_numbers
from specrag.errors import InvalidInputError, ServerError, kind_of
from specrag.models._circuit import PASSED_OVER, Server
from specrag.models._connections import Connection, Connections, client
from specrag.models._discovery import DISCOVERY, Look
from specrag.models._dispatch import Ask, Dispatcher, Failures, Json
from specrag.models._http import NoSuchEndpointError, RefusedError, UnavailableError, fetch, server_at
from specrag.models._secrets import secrets_of

__all__ = ["NoSuchEndpointError", "RefusedError", "ServerPool", "UnavailableError", "all_or_none"]

# Servers whose /completions take token ids and return them.
TAKES_TOKEN_IDS = ("vllm", "llamacpp")
# Seconds that the other servers of a pool have to say what they are after the first one has.
DISCOVERY_REST = 0.3
# How often a request is repeated to addresses at which nobody listens and nobody ever did.
RETRIES_UNMET = 1

T = TypeVar("T")


class ServerPool:
    """One or several OpenAI-compatible servers that serve the same model. Usable from several event loops.

    Args:
        base_url: Up to and including ``/v1``. With several URLs, each request goes to the least busy server.
        model: The name under which the servers know the model.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        headers: Sent with every request. Their values appear in no error.
        max_concurrency: Requests under way at once, per URL and event loop.
        max_waiting: Requests that may wait for their turn, per event loop. Requests of one call beyond those that may
            be under way wait in the call, and do not count.
        timeout: Seconds for one request.
        retries: How often a request is repeated that no server answered: after 408, 409, 425, 429, 5xx, a connection
            error, or a reply that cannot be used. Once at most, where nobody listens at any of the addresses and nobody
            ever did.
        backoff: Seconds before the first repetition, doubled for each further one. ``Retry-After`` is obeyed.

    Raises:
        InvalidInputError: An argument cannot be used.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_concurrency: int = 16,
        max_waiting: int = 1024,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        if not isinstance(base_url, Iterable):
            raise InvalidInputError(f"base_url must be a URL or a list of them, got {kind_of(base_url)}")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise InvalidInputError("base_url is empty: give at least one, like http://127.0.0.1:8000/v1")
        self.servers = [server_at(url) for url in urls]
        check_whole_numbers(least=1, max_concurrency=max_concurrency)
        check_whole_numbers(least=0, retries=retries, max_waiting=max_waiting)
        check_numbers(backoff=backoff, timeout=timeout)
        if not backoff >= 0:
            raise InvalidInputError(f"backoff must be at least 0, got {backoff}")
        if not timeout > 0:
            raise InvalidInputError(f"timeout must be a positive number of seconds, got {timeout}")
        sent = _checked_headers(headers, api_key)
        self.model = model
        self._secrets = (*((api_key,) if api_key else ()), *(dict(headers or {}).values()), *secrets_of(sent))
        self._timeout, self._retries = timeout, retries
        self._given_up = 0.0  # until then, a request is not repeated: another one was, in vain
        self._dispatcher = Dispatcher(timeout, retries, backoff, self._secrets)
        self._permits = max_concurrency
        look = Look(model, min(timeout, DISCOVERY), self._secrets)
        self._connections = Connections(
            lambda: Connection(client(sent), self.servers, max_concurrency, max_waiting, look)
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.servers))

    # --- what is known of the servers ---------------------------------------------------------------

    @property
    def takes_token_ids(self) -> bool:
        """Whether a prompt may be a list of token ids, as far as the servers are known."""
        return bool(self._known) and all(server.vendor in TAKES_TOKEN_IDS for server in self._known)

    @property
    def at_once(self) -> int:
        """Requests that may be under way at once."""
        return self._permits * len(self.servers)

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and completion may have together: the smallest that a server reports."""
        return min((server.window for server in self.servers if server.window), default=None)

    @property
    def _known(self) -> list[Server]:
        return [server for server in self.servers if server.vendor is not None]

    async def discover(self) -> None:
        """Ask the servers what they are; each once, whoever waits for it, and one that is away after some seconds.

        Returns when all have answered or failed, or soon after the first one is known.
        """
        now = time.monotonic()
        if all(server.vendor is not None or now < server.ask_again for server in self.servers):
            return
        connection = await self._connections.current()
        for server in self.servers:
            if server.vendor is None and now >= server.ask_again:
                connection.probe(server)
        end = None if not self._known else now + DISCOVERY_REST
        while connection.probes and (end is None or time.monotonic() < end):
            rest = None if end is None else max(0.0, end - time.monotonic())
            await asyncio.wait(list(connection.probes.values()), timeout=rest, return_when=asyncio.FIRST_COMPLETED)
            if end is None and self._known:
                end = time.monotonic() + DISCOVERY_REST

    async def check(self) -> None:
        """Whether somebody listens at one of the addresses at least. Takes some seconds at most.

        Raises:
            ServerError: Nobody does.
        """
        connection = await self._connections.current()
        problems = Failures()

        async def ask(server: Server) -> None:
            timeout = min(self._timeout, DISCOVERY)
            try:
                await fetch(connection.client, server, "GET", "models", None, timeout=timeout, secrets=self._secrets)
            except ServerError as error:
                problems.of[server] = error

        await asyncio.gather(*map(ask, self.servers))
        if len(problems.of) == len(self.servers) and problems.refused:
            server, error = next(iter(problems.of.items()))
            raise ServerError(f"no answer from {server} ({error}){_advice(error)}")

    # --- requests -----------------------------------------------------------------------------------

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[Json], T] | None = None) -> Any:
        """The reply to a request for ``model``; entries of ``body`` that are ``None`` are left out.

        Args:
            read: What is made of the reply. Where it raises a ``ServerError``, the reply counts as a failure of its
                server. By default, the reply as it is.

        Raises:
            NoSuchEndpointError: No server has ``path``.
            RefusedError: They refused the request.
            ServerBusyError: More than ``max_waiting`` requests wait.
            ServerError: No server could be reached, or none gave a reply that can be used.
        """
        given = {key: value for key, value in body.items() if value is not None}
        return await self._request(Ask("POST", path, {"model": self.model, **given}, read or (lambda reply: reply)))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._connections.aclose()

    async def _request(self, ask: Ask) -> Any:
        """What a server answered, repeated after failures that may pass."""
        connection = await self._connections.current()
        attempts = 1 + (self._retries if time.monotonic() >= self._given_up else 0)
        failures = Failures()
        for attempt in range(attempts):
            asked = [server for server in self.servers if server not in failures.refusals]
            done, value = await self._dispatcher.round(connection, ask, asked, failures)
            if done:
                self._given_up = 0.0
                for server in failures.refusals:
                    server.failed()  # another server took what it refused
                return value
            if failures.refusals and not failures.may_pass:
                break
            if failures.refused and attempt >= RETRIES_UNMET and not any(server.met for server in self.servers):
                break
            if attempt + 1 < attempts:
                await asyncio.sleep(self._pause(attempt, failures))
        raise self._error(ask, attempt + 1, failures)

    def _pause(self, attempt: int, failures: Failures) -> float:
        asked = [error.wait for error in failures.of.values() if isinstance(error, UnavailableError)]
        return self._dispatcher.pause(attempt, min(asked, default=0.0))

    def _error(self, ask: Ask, attempts: int, failures: Failures) -> ServerError:
        if refusals := list(failures.refusals.values()):
            others = [error for error in refusals if not isinstance(error, NoSuchEndpointError)]
            return (others or refusals)[0]
        server, error = next(reversed(failures.of.items()))
        if failures.away:
            self._given_up = time.monotonic() + PASSED_OVER
        advice = _advice(error) if failures.away else ""
        return ServerError(f"no answer from {server}/{ask.path} after {attempts} attempts ({error}){advice}")


def _advice(error: ServerError) -> str:
    """What to do about a server that cannot be reached."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ": name a file with the certificate of its authority in SSL_CERT_FILE"
    return ": is the server running, and base_url right?"


def _checked_headers(headers: Mapping[str, str] | None, api_key: str | None) -> dict[str, str]:
    if not isinstance(api_key, str | None):
        raise InvalidInputError(f"api_key must be a text, got {kind_of(api_key)}")
    sent = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    for name, value in dict(headers or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidInputError(f"headers must map names to strings, got {name!r}: {kind_of(value)}")
        sent[name] = value
    for name, value in sent.items():
        if not value.isascii() or not value.isprintable() or value != value.strip():
            what = "api_key" if name == "Authorization" and api_key else f"the header {name}"
            raise InvalidInputError(f"{what} must be printable ASCII without white space at its ends")
    return sent


async def all_or_none(coroutines: Sequence[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """All results, in order, of which ``at_once`` are made at a time; the first failure cancels the rest."""
    turns = asyncio.Semaphore(at_once)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with turns:
            return await coroutine

    tasks = [asyncio.ensure_future(one(coroutine)) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for coroutine in coroutines:
            coroutine.close()  # those that never began
