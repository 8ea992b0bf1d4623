"""Requests to OpenAI-compatible servers: a pool of base URLs, retries, and what each server says about itself.

A pool knows no conversation: it sends JSON objects and returns JSON objects. What a request means is the caller's.

    ``ServerPool._choose``   which server gets a request
    ``ServerPool._send``     one request to one server
    ``ServerPool._request``  which failures are repeated, and after how long
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from specrag.errors import InvalidInputError, ServerError

# Servers whose /completions take token ids and return them.
TAKES_TOKEN_IDS = ("vllm",)
# HTTP statuses after which a request is repeated.
RETRIED = (408, 409, 429, 500, 502, 503, 504)
# Seconds: the longest pause before a repetition, whatever the server asks for.
LONGEST_WAIT = 30.0
# Seconds for which a server that could not be reached gets no requests while others of the pool do.
PASSED_OVER = 15.0

T = TypeVar("T")


class AnsweredError(ServerError):
    """The server is there and answered with an error."""


class RefusedError(AnsweredError):
    """The server refused the request; to repeat it would not help."""


class NoSuchEndpointError(RefusedError):
    """The server has no such path."""


@dataclass
class Server:
    """One base URL: what it is, and its state. Times are monotonic seconds.

    Attributes:
        url: Without a slash at the end.
        vendor: Who made it, as it says; "" where it does not say, ``None`` before it was asked.
        window: Tokens that prompt and completion may have together; ``None`` where it does not say.
        in_flight: Requests under way.
        away_until: It could not be reached; until then, others of the pool are asked first.
    """

    url: str
    vendor: str | None = None
    window: int | None = None
    in_flight: int = 0
    away_until: float = 0.0

    @property
    def away(self) -> bool:
        """Whether it could not be reached a moment ago."""
        return self.away_until > time.monotonic()

    def __str__(self) -> str:
        """Its URL, without the credentials that may be in it."""
        scheme, found, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"


@dataclass
class _Connection:
    """What belongs to one event loop: the client's connections and the limit on concurrent requests."""

    client: httpx.AsyncClient
    limit: asyncio.Semaphore
    discovery: asyncio.Lock = field(default_factory=asyncio.Lock)


