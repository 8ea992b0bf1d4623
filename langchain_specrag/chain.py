"""Speculative RAG as a Runnable, as a retrieval chain, and its clustering alone as a retriever."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForChainRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnablePassthrough, RunnableSerializable
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import TypedDict

import specrag
from langchain_specrag._convert import LangChainLM, as_embedder, as_language_model, result_of, to_passages
from langchain_specrag._tracing import Trace
from specrag import _blocking
from specrag.errors import InvalidInputError
from specrag.models.base import LanguageModel, Sampling
from specrag.schema import AnswerReady, Event
from specrag.speculative.perspectives import SamplingMode
from specrag.speculative.pipeline import aselect_perspectives, select_perspectives
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import Scoring


class ChainInput(TypedDict):
    """What ``create_speculative_rag_chain`` takes."""

    input: str


class SpeculativeRAGInput(TypedDict):
    """What ``SpeculativeRAG`` takes."""

    input: str
    context: list[Document]


class SpeculativeRAG(RunnableSerializable[dict[str, Any], dict[str, Any]]):
    """Answers ``input`` from ``context``: drafted in parallel by a small model, verified by a larger one.

    Setup: ``pip install 'specrag[langchain]'`` and ``specrag models fetch`` for the embedded models.

    Invoke:
        >>> from specrag.models import bundled  # doctest: +SKIP
        >>> rag = SpeculativeRAG(drafter=bundled("smollm2-rag-drafter"))  # doctest: +SKIP
        >>> rag.invoke({"input": "who discovered radium", "context": documents})["answer"]  # doctest: +SKIP

    The result has the input's keys and ``answer`` (empty when ``abstained``), ``rationale``, ``drafts`` (each with its
    scores), ``citations`` (the documents that the answer was drafted from), ``abstained``, ``reason`` and ``details``.
    ``stream`` yields parts whose sum is that. Child runs and custom events (``specrag_subsets``, ``specrag_draft``,
    ``specrag_draft_failed``, ``specrag_verdict``) tell what happens meanwhile.

    Args:
        drafter, verifier: Core language models, LangChain chat models or LLMs. The verifier is the drafter by default.
        embedder: A core embedder or LangChain embeddings; by default the bundled MiniLM.
        vector_store: Where the documents come from: its vectors are used in place of an embedder's. ``FAISS``,
            ``InMemoryVectorStore``, or a function from documents to vectors.
        scoring, prompts, generation: Core values, or mappings of their fields.
        others: As in ``specrag.SpeculativeRAG``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    drafter: Any
    verifier: Any = None
    embedder: Any = None
    vector_store: Any = None
    drafts: int = 5
    passages_per_draft: int = 2
    sampling: SamplingMode = "coverage"
    scoring: Scoring | Mapping[str, Any] | None = None
    prompts: Prompts | Mapping[str, Any] | None = None
    generation: Sampling | Mapping[str, Any] | None = None
    max_rationale_tokens: int = specrag.SpeculativeRAG.max_rationale_tokens
    max_answer_tokens: int = specrag.SpeculativeRAG.max_answer_tokens
    reuse_embeddings: bool = True
    deadline: float | None = None
    seed: int = 0
    _core: specrag.SpeculativeRAG = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Build the core's pipeline, which checks the settings."""
        self._core = specrag.SpeculativeRAG(
            drafter=as_language_model(self.drafter, "drafter"),
            verifier=None if self.verifier is None else as_language_model(self.verifier, "verifier"),
            embedder=as_embedder(self.embedder),
            scoring=_value(Scoring, self.scoring),
            prompts=None if self.prompts is None else _value(Prompts, self.prompts),
            generation=_value(Sampling, self.generation),
            **{name: getattr(self, name) for name in _PLAIN},
        )

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_specrag", "chain"]

    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        return super().get_name(suffix, name=name or self.name or "SpeculativeRAG")

    @property
    def InputType(self) -> Any:  # noqa: N802 - LangChain's name
        return SpeculativeRAGInput

    # --- the Runnable interface ---------------------------------------------------------------------

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **_: Any) -> dict[str, Any]:
        return self._call_with_config(self._invoke, input, config)

    async def ainvoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **_: Any) -> dict[str, Any]:
        return await self._acall_with_config(self._ainvoke, input, config)

    def stream(self, input: dict[str, Any], config: RunnableConfig | None = None, **_: Any) -> Iterator[dict[str, Any]]:
        yield from self.transform(iter([input]), config)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **_: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async def one() -> AsyncIterator[dict[str, Any]]:
            yield input

        async for part in self.atransform(one(), config):
            yield part

    def transform(
        self, input: Iterator[dict[str, Any]], config: RunnableConfig | None = None, **_: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._transform_stream_with_config(input, self._transform, config)

    async def atransform(
        self, input: AsyncIterator[dict[str, Any]], config: RunnableConfig | None = None, **_: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async for part in self._atransform_stream_with_config(input, self._atransform, config):
            yield part

    def _invoke(
        self, inputs: dict[str, Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> dict[str, Any]:
        return _blocking.run(self._answer(inputs, config))

    async def _ainvoke(
        self, inputs: dict[str, Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> dict[str, Any]:
        return await self._answer(inputs, config)

    async def _answer(self, inputs: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        made: dict[str, Any] = {}
        async for event in self._events(inputs, config):
            if isinstance(event, AnswerReady):
                made = {"answer": event.answer.text, **result_of(event.answer, inputs["context"])}
        return {**inputs, **made}

    def _transform(
        self, parts: Iterator[dict[str, Any]], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Iterator[dict[str, Any]]:
        inputs: dict[str, Any] | None = None
        for part in parts:
            inputs = part if inputs is None else AddableDict(inputs) + AddableDict(part)
        yield from _blocking.iterate(self._parts(inputs or {}, config))

    async def _atransform(
        self, parts: AsyncIterator[dict[str, Any]], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> AsyncIterator[dict[str, Any]]:
        inputs: dict[str, Any] | None = None
        async for part in parts:
            inputs = part if inputs is None else AddableDict(inputs) + AddableDict(part)
        async for made in self._parts(inputs or {}, config):
            yield made

    async def _parts(self, inputs: dict[str, Any], config: RunnableConfig) -> AsyncIterator[dict[str, Any]]:
        yield AddableDict(inputs)
        async for event in self._events(inputs, config):
            if isinstance(event, AnswerReady):
                for piece in event.answer.pieces:
                    yield AddableDict(answer=piece)
                yield AddableDict(result_of(event.answer, inputs["context"]))

    async def _events(self, inputs: dict[str, Any], config: RunnableConfig) -> AsyncIterator[Event]:
        """The core's events for one call, traced."""
        question, documents = _checked(inputs)
        trace = Trace(config, question)
        core = self._core.replace(
            drafter=_inside(self._core.drafter, trace, config), verifier=_inside(self._core.verifier, trace, config)
        )
        try:
            await trace.begin()
            async for event in core.astream(question, to_passages(documents, self.vector_store)):
                await trace.see(event)
                yield event
        except BaseException as error:
            await trace.close(error)
            raise
        await trace.close()


_PLAIN = (
    "drafts",
    "passages_per_draft",
    "sampling",
    "max_rationale_tokens",
    "max_answer_tokens",
    "reuse_embeddings",
    "deadline",
    "seed",
)


def _value(kind: Any, given: Any) -> Any:
    """A core value from itself, its fields, or nothing."""
    if isinstance(given, Mapping):
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    return kind() if given is None else given


def _inside(model: LanguageModel | None, trace: Trace, config: RunnableConfig) -> Any:
    """``model`` with its runs in the trace, where it is LangChain's."""
    return model.inside(trace.config_of, config.get("max_concurrency")) if isinstance(model, LangChainLM) else model


def _checked(inputs: Any) -> tuple[str, Sequence[Document]]:
    if not isinstance(inputs, Mapping) or "input" not in inputs or "context" not in inputs:
        found = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise InvalidInputError(f"SpeculativeRAG takes a mapping with 'input' and 'context', got {found}")
    return inputs["input"], inputs["context"]


def create_speculative_rag_chain(
    retriever: Runnable[Any, Any], drafter: Any = None, verifier: Any = None, **settings: Any
) -> Runnable[Any, dict[str, Any]]:
    """A retrieval chain: ``{"input"}`` to ``{"input", "context", "answer", "rationale", "drafts", "abstained", ...}``.

    Setup: ``pip install 'specrag[langchain]'`` and ``specrag models fetch``.

    Invoke:
        >>> chain = create_speculative_rag_chain(store.as_retriever(), drafter=model)  # doctest: +SKIP
        >>> chain.invoke({"input": "who discovered radium"})["answer"]  # doctest: +SKIP

    Args:
        retriever: A retriever, which is given the question; or any Runnable from the whole input to documents. Of a
            vector store's retriever the store's vectors are used again.
        drafter, verifier, settings: As in ``SpeculativeRAG``. Without a drafter, the embedded one.
    """
    if drafter is None:
        from specrag.models import bundled

        drafter = bundled("smollm2-rag-drafter")
    if isinstance(retriever, BaseRetriever):
        settings.setdefault("vector_store", getattr(retriever, "vectorstore", None))
        find: Runnable[Any, Any] = RunnableLambda(_question) | retriever
    elif isinstance(retriever, Runnable):
        find = retriever
    else:
        raise InvalidInputError(f"retriever must be a LangChain retriever or Runnable, got {type(retriever).__name__}")
    answer = SpeculativeRAG(drafter=drafter, verifier=verifier, **settings)
    chain = RunnablePassthrough.assign(context=find.with_config(run_name="retrieve_documents")) | answer
    return chain.with_config(run_name="speculative_rag_chain").with_types(input_type=ChainInput)  # type: ignore[arg-type]


def _question(inputs: Mapping[str, Any]) -> str:
    return str(inputs["input"])


class MultiPerspectiveRetriever(BaseRetriever):
    """Of what another retriever finds, one document per perspective: a diverse context for any chain.

    Setup: ``pip install 'specrag[langchain]'``; ``specrag models fetch minilm`` for the default embedder.

    Invoke:
        >>> diverse = MultiPerspectiveRetriever(retriever=store.as_retriever(search_kwargs={"k": 20}), k=4)  # doctest: +SKIP
        >>> diverse.invoke("effects of coffee", k=2)  # doctest: +SKIP

    Args:
        retriever: Finds the candidates, best first.
        k: How many documents to keep; also per call.
        embedder, vector_store, reuse_embeddings, seed: As in ``SpeculativeRAG``. The store of a vector store's retriever
            is used by itself.
    """

    retriever: BaseRetriever
    k: int = Field(default=2, ge=1)
    embedder: Any = None
    vector_store: Any = None
    reuse_embeddings: bool = True
    seed: int = 0

    def model_post_init(self, context: Any, /) -> None:
        """Check the embedder, and find the store."""
        self.embedder = as_embedder(self.embedder)
        if self.vector_store is None:
            self.vector_store = getattr(self.retriever, "vectorstore", None)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self.retriever.invoke(query, {"callbacks": run_manager.get_child()})
        passages = to_passages(found, self.vector_store)
        return [found[i] for i in select_perspectives(query, passages, self._count(k), **self._options())]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = await self.retriever.ainvoke(query, {"callbacks": run_manager.get_child()})
        passages = to_passages(found, self.vector_store)
        return [found[i] for i in await aselect_perspectives(query, passages, self._count(k), **self._options())]

    def _count(self, k: int | None) -> int:
        return self.k if k is None else k

    def _options(self) -> dict[str, Any]:
        return {"embedder": self.embedder, "reuse_embeddings": self.reuse_embeddings, "seed": self.seed}
