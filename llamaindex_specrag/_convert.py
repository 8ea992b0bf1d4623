"""Conversion between LlamaIndex's types and the core's: nodes, models, answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, LogProb
from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index_instrumentation.span import active_span_id

from llamaindex_specrag._awaiting import embedder_awaits, llm_awaits
from llamaindex_specrag.embeddings import SpecRAGEmbedding
from specrag._abandoned import in_own_thread
from specrag._fields import embedding_in, title_in
from specrag._foreign import ForeignCalls
from specrag.baselines.base import System
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel, Reader
from specrag.models.chat import ChatLM, ChatReply, ChatRequest, ended_at_limit, own_options
from specrag.models.embedders import Embedder, unit_vectors
from specrag.schema import Passage, SpeculativeAnswer, Usage
from specrag.speculative._given import drafters_of, model_of
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.speculative.work import Work, current_work

# How many likely tokens OpenAI's completions endpoint gives at most.
_MOST_OF_COMPLETIONS = 5


def to_passage(node: NodeWithScore) -> Passage:
    """A node as the drafter reads it: its content in ``MetadataMode.LLM``, with the title apart where it has one."""
    inner = node.node
    metadata = getattr(inner, "metadata", None) or {}
    excluded = list(getattr(inner, "excluded_llm_metadata_keys", None) or [])
    title = None
    if "title" in metadata and "title" not in excluded and type(metadata["title"]) is not int:
        title = title_in(metadata)
        inner = inner.model_copy(update={"excluded_llm_metadata_keys": [*excluded, "title"]})
    return Passage(
        inner.get_content(metadata_mode=MetadataMode.LLM),
        title=title,
        id=node.node_id,
        score=node.score,
        embedding=embedding_in({"embedding": inner.embedding}),
        metadata=metadata,
    )


def as_model(model: Any, role: str) -> LanguageModel | Reader:
    """A core model as it is; a LlamaIndex LLM, wrapped; a bundled name or the folder of a trained reader, loaded.

    Raises:
        InvalidInputError: It is none of these.
        ModelNotFoundError: It is a name, and the model is not on this machine.
    """
    return model_of(
        model, role, lambda given: LlamaIndexLM(given) if isinstance(given, BaseLLM) else None, "a LlamaIndex LLM"
    )


def as_drafters(given: Any) -> LanguageModel | Reader | tuple[LanguageModel | Reader, ...]:
    """One drafter or a list of them, each converted by ``as_model``."""
    return drafters_of(given, as_model)


def as_embedder(embedder: Any) -> Embedder | None:
    """A core embedder as it is; a LlamaIndex embedding model wrapped.

    Raises:
        InvalidInputError: It is neither.
    """
    if embedder is None or isinstance(embedder, Embedder):
        return embedder
    if isinstance(embedder, SpecRAGEmbedding):
        return embedder.embedder
    if isinstance(embedder, BaseEmbedding):
        return LlamaIndexEmbedder(embedder)
    raise InvalidInputError(
        f"embedder must be a specrag Embedder or a LlamaIndex BaseEmbedding, got {kind_of(embedder)}"
    )


class LlamaIndexEmbedder(Embedder):
    """A LlamaIndex embedding model as a core embedder."""

    def __init__(self, model: BaseEmbedding) -> None:
        self._model, self._calls = model, ForeignCalls(model, awaits=embedder_awaits(model))
        self.name = model.model_name

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return unit_vectors(self._model.get_text_embedding_batch(list(texts)))

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:
        given = list(texts)
        return unit_vectors(
            await self._calls.call(
                lambda: self._model.get_text_embedding_batch(given),
                lambda: self._model.aget_text_embedding_batch(given),
            )
        )


class LlamaIndexLM(ChatLM):
    """A LlamaIndex LLM as a drafter or verifier.

    A blocking call of the pipeline uses the LLM's blocking methods, an awaited one its awaited methods. An LLM whose
    awaited methods block runs in threads. Log-probabilities are asked for where the LLM has the fields ``logprobs``
    and ``top_logprobs`` (``OpenAI``), in the form of the endpoint that it calls.
    """

    def __init__(self, llm: BaseLLM) -> None:
        super().__init__(kind_of(llm))
        self._llm, self._calls = llm, ForeignCalls(llm)
        self._span_of: Callable[[Work | None], str | None] = lambda work: None

    def inside(self, span_of: Callable[[Work | None], str | None]) -> LlamaIndexLM:
        """The same LLM for one call of a pipeline. ``span_of`` gives the span below which a piece of work belongs."""
        bound = copy.copy(self)
        bound._span_of = span_of
        return bound

    async def reply(self, request: ChatRequest) -> ChatReply:
        span = self._span_of(current_work.get())
        token = active_span_id.set(span) if span is not None else None
        try:
            answer = await self._asked(request)
        finally:
            if token is not None:
                active_span_id.reset(token)
        text = answer.text if isinstance(answer, CompletionResponse) else answer.message.content or ""
        used = answer.additional_kwargs or {}
        return ChatReply(
            text=text,
            content=chosen_tokens(text, answer.logprobs) if answer.logprobs else None,
            usage=Usage(int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)),
            cut=ended_at_limit(answer.raw) or ended_at_limit(used),
        )

    async def _asked(self, request: ChatRequest) -> ChatResponse | CompletionResponse:
        messages = [ChatMessage(role=role, content=text) for role, text in request.messages]
        options = self._options(request)
        llm: Any = self._llm
        given: Any = messages
        call, acall = llm.chat, llm.achat
        if "logprobs" in options and not llm.metadata.is_chat_model:  # a chat response does not carry a completion's
            given, call, acall = llm.messages_to_prompt(messages), llm.complete, llm.acomplete
            options["formatted"] = True
        if not llm_awaits(llm):
            return await in_own_thread(lambda: asyncio.run(acall(given, **options)))
        return await self._calls.call(lambda: call(given, **options), lambda: acall(given, **options))

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        """The options that the LLM has fields for; the others stay as the user configured them."""
        known = (
            set(getattr(type(self._llm), "model_fields", {}))
            - request.without
            - own_options(self._llm, request.sampling)
        )
        wanted: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.sampling.temperature,
            "stop": list(request.stop) or None,
        }
        count = max(1, request.top_log_probs)
        if request.log_probs and "top_logprobs" in known and self._llm.metadata.is_chat_model:
            wanted |= {"logprobs": True, "top_logprobs": count}
        elif request.log_probs and "top_logprobs" in known:
            wanted["logprobs"] = min(count, _MOST_OF_COMPLETIONS)
        return {name: value for name, value in wanted.items() if name in known and value is not None}


def inside(core: System, span_of: Callable[[Work | None], str | None]) -> System:
    """``core`` for one call: the spans of its LlamaIndex LLMs go below those that ``span_of`` gives."""
    if not isinstance(core, SpeculativeRAG):
        return core

    def bound(model: Any) -> Any:
        return model.inside(span_of) if isinstance(model, LlamaIndexLM) else model

    if not any(isinstance(model, LlamaIndexLM) for model in (*core.roles.drafters, core.verifier)):
        return core
    return core.replace(drafter=[bound(model) for model in core.roles.drafters], verifier=bound(core.verifier))


def chosen_tokens(text: str, positions: Sequence[Sequence[LogProb]]) -> list[dict[str, Any]] | None:
    """LlamaIndex's log-probabilities in OpenAI's form: at each position, the alternative that ``text`` continues with.

    ``None`` where no alternative of some position continues the text.
    """
    rest, content = text.encode(), []
    for alternatives in positions:
        if not rest:
            break
        fitting = [a for a in alternatives if _bytes(a) and rest.startswith(_bytes(a))]
        if not fitting:
            return None
        token = max(fitting, key=lambda a: len(_bytes(a)))
        rest = rest[len(_bytes(token)) :]
        content.append(
            {
                "token": token.token,
                "bytes": list(_bytes(token)),
                "logprob": token.logprob,
                "top_logprobs": [{"token": a.token, "logprob": a.logprob} for a in alternatives],
            }
        )
    return content


def _bytes(token: LogProb) -> bytes:
    return bytes(token.bytes) if token.bytes else token.token.encode()


def metadata_of(answer: SpeculativeAnswer) -> dict[str, Any]:
    """The metadata of a response, as plain values."""
    drafts = []
    for verdict in answer.verdicts:
        row = verdict.to_row()
        row["nodes"] = [passage.id for passage in verdict.draft.passages]
        drafts.append(row)
    return {
        "rationale": answer.rationale,
        "drafts": drafts,
        "abstained": answer.abstained,
        "reason": answer.reason,
        **answer.details(),
    }
