"""RAPID behind LangChain's model interfaces: ChatRapid and RapidLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import LLM
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolCallChunk,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, GenerationChunk
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from specrag.errors import InvalidInputError
from specrag.rapid import Message, RapidChat, RapidGenerator, ToolCall
from specrag.rapid.acceptance import Transfer
from specrag.rapid.chat import check_tools, parse_tool_calls
from specrag.rapid.decoding import RapidStats
from specrag.rapid.session import ProposerName

Documents = Sequence[Document | str]


class _Rapid(BaseModel):
    """What ChatRapid and RapidLLM share: the models, how they generate, and the sessions."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, protected_namespaces=())

    model: str | None = None
    drafter: str | None = None
    rapid: RapidGenerator | None = Field(default=None, exclude=True, repr=False)
    temperature: float = Field(default=1.0, ge=0)
    max_tokens: int = Field(default=256, ge=1)
    stop: list[str] | None = None
    seed: int | None = None
    candidates: int | list[int] | Literal["auto"] = "auto"
    transfer: Transfer = "rapid"
    transfer_strength: float | Literal["auto"] = 10.0
    proposer: ProposerName = "rag"
    quantization: Literal["int8"] | None = None
    max_sessions: int = 4
    _chat: RapidChat = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Load the models, unless a generator is given."""
        super().model_post_init(context)
        if self.rapid is None:
            self._chat = RapidChat.of_fields(self)
            return
        self.model = self.model or self.rapid.target.name
        if "temperature" not in self.model_fields_set:
            self.temperature = self.rapid.settings.temperature
        self._chat = RapidChat(self.rapid, self.max_sessions)

    @property
    def sessions(self) -> list[Any]:
        """The documents' sessions that are kept, latest last."""
        return self._chat.sessions

    def _options(self, stop: list[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("stop", "max_tokens", "temperature", "seed")}
        documents: Documents = given.get("documents") or ()
        texts = [d.page_content if isinstance(d, Document) else str(d) for d in documents]
        return RapidChat.options(own, {**given, "stop": stop, "documents": texts})

    def _token_ids(self, text: str) -> list[int]:
        return self._chat.rapid.target.encoder.encode_text(text)


class ChatRapid(_Rapid, BaseChatModel):
    """A chat model for long contexts, decoded with RAPID (Chen et al., arXiv 2502.20330).

    Setup: ``pip install 'specrag[langchain]'``.

    Invoke:
        >>> chat = ChatRapid(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP
        >>> chat.invoke("who discovered radium?", documents=[report]).content  # doctest: +SKIP

    The context is ``documents`` given with the call, or the text before the last paragraph of a long message, or the
    conversation so far. Its session (the target's cache) is kept, so the next call about it begins at once.
    ``response_metadata["rapid"]`` says how a reply was decoded: schedule, acceptance, seconds.

    Args:
        model, drafter: Folders or hub ids; without a drafter the model drafts for itself.
        rapid: A ``RapidGenerator`` in place of both, and of the settings below.
        temperature, max_tokens, stop, seed: Also per call.
        candidates, transfer, transfer_strength, proposer: As in ``RapidGenerator``.
        max_sessions: How many documents' sessions are kept.
    """

    @property
    def _llm_type(self) -> str:
        return "specrag-rapid"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", "drafter", "temperature", "max_tokens", "stop", "seed", "candidates", "transfer", "proposer")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_specrag", "chat"]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="specrag",
            ls_model_name=str(kwargs.get("model", self.model)),
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if stop or self.stop:
            params["ls_stop"] = stop or self.stop or []
        return params

    def get_token_ids(self, text: str) -> list[int]:
        return self._token_ids(text)

    # --- generation -----------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        text, stats = self._chat.complete([to_message(m) for m in messages], **options)
        message = AIMessage(
            usage_metadata=_usage(stats), response_metadata=_metadata(self.model, stats), **_reply(text, options)
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options, stats = self._options(stop, kwargs), RapidStats()
        pieces = self._chat.stream([to_message(m) for m in messages], stats=stats, **options)
        if options["tools"]:  # a call can be read when it is whole
            reply = _reply("".join(pieces), options)
            calls = [
                ToolCallChunk(name=c["name"], args=json.dumps(c["args"]), id=c["id"], index=i, type="tool_call_chunk")
                for i, c in enumerate(reply["tool_calls"])
            ]
            yield self._told(AIMessageChunk(content=reply["content"], tool_call_chunks=calls), run_manager)
        else:
            for piece in pieces:
                yield self._told(AIMessageChunk(content=piece), run_manager)
        last = AIMessageChunk(
            content="",
            usage_metadata=_usage(stats),
            response_metadata=_metadata(self.model, stats),
            chunk_position="last",
        )
        yield self._told(last, run_manager)

    def _told(self, message: AIMessageChunk, run_manager: CallbackManagerForLLMRun | None) -> ChatGenerationChunk:
        chunk = ChatGenerationChunk(message=message)
        if run_manager is not None:
            run_manager.on_llm_new_token(str(message.content), chunk=chunk)
        return chunk

    # --- tools and structure --------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools, shown through the chat template.

        Raises:
            InvalidInputError: The template has no tools in a format that can be read back, or ``tool_choice`` asks to
                force a call, which prompting cannot.
        """
        if tool_choice not in (None, "auto", False, "none"):
            raise InvalidInputError(
                f"tool_choice={tool_choice!r} cannot be promised by a local model: leave it at 'auto'"
            )
        check_tools(self._chat.rapid.target.encoder)
        shown = [] if tool_choice == "none" else [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=shown, **kwargs)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Replies as ``schema`` says, as far as asking for JSON and parsing it can take it.

        Args:
            schema: A pydantic class, or a JSON schema (then the result is a dict).
            include_raw: ``{"raw", "parsed", "parsing_error"}`` in place of raising on a reply that cannot be parsed.
        """
        if kwargs:
            raise InvalidInputError(f"unknown arguments {', '.join(kwargs)}: structure comes from the prompt alone")
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            parser: Any = PydanticOutputParser(pydantic_object=schema)
            wanted = schema.model_json_schema()
        else:
            parser, wanted = JsonOutputParser(), convert_to_openai_tool(schema)["function"]["parameters"]
        said = f"Reply with one JSON object and nothing else. Its JSON schema:\n{json.dumps(wanted)}"

        def asked(given: LanguageModelInput) -> ChatPromptValue:
            messages = self._convert_input(given).to_messages()
            return ChatPromptValue(messages=[SystemMessage(said), *messages])

        model: Runnable[Any, Any] = RunnableLambda(asked) | self
        if not include_raw:
            return model | parser
        tried = RunnablePassthrough.assign(
            parsed=RunnableLambda(lambda r: r["raw"]) | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | tried.with_fallbacks([failed], exception_key="parsing_error")


class RapidLLM(_Rapid, LLM):
    r"""RAPID as a text-in, text-out LLM. See ``ChatRapid``; the prompt is one user message.

    Invoke:
        >>> llm = RapidLLM(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP
        >>> llm.invoke(report + "\n\nwho discovered radium?")  # doctest: +SKIP
    """

    @property
    def _llm_type(self) -> str:
        return "specrag-rapid-llm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "drafter": self.drafter, "temperature": self.temperature, "seed": self.seed}

    def get_token_ids(self, text: str) -> list[int]:
        return self._token_ids(text)

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return self._chat.complete([Message("user", prompt)], **self._options(stop, kwargs))[0]

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        stats = RapidStats()
        for piece in self._chat.stream([Message("user", prompt)], stats=stats, **self._options(stop, kwargs)):
            chunk = GenerationChunk(text=piece)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield GenerationChunk(text="", generation_info=_metadata(self.model, stats))


# --- conversion -----------------------------------------------------------------------------------------


def to_message(message: BaseMessage) -> Message:
    """A LangChain message as the core takes it.

    Raises:
        InvalidInputError: It holds something else than text, or has another role.
    """
    if isinstance(message.content, list):
        other = [b.get("type") for b in message.content if isinstance(b, dict) and b.get("type") not in _TEXT_BLOCKS]
        if other:
            raise InvalidInputError(f"ChatRapid reads text, not {', '.join(map(str, other))}")
    text = str(message.text)
    if isinstance(message, SystemMessage):
        return Message("system", text)
    if isinstance(message, HumanMessage):
        return Message("user", text)
    if isinstance(message, ToolMessage):
        return Message("tool", text)
    if isinstance(message, AIMessage):
        return Message("assistant", text, tuple(ToolCall(c["name"], c["args"]) for c in message.tool_calls))
    raise InvalidInputError(f"ChatRapid takes system, human, AI and tool messages, got {type(message).__name__}")


# Blocks that carry text, and tool calls, which stand in `tool_calls` too.
_TEXT_BLOCKS = ("text", "tool_call", "tool_use")


def _reply(text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Content and tool calls of a reply."""
    if not options["tools"]:
        return {"content": text}
    content, calls, broken = parse_tool_calls(text)
    return {
        "content": content,
        "tool_calls": [{"name": c.name, "args": dict(c.arguments), "id": f"call_{uuid4().hex[:12]}"} for c in calls],
        "invalid_tool_calls": [{"name": None, "args": b, "id": None, "error": "not a JSON tool call"} for b in broken],
    }


def _usage(stats: RapidStats) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=stats.prompt_tokens, output_tokens=stats.tokens, total_tokens=stats.prompt_tokens + stats.tokens
    )


def _metadata(model: str | None, stats: RapidStats) -> dict[str, Any]:
    return {
        "model_name": model,
        "model_provider": "specrag",
        "finish_reason": stats.finish,
        "rapid": stats.to_dict(),
    }
