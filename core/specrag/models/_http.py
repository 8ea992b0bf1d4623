"""One request to one OpenAI-compatible server, and what its failure means.

``UnavailableError``      may pass: it could not be reached, is busy or broken, or its answer cannot be used
``RefusedError``          it refused this request
``NoSuchEndpointError``   it has no such path
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx

from specrag.errors import InvalidInputError, ServerError, described
from specrag.models._circuit import Server
from specrag.models._secrets import redacted

# HTTP statuses below 500 after which a request is repeated.
_RETRIED = (408, 409, 425, 429)
# Of those from 500 on, the ones after which it is not.
_FINAL = (501, 505)
# Bytes of a reply that are read. A prompt of 100,000 tokens with its log-probabilities has some 10 MB.
LARGEST_REPLY = 64 * 2**20
#: Content encodings that are read. A piece of 64 KiB of them has at most 64 MiB.
ENCODINGS = ("gzip", "deflate", "identity")


class UnavailableError(ServerError):
    """The server gives no usable answer at the moment.

    Attributes:
        wait: Seconds that it asks to wait.
        reached: It was reached.
        refused: Nobody listens at its address, or the address does not exist: that is known at once.
    """

    def __init__(self, message: str, *, wait: float = 0.0, reached: bool = True, refused: bool = False) -> None:
        super().__init__(message)
        self.wait, self.reached, self.refused = wait, reached, refused


class RefusedError(ServerError):
    """The server refused the request; to repeat it there would not help.

    Attributes:
        said: What the server says, without its address.
    """

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said


class NoSuchEndpointError(RefusedError):
    """The server has no such path."""


def server_at(url: str) -> Server:
    """The server of a base URL. User and password are taken out of the URL and sent as basic authentication.

    Raises:
        InvalidInputError: It is no base URL. The message shows no credentials.
    """
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise InvalidInputError(f"base_url must begin with http:// or https://, got {redacted(repr(url))}")
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInputError(f"base_url is no URL: {redacted(str(error))}") from None
    if not host:
        raise InvalidInputError(f"base_url names no host: {redacted(repr(url))}")
    if parts.query or parts.fragment:
        raise InvalidInputError(
            f"base_url must end with its path, like http://{host}/v1, and has a query: "
            "give keys as api_key= or headers="
        )
    auth = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
    return Server(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/"), auth)


async def fetch(
    client: httpx.AsyncClient,
    server: Server,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    timeout: float,
    secrets: Sequence[str] = (),
) -> Any:
    """The decoded JSON of a server's reply.

    Args:
        timeout: Seconds for the whole of it, the reading included.
        secrets: What must not stand in an error.

    Raises:
        UnavailableError, RefusedError, NoSuchEndpointError: There is none.
    """
    hidden = (*secrets, *(server.auth or ()))
    try:
        response, content = await asyncio.wait_for(_exchange(client, server, method, path, body), timeout)
    except (TimeoutError, asyncio.TimeoutError):
        raise UnavailableError(f"no whole reply within {timeout:g} s (ReadTimeout)", reached=False) from None
    except httpx.DecodingError as error:
        raise UnavailableError(
            f"{server} answered with what cannot be decoded: {redacted(str(error), hidden)}"
        ) from None
    except (httpx.TransportError, httpx.InvalidURL, UnicodeError, OSError) as error:
        shown = redacted(described(error), hidden)
        raise UnavailableError(shown, reached=False, refused=isinstance(error, httpx.ConnectError)) from None
    server.met = True
    if response.status_code >= 300:
        raise _failure(response, content, server, path, hidden)
    if not content.strip():
        raise UnavailableError(f"{server} answered with nothing (HTTP {response.status_code}){_hint(server)}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        shown = redacted(repr(content[:80].decode(errors="replace")), hidden)
        raise UnavailableError(f"{server} did not answer with JSON: {shown}{_hint(server)}") from None


async def _exchange(
    client: httpx.AsyncClient, server: Server, method: str, path: str, body: Mapping[str, Any] | None
) -> tuple[httpx.Response, bytes]:
    auth = httpx.BasicAuth(*server.auth) if server.auth else None
    async with client.stream(method, f"{server.url}/{path}", json=body, auth=auth) as response:
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ENCODINGS:  # others, and several at once, may make gigabytes of the first few bytes
            raise UnavailableError(
                f"{server} answered in the content encoding {encoding[:40]!r}, asked for {' or '.join(ENCODINGS)}"
            )
        content = bytearray()
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > LARGEST_REPLY:
                raise UnavailableError(f"{server} answered with more than {LARGEST_REPLY // 2**20} MiB")
        return response, bytes(content)


def _failure(response: httpx.Response, content: bytes, server: Server, path: str, hidden: Sequence[str]) -> ServerError:
    status = response.status_code
    said, code = _said(content)
    problem = f"HTTP {status}: {redacted(said, hidden)}"
    if status < 400 and "location" in response.headers:
        to = redacted(response.headers["location"], hidden)
        return RefusedError(f"{server}/{path} redirects to {to}: give the address that it leads to as base_url")
    if code == "insufficient_quota" or status == 402:
        return RefusedError(f"{server}/{path}: the account's quota is used up: {problem}", said)
    if status in _RETRIED or (status >= 500 and status not in _FINAL):
        return UnavailableError(problem, wait=_retry_after(response))
    if status in (404, 405) and "model" not in said.lower():
        return NoSuchEndpointError(f"{server}/{path} refused the request: {problem}{_hint(server)}", said)
    return RefusedError(f"{server}/{path} refused the request: {problem}", said)


def _hint(server: Server) -> str:
    """What is often wrong with a base URL under which there is no API."""
    last = urlsplit(server.url).path.rpartition("/")[2]
    versioned = last[:1] == "v" and last[1:2].isdigit()
    return "" if versioned else f"; base_url has no version at its end: is it {server.url}/v1?"


def _said(content: bytes) -> tuple[str, str]:
    """What the server says about its error, and the error's code."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content[:300].decode(errors="replace"), ""
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return str(error)[:300], ""
    said = str(error.get("message", error))[:300]
    param = error.get("param")
    if isinstance(param, str) and param and param not in said:
        said += f" ({param})"
    return said, str(error.get("code") or error.get("type") or "")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, as a number or as a date; 0 where it does not say."""
    said = response.headers.get("retry-after", "0")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0 <= seconds < 86400 else 0.0
