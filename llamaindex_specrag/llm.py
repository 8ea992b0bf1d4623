"""RAPID as a LlamaIndex LLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_validator
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from typing_extensions import Self

from llamaindex_specrag._messages import to_messages
from llamaindex_specrag._settings import KnownSettings
from specrag.models.base import Quantization
from specrag.rapid import LongContext, Message, RapidChat, RapidGenerator, RapidSettings, RapidStats
from specrag.rapid.chat import CallOptions, call_options

T = TypeVar("T")


class RapidLLM(KnownSettings, CustomLLM):
    """An LLM for long contexts, decoded with RAPID (Chen et al., arXiv 2502.20330).

    The context of a call is ``documents=`` given with it (one or several texts, documents or nodes); or what stands
    between the rules of dashes of LlamaIndex's own templates, or before the last paragraph of a long message; or the
    conversation so far. The target reads it once: its cache is kept, and the next call about the same context begins
    at once.

    Setup:
        Install the extras. The models run in this process, which needs torch.

            pip install 'specrag[llamaindex,local]'

    Instantiate:
        >>> from llamaindex_specrag import RapidLLM
        >>> llm = RapidLLM(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP
        >>> llm = RapidLLM(model="...", settings={"proposer": "rag", "candidates": 5})  # doctest: +SKIP

    Invoke:
        >>> llm.complete("who discovered radium?", documents=[report]).text  # doctest: +SKIP
        >>> engine = index.as_query_engine(llm=llm, similarity_top_k=50)  # doctest: +SKIP

        ``additional_kwargs["rapid"]`` says how a reply was decoded: schedule, acceptance, seconds.

    Stream:
        >>> for part in llm.stream_complete("who discovered radium?", documents=[report]):  # doctest: +SKIP
        ...     print(part.delta, end="")

    Async:
        >>> await llm.acomplete("who discovered radium?", documents=[report])  # doctest: +SKIP

    Tools:
        A ``FunctionAgent`` needs an LLM with function calls, which this class is not. ``ReActAgent`` works with text.

    Raises:
        InvalidInputError: There is no model, or a setting is unknown or out of range (pydantic's ``ValidationError``
            for a field).
        ModelNotFoundError: A model cannot be loaded.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(frozen=True, default=None, description="The target: a folder or a hub id.")
    drafter: str | None = Field(
        frozen=True,
        default=None,
        description="The drafter: a folder or a hub id. Without one the target drafts for itself.",
    )
    rapid: RapidGenerator | None = Field(
        frozen=True,
        default=None,
        exclude=True,
        repr=False,
        description="A RapidGenerator, in place of models and settings.",
    )
    settings: RapidSettings | Mapping[str, Any] | None = Field(
        frozen=True,
        default=None,
        description="A RapidSettings or a mapping of its fields: how candidates are drafted and what is sampled.",
    )
    temperature: float | None = Field(
        default=None, description="0 is greedy. In place of that in settings.sampling; also per call."
    )
    top_k: int | None = Field(default=None, description="The likeliest tokens to draw from; 0: all. Also per call.")
    top_p: float | None = Field(default=None, description="The probability mass to draw from; 1: all. Also per call.")
    seed: int | None = Field(
        default=None, description="Repeats a run, with a fixed `candidates` in the settings. Also per call."
    )
    max_tokens: int = Field(default=256, ge=1, description="Tokens of a reply at most; also per call.")
    stop: list[str] | None = Field(default=None, description="Strings that end a reply; also per call.")
    quantization: Quantization | None = Field(
        frozen=True,
        default=None,
        description="What both models' weights are kept as, on the CPU: 'int8', 'int4' or 'gguf'.",
    )
    max_sessions: int = Field(frozen=True, default=4, description="How many contexts' sessions are kept.")
    _chat: RapidChat = PrivateAttr()

    @field_validator("settings", mode="before")
    @classmethod
    def _settings(cls, value: Any) -> RapidSettings | None:
        return None if value is None else RapidSettings.of(value)

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        self._chat = RapidChat.open(
            self.model, self.drafter, rapid=self.rapid, settings=self.settings, **self._sampling(),
            quantization=self.quantization, max_sessions=self.max_sessions,
        )  # fmt: skip
        # The fields that were left out show what holds. They do not count as given.
        self.__dict__.update(self._chat.fields(self.model))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy over the same models; with ``update``, one that is built with the changed settings."""
        if not update:
            return super().model_copy(deep=deep)
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | {"rapid": self.rapid} | dict(update))

    @classmethod
    def class_name(cls) -> str:
        return "RapidLLM"

    @property
    def metadata(self) -> LLMMetadata:
        target = self._chat.rapid.target
        return LLMMetadata(
            context_window=target.context_window or 2048,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=str(self.model),
        )

    @property
    def sessions(self) -> list[LongContext]:
        """The documents' sessions that are kept, latest last."""
        return self._chat.sessions

    # --- the LLM interface: each public method is decorated once, so that no event goes out twice --------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        text, stats = self._chat.complete([Message("user", prompt)], **self._options(kwargs))
        return CompletionResponse(text=text, additional_kwargs=_told(stats))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return self._completions([Message("user", prompt)], kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        messages, options = [Message("user", prompt)], self._options(kwargs)
        text, stats = await asyncio.to_thread(self._chat.complete, messages, **options)
        return CompletionResponse(text=text, additional_kwargs=_told(stats))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return _in_thread(self._completions([Message("user", prompt)], kwargs))

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _chat_response(*self._chat.complete(to_messages(messages), **self._options(kwargs)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._replies(to_messages(messages), kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        options = self._options(kwargs)
        return _chat_response(*await asyncio.to_thread(self._chat.complete, to_messages(messages), **options))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return _in_thread(self._replies(to_messages(messages), kwargs))

    def _completions(self, messages: list[Message], given: dict[str, Any]) -> CompletionResponseGen:
        for text, piece, stats in self._streamed(messages, given):
            yield CompletionResponse(text=text, delta=piece, additional_kwargs=_told(stats))

    def _replies(self, messages: list[Message], given: dict[str, Any]) -> ChatResponseGen:
        for text, piece, stats in self._streamed(messages, given):
            yield _chat_response(text, stats, piece)

    def _streamed(
        self, messages: list[Message], given: dict[str, Any]
    ) -> Generator[tuple[str, str, RapidStats], None, None]:
        stats, text = RapidStats(), ""
        for piece in self._chat.stream(messages, stats=stats, **self._options(given)):
            text += piece
            yield text, piece, stats
        yield text, "", stats  # what the whole took

    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}

    def _options(self, given: dict[str, Any]) -> CallOptions:
        return call_options(
            given,
            max_tokens=self.max_tokens,
            stop=self.stop,
            sampling=self._chat.settings.with_sampling(**self._sampling()).sampling,
        )


def _chat_response(text: str, stats: RapidStats, delta: str | None = None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, additional_kwargs=_told(stats))


def _told(stats: RapidStats) -> dict[str, Any]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": stats.prompt_tokens + stats.tokens,
        "finish_reason": stats.finish,
        "rapid": stats.to_dict(),
    }


async def _in_thread(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items of a blocking iterator, without blocking the event loop."""
    end = object()
    try:
        while (item := await asyncio.to_thread(next, items, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        items.close()
