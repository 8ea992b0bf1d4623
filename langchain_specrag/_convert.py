"""Conversion between LangChain's types and the core's: documents, settings, models, answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig

from langchain_specrag._runnables import (
    bound_options,
    inner_runnables,
    is_retriever,
    known_options,
    name_of,
    really_awaits,
)
from langchain_specrag.embeddings import SpecRAGEmbeddings
from specrag._foreign import ForeignCalls
from specrag.baselines.base import System
from specrag.errors import InvalidInputError, ModelError, a, kind_of
from specrag.models.base import LanguageModel, Reader
from specrag.models.chat import ChatLM, ChatReply, ChatRequest, content_text, ended_at_limit, own_options
from specrag.models.embedders import Embedder, unit_vectors
from specrag.schema import Passage, SpeculativeAnswer, Usage, Verdict, passages_of
from specrag.speculative._given import drafters_of, model_of
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.speculative.work import Work, current_work

T = TypeVar("T")

_ROLES = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}


# --- documents ------------------------------------------------------------------------------------------


def to_passages(documents: Sequence[Document], vector_store: Any = None) -> list[Passage]:
    """Passages in the order of ``documents``, with the vectors that the store holds for them, where it holds them all.

    Raises:
        InvalidInputError: One of them is not a ``Document``.
    """
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise InvalidInputError(f"context[{i}] is {a(document)}, expected a LangChain Document")
    passages = passages_of(documents, "context")
    vectors = stored_vectors(vector_store, documents) if vector_store is not None else None
    if vectors is None:
        return passages
    return [replace(passage, embedding=vector) for passage, vector in zip(passages, vectors, strict=True)]


def stored_vectors(store: Any, documents: Sequence[Document]) -> list[np.ndarray] | None:
    """The vectors that ``store`` holds for ``documents``; ``None`` where it cannot give all of them.

    ``store`` is an ``InMemoryVectorStore``, LangChain's ``FAISS``, or a function from documents to vectors.
    """
    try:
        if hasattr(store, "index_to_docstore_id"):  # FAISS
            wanted = {document.id for document in documents}
            rows = {key: row for row, key in store.index_to_docstore_id.items() if key in wanted}
            return [np.asarray(store.index.reconstruct(rows[document.id])) for document in documents]
        if isinstance(getattr(store, "store", None), Mapping):  # InMemoryVectorStore
            return [np.asarray(store.store[document.id]["vector"]) for document in documents]
        if callable(store):
            given: Callable[[Sequence[Document]], Sequence[Any] | None] = store
            vectors = given(documents)
            return None if vectors is None else [np.asarray(vector) for vector in vectors]
    except (KeyError, RuntimeError):  # not stored under these ids, or an index that keeps no vectors
        return None
    return None


# --- settings and models --------------------------------------------------------------------------------


def as_value(kind: type[T], given: T | Mapping[str, Any] | None, name: str) -> T:
    """A core value from itself, from a mapping of its fields, or with its defaults.

    Raises:
        InvalidInputError: A key that is not a field.
    """
    if given is None:
        return kind()
    if not isinstance(given, Mapping):
        return given  # its type is checked by the core
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [str(key) for key in given if key not in known]:
        raise InvalidInputError(f"{name} has no field {', '.join(unknown)}: there are {', '.join(known)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def as_model(model: Any, role: str) -> LanguageModel | Reader:
    """A core model as it is; a LangChain model, wrapped; a bundled name or the folder of a trained reader, loaded.

    LangChain's are chat models, LLMs, and any Runnable from messages to a reply.

    Raises:
        InvalidInputError: It is none of these.
        ModelNotFoundError: It is a name, and the model is not on this machine.
    """
    return model_of(
        model,
        role,
        lambda given: LangChainLM(given) if isinstance(given, Runnable) and not is_retriever(given) else None,
        "a LangChain chat model or LLM",
    )


def as_drafters(given: Any) -> LanguageModel | Reader | tuple[LanguageModel | Reader, ...]:
    """One drafter or a list of them, each converted by ``as_model``."""
    return drafters_of(given, as_model)


def as_embedder(embedder: Any) -> Embedder | None:
    """A core embedder as it is; LangChain embeddings wrapped.

    Raises:
        InvalidInputError: It is neither.
    """
    if embedder is None or isinstance(embedder, Embedder):
        return embedder
    if isinstance(embedder, SpecRAGEmbeddings):
        return embedder.embedder
    if isinstance(embedder, Embeddings):
        return LangChainEmbedder(embedder)
    raise InvalidInputError(f"embedder must be a specrag Embedder or LangChain Embeddings, got {kind_of(embedder)}")


class LangChainEmbedder(Embedder):
    """LangChain embeddings as a core embedder."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings, self._calls = embeddings, ForeignCalls(embeddings, awaits=really_awaits(embeddings))
        self.name = kind_of(embeddings)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return unit_vectors(self._embeddings.embed_documents(list(texts)))

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:
        given = list(texts)
        return unit_vectors(
            await self._calls.call(
                lambda: self._embeddings.embed_documents(given), lambda: self._embeddings.aembed_documents(given)
            )
        )


