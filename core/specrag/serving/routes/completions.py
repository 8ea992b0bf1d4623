"""``/v1/chat/completions`` and ``/v1/completions``: one reply, whole or streamed."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from time import perf_counter
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from specrag.serving import errors, rapid, speculative
from specrag.serving.asked import Asked, asked
from specrag.serving.errors import ApiError, ClientGoneError, not_found, refused
from specrag.serving.logs import log
from specrag.serving.middleware import noted
from specrag.serving.models import RAPID, SPECULATIVE
from specrag.serving.replies import Finished, Reply, Shape, Told, sent, sent_error
from specrag.serving.requests import ChatRequest, CompletionRequest, Generation
from specrag.serving.routes._common import OwnerOf, StateOf, unless_gone
from specrag.serving.state import State

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    request: Request, body: Annotated[ChatRequest, Body()], state: StateOf, owner: OwnerOf
) -> Response:
    """A reply to a conversation, as OpenAI's API has it."""
    return await _replied(request, body, asked(body, owner, state.settings.max_tokens), state)


@router.post("/v1/completions")
async def completions(
    request: Request, body: Annotated[CompletionRequest, Body()], state: StateOf, owner: OwnerOf
) -> Response:
    """A reply to a prompt, as OpenAI's API has it."""
    return await _replied(request, body, asked(body, owner, state.settings.max_tokens), state)


async def _replied(request: Request, body: Generation, question: Asked, state: State) -> Response:
    reply = _reply(question, state)  # refuses what cannot be asked, before it waits for a turn
    chat = isinstance(body, ChatRequest)
    shape = Shape(f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", body.model, chat)
    turn = AsyncExitStack()
    waited = await unless_gone(request, turn.enter_async_context(state.gate.turn()))
    log.debug("asked", extra={"fields": {"request": request.state.request_id, "question": question.question}})
    work = _Work(reply, state, question, noted(request.scope), waited)
    if body.stream:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        chunks = shape.streamed(work.counted(), usage=usage, events=question.options.events)
        return _Turn(turn, _events(chunks, work))
    async with turn:
        try:
            return JSONResponse(await unless_gone(request, shape.whole(work.counted())))
        except Exception as error:
            raise work.failed(error) from error


def _reply(question: Asked, state: State) -> Reply:
    """The reply, not begun.

    Raises:
        ApiError: The model, the index or a file is not there, or the model takes no files.
    """
    models, model = state.loaded, question.model
    if model.partition("/")[0] == SPECULATIVE and models.rag is not None:
        name, index = models.index(question.owner, model, question.options.index)
        if question.file_ids:
            raise refused(f"files go with the model {RAPID!r}", "specrag.file_ids", "unsupported_value")
        _ = question.question  # refused here where it is empty
        top = state.settings.top
        return speculative.reply(models.rag, index, name, question, top, state.metrics, arrived=perf_counter())
    if model != RAPID or state.rapid is None:
        raise not_found(f"the model {model[:80]!r}", "model", "model_not_found")
    files = [state.files.get(question.owner, file, "specrag.file_ids").text for file in question.file_ids]
    _ = question.question
    return rapid.measured(state.rapid.reply(question, files, state.settings.max_tokens), state.metrics)


class _Work:
    """The work on one reply: what it comes to in metrics and logs, and what its errors are for the client."""

    def __init__(self, reply: Reply, state: State, asked: Asked, fields: dict[str, Any], waited: float) -> None:
        self._reply, self._state, self._asked, self._fields = reply, state, asked, fields
        self._model = asked.model.partition("/")[0]
        self._waited = waited
        fields.update(model=self._model, queued=round(waited, 4))

    async def counted(self) -> Reply:
        """The reply as it comes."""
        outcome = "cancelled"
        try:
            async with aclosing(self._reply) as items:  # type: ignore[type-var]
                async for item in items:
                    if isinstance(item, Finished):
                        outcome = "abstained" if item.details["abstained"] else "answered"
                        self._tell(item)
                    elif isinstance(item, Told) and item.event["type"] == "draft":
                        self._fields["drafts"] = self._fields.get("drafts", 0) + 1
                    yield item
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._fields["outcome"] = outcome
            self._state.metrics.answers.labels(self._model, outcome).inc()

    def failed(self, error: Exception) -> Exception:
        """``error`` as the client is told of it; the log has the rest."""
        if isinstance(error, ClientGoneError):
            return error
        param = "specrag.file_ids" if self._asked.file_ids else self._asked.where
        told = errors.of_failure(error, param=param)
        self._fields["code"] = told.code
        if told.status >= 500:
            log.error("failure", exc_info=error, extra={"fields": {"model": self._model}})
        return told

    def _tell(self, end: Finished) -> None:
        self._fields.update(prompt_tokens=end.prompt_tokens, completion_tokens=end.completion_tokens)
        self._state.metrics.tokens.labels(self._model, "prompt").inc(end.prompt_tokens)
        self._state.metrics.tokens.labels(self._model, "completion").inc(end.completion_tokens)
        timings = end.details["timings"]
        timings["queue"] = self._waited


async def _events(chunks: AsyncIterator[dict[str, Any]], work: _Work) -> AsyncIterator[bytes]:
    """Chunks as server-sent events. An error after the first of them is an event too."""
    try:
        async with aclosing(chunks) as made:  # type: ignore[type-var]
            async for chunk in made:
                yield sent(chunk)
        yield sent("[DONE]")
    except Exception as error:
        told = work.failed(error)
        yield sent_error(told if isinstance(told, ApiError) else errors.of_failure(told))


class _Turn(StreamingResponse):
    """A stream that holds its turn until it has ended, however it ends."""

    def __init__(self, turn: AsyncExitStack, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._turn, self._content = turn, content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._turn, aclosing(self._content):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)
