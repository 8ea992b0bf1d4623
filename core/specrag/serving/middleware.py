"""What stands around the routes, as plain ASGI: request ids and logs, the door, and limits of bodies.

FastAPI reads a body before it asks any dependency, so whoever may not send one is turned away here. Starlette's own
``RequestBodyLimitMiddleware`` tells a body that is too large in plain text and knows no slow clients.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import MutableMapping
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specrag.serving import errors
from specrag.serving.errors import ApiError, BodyError, busy
from specrag.serving.keys import Owner
from specrag.serving.logs import log
from specrag.serving.state import State

#: What needs no key, and is answered while the server drains.
OPEN = ("/", "/health", "/ready")
WATCHED = ("/health", "/ready", "/metrics")
#: The slowest that a body may come, in bytes per second.
SLOWEST = 8192
# A client's own request id is taken where it can stand in a log.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def noted(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """What is told of a request in its line of the log. Routes add to it."""
    found: dict[str, Any] = scope.setdefault("state", {}).setdefault("noted", {})
    return found


class Observed:
    """Gives each request an id, a line in the log and its place in the metrics; answers what nothing else caught."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"  # noqa: A001
        scope.setdefault("state", {})["request_id"] = id
        began, status = perf_counter(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = id
                headers.setdefault("Cache-Control", "no-store")
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:
            log.error("failure", exc_info=error, extra={"fields": {"request": id}})
            if status:  # half of the response is out: the connection ends
                raise
            await errors.of_failure(error).response()(scope, receive, send_marked)
        finally:
            self._tell(scope, id, status or 499, perf_counter() - began)

    def _tell(self, scope: Scope, id: str, status: int, seconds: float) -> None:  # noqa: A002
        route = getattr(scope.get("route"), "path", "none")  # never the path itself, which clients choose
        self._state.metrics.requests.labels(route, str(status)).inc()
        self._state.metrics.seconds.labels(route).observe(seconds)
        fields = {"request": id, "method": scope["method"], "route": route, "status": status}
        level = log.debug if route in WATCHED else log.info
        level("request", extra={"fields": {**fields, "seconds": round(seconds, 4), **noted(scope)}})


class Door:
    """Turns away requests without a key, and new ones while the server drains, before their bodies are read."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        try:
            scope["state"]["owner"] = self._owner(scope, path)
            if self._state.draining and path not in WATCHED:
                raise busy(503, "the server is stopping: send the request to another one", "draining", 5.0)
        except ApiError as error:
            noted(scope)["code"] = error.code
            await error.response()(scope, receive, _closing(send))
            return
        if path in WATCHED:
            await self._app(scope, receive, send)
            return
        self._state.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.in_flight -= 1

    def _owner(self, scope: Scope, path: str) -> Owner:
        keys = self._state.settings.keys
        if keys is None or path in OPEN:
            return Owner()
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        owner = keys.owner_of(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            said = "Incorrect API key provided" if key else "You didn't provide an API key"
            raise ApiError(
                401,
                f"{said}: send it in the header Authorization: Bearer YOUR_KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        noted(scope)["key"] = owner.name
        return owner


class BodyLimits:
    """Refuses bodies that are too large (413) or come too slowly (408).

    A body whose ``Content-Length`` says that it is too large is not read at all.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._settings = app, state.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["method"] == "POST" and scope["path"].endswith("/v1/files")
        limit = self._settings.max_upload if upload else self._settings.max_body
        body = _Body(receive, limit, self._settings.read_timeout, upload)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > limit:
            error = _too_large(limit, upload=upload).told
            noted(scope)["code"] = error.code
            await error.response()(scope, receive, _closing(send))
            return

        async def send_closing(message: Message) -> None:
            await (_closing(send) if body.refused else send)(message)

        await self._app(scope, body.receive, send_closing)


class _Body:
    """Receives the body of one request."""

    def __init__(self, receive: Receive, limit: int, timeout: float, upload: bool) -> None:
        self._receive, self._limit, self._timeout, self._upload = receive, limit, timeout, upload
        self._size, self._began, self._whole = 0, perf_counter(), False
        self.refused = False

    async def receive(self) -> Message:
        if self._whole:  # only the end of the connection can come
            return await self._receive()
        left = self._began + self._timeout + self._size / SLOWEST - perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, min(left, self._timeout)))
        except asyncio.TimeoutError:
            self.refused = True
            raise BodyError(ApiError(408, "the body of the request came too slowly", code="request_timeout")) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                self.refused = True
                raise _too_large(self._limit, upload=self._upload)
        return message


def _too_large(limit: int, *, upload: bool) -> BodyError:
    what, param = ("the file", "file") if upload else ("the body of the request", None)
    return BodyError(ApiError(413, f"{what} is larger than {limit} bytes", param=param, code="too_large"))


def _closing(send: Send) -> Send:
    """``send`` for a response after which the connection ends: the rest of the body is not read."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["Connection"] = "close"
        await send(message)

    return send_and_close