class LangChainLM(ChatLM):
    """A LangChain chat model, LLM or Runnable as a drafter or verifier.

    A blocking call of the pipeline uses the model's blocking methods, an awaited one its awaited methods.
    Log-probabilities are asked for where the model has the fields ``logprobs`` and ``top_logprobs`` (``ChatOpenAI``).
    """

    def __init__(self, model: Runnable[Any, Any]) -> None:
        super().__init__(name_of(model))
        self._model, self._calls = model, ForeignCalls(*inner_runnables(model), awaits=really_awaits(model))
        self._config_of: Callable[[Work | None], RunnableConfig | None] = lambda work: None
        self._limit: asyncio.Semaphore | None = None

    def inside(
        self, config_of: Callable[[Work | None], RunnableConfig | None], max_concurrency: int | None
    ) -> LangChainLM:
        """The same model for one call of a chain.

        Args:
            config_of: Gives the config below which the runs of a piece of work belong.
            max_concurrency: How many calls may run at the same time.
        """
        bound = copy.copy(self)
        bound._config_of = config_of
        bound._limit = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        return bound

    async def reply(self, request: ChatRequest) -> ChatReply:
        config = self._config_of(current_work.get())
        messages: list[BaseMessage] = [_ROLES[role](content=text) for role, text in request.messages]
        options = self._options(request)
        async with self._limit or nullcontext():
            answer = await self._calls.call(
                lambda: self._model.invoke(messages, config, **options),
                lambda: self._model.ainvoke(messages, config, **options),
            )
        if isinstance(answer, str):
            return ChatReply(answer)
        if not isinstance(answer, AIMessage):
            raise ModelError(f"{self.name} gave {a(answer)}, expected an AI message or text")
        logged = answer.response_metadata.get("logprobs") or {}
        used = answer.usage_metadata
        return ChatReply(
            text=content_text(answer.content),
            content=logged.get("content") or None if isinstance(logged, Mapping) else None,
            usage=Usage(used["input_tokens"], used["output_tokens"]) if used else Usage(),
            cut=ended_at_limit(answer.response_metadata),
            thought=bool(used and used.get("output_token_details", {}).get("reasoning")),
        )

    def _options(self, request: ChatRequest) -> dict[str, Any]:
        """The options that the model has fields for; the others stay as the user configured them."""
        known = known_options(self._model) - bound_options(self._model)
        wanted: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p if request.sampling.top_p < 1 else None,
            "seed": request.sampling.seed,
        }
        if request.log_probs and "top_logprobs" in known:
            wanted["logprobs"] = True
            wanted["top_logprobs"] = request.top_log_probs or None
        left_out = request.without | own_options(self._model, request.sampling)
        wanted = {name: value for name, value in wanted.items() if name not in left_out}
        options = {name: value for name, value in wanted.items() if name in known and value is not None}
        return options | ({"stop": list(request.stop)} if request.stop and "stop" in known else {})


def inside(
    core: System, config_of: Callable[[Work | None], RunnableConfig | None], max_concurrency: int | None
) -> System:
    """``core`` for one call of a chain: the runs of its LangChain models go where ``config_of`` says."""
    if not isinstance(core, SpeculativeRAG):
        return core

    def bound(model: Any) -> Any:
        return model.inside(config_of, max_concurrency) if isinstance(model, LangChainLM) else model

    if not any(isinstance(model, LangChainLM) for model in (*core.roles.drafters, core.verifier)):
        return core
    return core.replace(drafter=[bound(model) for model in core.roles.drafters], verifier=bound(core.verifier))


# --- answers --------------------------------------------------------------------------------------------


#: What the chain adds to its input.
RESULT_KEYS = ("answer", "rationale", "drafts", "citations", "abstained", "reason", "details")


def draft_row(verdict: Verdict) -> dict[str, Any]:
    """A draft and its scores as plain values. ``documents`` holds positions in the context."""
    row = verdict.to_row()
    return {"documents": row.pop("subset"), **row}


def result_of(answer: SpeculativeAnswer, documents: Sequence[Document]) -> dict[str, Any]:
    """What the chain adds to its input (``RESULT_KEYS``), except the answer's text."""
    return {
        "rationale": answer.rationale,
        "drafts": [draft_row(verdict) for verdict in answer.verdicts],
        "citations": [documents[i] for i in answer.subset],
        "abstained": answer.abstained,
        "reason": answer.reason,
        "details": answer.details(),
    }
