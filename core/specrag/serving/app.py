"""The application: ``create_app``. It runs under uvicorn, or inside whatever else runs ASGI applications."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from specrag import __version__
from specrag._abandoned import in_thread
from specrag.serving.errors import ApiError, BodyError, of_validation
from specrag.serving.logs import log
from specrag.serving.middleware import BodyLimits, Door, Observed, noted
from specrag.serving.rapid import RapidReplies, RapidSessions
from specrag.serving.routes import completions, embeddings, files, operations
from specrag.serving.settings import ServerSettings
from specrag.serving.state import State


def create_app(settings: ServerSettings, *, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The application. Its models are loaded when it starts; until then ``/ready`` says 503.

    Args:
        settings: Models, keys and limits.
        on_failure: Called when the models could not be loaded. ``app.state.serving.failure`` is the error.
    """
    state = State(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state, on_failure))
        yield
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading

    # No pages of documentation: FastAPI's own load scripts from other hosts.
    app = FastAPI(title="specrag", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.serving = state
    for routes in (completions, embeddings, files, operations):
        app.include_router(routes.router)
    for middleware in (BodyLimits, Door, Observed):  # the last one is the outermost
        app.add_middleware(middleware, state=state)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(RequestValidationError, _tell_validation)
    app.add_exception_handler(HTTPException, _tell_http)
    return app


async def _load(state: State, on_failure: Callable[[], None]) -> None:
    try:
        models = await in_thread(state.settings.load)
        if state.settings.keys is not None:
            state.settings.keys.check_indexes(list(models.indexes))
    except Exception as error:
        state.failure = error
        on_failure()
        return
    if isinstance(models.rapid, RapidReplies):
        state.rapid = models.rapid
    elif models.rapid is not None:
        state.rapid = RapidSessions(models.rapid, state.settings.sessions, state.settings.session_bytes)
    state.models = models
    log.info("ready", extra={"fields": {"indexes": len(models.indexes), "rapid": models.rapid is not None}})


async def _tell(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    noted(request.scope).setdefault("code", error.code)
    return error.response()


async def _tell_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _tell(request, of_validation(error.errors()))


async def _tell_http(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: an unknown route, a method that it lacks, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyError):
        return await _tell(request, error.told)
    if error.status_code == 404:
        told = ApiError(404, f"Unknown request URL: {request.method} {request.url.path}", code="unknown_url")
    elif error.status_code == 405:
        told = ApiError(
            405, f"{request.method} is not allowed here", code="method_not_allowed", headers=dict(error.headers or {})
        )
    else:
        told = ApiError(error.status_code, str(error.detail), code="invalid_request")
    return await _tell(request, told)
