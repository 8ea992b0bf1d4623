"""RAPID behind LangChain's model interfaces: ChatRapid and RapidLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.llms import LLM
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    SystemMessage,
)
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, GenerationChunk
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import Self

from langchain_specrag._messages import metadata_of, reply_chunk, reply_fields, to_message, usage_of
from langchain_specrag._rebuilt import Rebuilt
from specrag.errors import InvalidInputError
from specrag.models.base import Quantization
from specrag.rapid import LongContext, Message, RapidChat, RapidGenerator, RapidSettings, RapidStats
from specrag.rapid.chat import CallOptions, call_options
from specrag.rapid.tools import check_tools

# Later bases win in pydantic, and LangChain's ignore what they do not know: each class says it itself.
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


class _Rapid(Rebuilt):
    """What ChatRapid and RapidLLM share: the models, how they generate, and the sessions.

    A field that is frozen was used when the models were loaded.
    """

    model_config = _CONFIG

    model: str | None = Field(default=None, frozen=True)
    drafter: str | None = Field(default=None, frozen=True)
    rapid: RapidGenerator | None = Field(default=None, exclude=True, repr=False, frozen=True)
    settings: RapidSettings | Mapping[str, Any] | None = Field(default=None, frozen=True)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int = Field(default=256, ge=1)
    stop: list[str] | None = None
    quantization: Quantization | None = Field(default=None, frozen=True)
    max_sessions: int = Field(default=4, frozen=True)
    _chat: RapidChat = PrivateAttr()

    @field_validator("settings", mode="before")
    @classmethod
    def _settings(cls, value: Any) -> RapidSettings | None:
        return None if value is None else RapidSettings.of(value)

    def model_post_init(self, context: Any, /) -> None:
        """Load the models, unless a generator is given; then show what holds in the fields that were left out."""
        super().model_post_init(context)
        self._chat = RapidChat.open(
            self.model, self.drafter, rapid=self.rapid, settings=self.settings, **self._sampling(),
            quantization=self.quantization, max_sessions=self.max_sessions,
        )  # fmt: skip
        # Not assigned, so that they do not count as given. A copy made of the fields finds the loaded models there.
        self.__dict__.update(self._chat.fields(self.model))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy over the same models; with ``update``, one that is built with the changed settings."""
        return super().model_copy(update={"rapid": self.rapid} | dict(update) if update else None, deep=deep)

    @property
    def sessions(self) -> list[LongContext]:
        """The documents' sessions that are kept, latest last."""
        return self._chat.sessions

    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}

    def _options(self, stop: list[str] | None, given: Mapping[str, Any]) -> CallOptions:
        return call_options(
            {**given, "stop": stop},
            max_tokens=self.max_tokens,
            stop=self.stop,
            sampling=self._chat.settings.with_sampling(**self._sampling()).sampling,
        )

    def _identity(self) -> dict[str, Any]:
        """What a reply depends on, as plain values."""
        return {
            "model": self.model,
            "drafter": self.drafter,
            "quantization": self.quantization,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            **self._sampling(),
            "settings": RapidSettings.of(self.settings).to_dict(),
        }

    def _token_ids(self, text: str) -> list[int]:
        return self._chat.rapid.target.encoder.encode_text(text)


class ChatRapid(_Rapid, BaseChatModel):
    """A chat model for long contexts, decoded with RAPID (Chen et al., arXiv 2502.20330).

    The context of a call is ``documents`` given with it (one or several texts or ``Document``); or the text before the
    last paragraph of a long message; or the conversation so far. The target reads it once: its cache is kept, and the
    next call about the same context begins at once.

    Setup:
        Install the extras. The models run in this process, which needs torch.

            pip install 'specrag[langchain,local]'

    Instantiate:
        >>> from langchain_specrag import ChatRapid
        >>> chat = ChatRapid(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP
        >>> chat = ChatRapid(model="...", settings={"proposer": "rag", "candidates": 5})  # doctest: +SKIP

    Invoke:
        >>> chat.invoke("who discovered radium?", documents=[report]).content  # doctest: +SKIP

        ``response_metadata["rapid"]`` says how the reply was decoded: schedule, acceptance, seconds.

    Stream:
        >>> for chunk in chat.stream("who discovered radium?", documents=[report]):  # doctest: +SKIP
        ...     print(chunk.content, end="")

    Async:
        >>> await chat.ainvoke("who discovered radium?", documents=[report])  # doctest: +SKIP

    Tools:
        >>> chat.bind_tools([weather]).invoke("how is the weather in Paris?").tool_calls  # doctest: +SKIP

        The chat template must know tools in the ``<tool_call>`` format (Qwen2.5, Qwen3, Hermes, SmolLM3).

    Args:
        model: The target: a folder or a hub id.
        drafter: The same; without one the target drafts for itself.
        rapid: A ``RapidGenerator``, in place of both and of ``settings``.
        settings: A ``RapidSettings`` or a mapping of its fields: how candidates are drafted and what is sampled.
        temperature: In place of that in ``settings.sampling``; also per call. So are the next three.
        top_k: 0 switches it off.
        top_p: 1 switches it off.
        seed: Repeats a run, with a fixed ``candidates`` in the settings.
        max_tokens: Of a reply; also per call.
        stop: Strings that end a reply; also per call.
        quantization: What the weights of both models are kept as, on the CPU: ``"int8"``, ``"int4"``, or ``"gguf"``.
        max_sessions: How many contexts' sessions are kept.
        streaming: Whether ``invoke`` streams too, for callbacks. By default it does when a callback listens.

    Raises:
        InvalidInputError: There is no model, or a setting is unknown or out of range (pydantic's ``ValidationError``
            for a field).
        ModelNotFoundError: A model cannot be loaded.
    """

    model_config = _CONFIG

    streaming: bool | None = None  # LangChain's own name and meaning

    @property
    def _llm_type(self) -> str:
        return "specrag-rapid"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["langchain_specrag", "chat"]

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Settings as plain values, which can be written."""
        return {"settings": RapidSettings.of(self.settings).to_dict()}

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
            usage_metadata=usage_of(stats),
            response_metadata=metadata_of(self.model, stats),
            **reply_fields(text, with_tools=bool(options["tools"]), thinking=self._chat.opens_thought),
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
            yield self._told(reply_chunk("".join(pieces), thinking=self._chat.opens_thought), run_manager)
        else:
            for piece in pieces:
                yield self._told(AIMessageChunk(content=piece), run_manager)
        last = AIMessageChunk(
            content="",
            usage_metadata=usage_of(stats),
            response_metadata=metadata_of(self.model, stats),
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
    r"""RAPID as an LLM from text to text. The prompt is one user message. Arguments and errors are ``ChatRapid``'s.

    Setup:
        Install the extras. The models run in this process, which needs torch.

            pip install 'specrag[langchain,local]'

    Instantiate:
        >>> from langchain_specrag import RapidLLM
        >>> llm = RapidLLM(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP

    Invoke:
        >>> llm.invoke(report + "\n\nwho discovered radium?")  # doctest: +SKIP

    Stream:
        >>> for piece in llm.stream(report + "\n\nwho discovered radium?"):  # doctest: +SKIP
        ...     print(piece, end="")

    Async:
        >>> await llm.ainvoke(report + "\n\nwho discovered radium?")  # doctest: +SKIP
    """

    model_config = _CONFIG

    @property
    def _llm_type(self) -> str:
        return "specrag-rapid-llm"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

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
        yield GenerationChunk(text="", generation_info=metadata_of(self.model, stats))