class ServerPool:
    """One or several OpenAI-compatible servers that serve the same model. Usable from several event loops.

    Args:
        base_url: Up to and including ``/v1``. With several URLs, each request goes to the least busy server.
        model: The name under which the servers know the model.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        max_concurrency: Requests under way at once, over all URLs, per event loop.
        timeout: Seconds for one request.
        retries: How often a request is repeated after 408, 409, 429, 5xx or a connection error.
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
        max_concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise InvalidInputError("base_url is empty: give at least one, like http://127.0.0.1:8000/v1")
        self.servers = [Server(url.rstrip("/")) for url in urls]
        for server in self.servers:
            if not server.url.startswith(("http://", "https://")):
                raise InvalidInputError(f"base_url must begin with http:// or https://, got {str(server)!r}")
        for name, value, least in (
            ("max_concurrency", max_concurrency, 1),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < least:
                raise InvalidInputError(f"{name} must be at least {least}, got {value}")
        if not timeout > 0:
            raise InvalidInputError(f"timeout must be a positive number of seconds, got {timeout}")
        self.model = model
        self._api_key = api_key
        self._max_concurrency, self._timeout = max_concurrency, timeout
        self._retries, self._backoff = retries, backoff
        self._connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Connection] = (
            weakref.WeakKeyDictionary()
        )

    def __str__(self) -> str:
        return ", ".join(map(str, self.servers))

    # --- what is known of the servers ---------------------------------------------------------------

    @property
    def takes_token_ids(self) -> bool:
        """Whether a prompt may be a list of token ids, as far as the servers are known."""
        return bool(self._known) and all(server.vendor in TAKES_TOKEN_IDS for server in self._known)

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and completion may have together: the smallest that a server reports."""
        return min((server.window for server in self.servers if server.window), default=None)

    @property
    def _known(self) -> list[Server]:
        return [server for server in self.servers if server.vendor is not None]

    async def discover(self) -> None:
        """Ask each server once what it is. One of several that is away is asked when it is back.

        Raises:
            ServerError: None of them could be reached.
        """
        if all(server.vendor is not None or server.away for server in self.servers) and self._known:
            return
        async with self._connection().discovery:
            problem: ServerError | None = None
            for server in [server for server in self.servers if server.vendor is None]:
                try:
                    self._learn(server, await self._request("GET", "models", only=server))
                except AnsweredError:  # it is there, and cannot list its models
                    server.vendor = ""
                except ServerError as error:
                    problem = error
            if problem is not None and not self._known:
                raise problem

    def _learn(self, server: Server, listing: Mapping[str, Any]) -> None:
        entries = [entry for entry in listing.get("data") or () if isinstance(entry, Mapping)]
        mine = next((entry for entry in entries if entry.get("id") == self.model), entries[0] if entries else {})
        window = mine.get("max_model_len")
        server.window = window if isinstance(window, int) else None
        server.vendor = str(mine.get("owned_by") or "")

    # --- requests -----------------------------------------------------------------------------------

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request for ``model``; entries of ``body`` that are ``None`` are left out.

        Raises:
            NoSuchEndpointError: The server has no ``path``.
            RefusedError: It refused the request.
            ServerError: No server could be reached, or the reply is no JSON object.
        """
        given = {key: value for key, value in body.items() if value is not None}
        return await self._request("POST", path, {"model": self.model, **given})

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.client.aclose()

    def _connection(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            limits = httpx.Limits(max_connections=None)
            client = httpx.AsyncClient(headers=headers, timeout=self._timeout, limits=limits)
            self._connections[loop] = _Connection(client, asyncio.Semaphore(self._max_concurrency))
        return self._connections[loop]

    def _choose(self) -> Server:
        """The least busy server; those that are away come last."""
        return min(self.servers, key=lambda server: (server.away, server.in_flight))

    async def _send(self, server: Server, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        """One request to one server, as soon as the limit on concurrent requests allows it.

        Raises:
            httpx.TransportError: It could not be reached, or gave no answer in time.
        """
        connection = self._connection()
        async with connection.limit:
            server.in_flight += 1
            try:
                response = await connection.client.request(method, f"{server.url}/{path}", json=body)
            except httpx.TransportError:
                server.away_until = time.monotonic() + PASSED_OVER
                raise
            finally:
                server.in_flight -= 1
        if response.status_code < 400:
            server.away_until = 0.0
        return response

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, only: Server | None = None
    ) -> dict[str, Any]:
        """The reply of a server that the pool chooses, repeated after failures that may pass; or of ``only``.

        ``only`` is asked once where there are others, and any error that it answers with is final.
        """
        attempts = 1 + (self._retries if only is None or len(self.servers) == 1 else 0)
        for attempt in range(attempts):
            server = only or self._choose()
            wait = min(LONGEST_WAIT, self._backoff * 2**attempt)
            try:
                response = await self._send(server, method, path, body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code < 400:
                    return _json(response, server)
                problem = f"HTTP {response.status_code}: {self._redact(_message(response))}"
                if only is not None:
                    raise AnsweredError(f"{server}/{path}: {problem}")
                if response.status_code not in RETRIED:
                    missing = response.status_code in (404, 405) and "model" not in _message(response).lower()
                    kind = NoSuchEndpointError if missing else RefusedError
                    raise kind(f"{server}/{path} refused the request: {problem}")
                wait = max(wait, min(LONGEST_WAIT, _retry_after(response)))
            if attempt + 1 < attempts:
                await asyncio.sleep(wait)
        raise ServerError(
            f"no answer from {server}/{path} after {attempts} attempts ({self._redact(problem)}): "
            "is the server running, and base_url right?"
        )

    def _redact(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


async def all_or_none(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _json(response: httpx.Response, server: Server) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise ServerError(f"{server} did not answer with JSON: {response.text[:80]!r}") from error
    if not isinstance(value, dict):
        raise ServerError(f"{server} answered with a JSON {type(value).__name__}, expected an object")
    return value


def _message(response: httpx.Response) -> str:
    """What the server says about its error."""
    try:
        value = response.json()
    except ValueError:
        return response.text[:300]
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
