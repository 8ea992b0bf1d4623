"""RAPID as a LlamaIndex LLM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, Literal, TypeVar

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
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback

from specrag.errors import InvalidInputError
from specrag.rapid import Message, RapidChat
from specrag.rapid.acceptance import Transfer
from specrag.rapid.decoding import RapidStats
from specrag.rapid.session import ProposerName

T = TypeVar("T")
_ROLES = {MessageRole.SYSTEM: "system", MessageRole.USER: "user", MessageRole.ASSISTANT: "assistant"}


class RapidLLM(CustomLLM):
    """An LLM for long contexts, decoded with RAPID (Chen et al., arXiv 2502.20330).

    Setup: ``pip install 'specrag[llamaindex]'``.

    Use:
        >>> llm = RapidLLM(model="Qwen/Qwen2.5-1.5B-Instruct", temperature=0)  # doctest: +SKIP
        >>> engine = index.as_query_engine(llm=llm, similarity_top_k=50)  # doctest: +SKIP

    The context of a call is ``documents=`` given with it; or what stands between the rules of LlamaIndex's own templates, or
    before the last paragraph of a long message; or the conversation so far. Its session (the model's cache) is kept, so the
    next call about it begins at once. ``additional_kwargs["rapid"]`` says how a reply was decoded.

    Args:
        model, drafter: Folders or hub ids; without a drafter the model drafts for itself.
        rapid: A ``RapidGenerator`` in place of both, and of how it decodes.
        temperature, max_tokens, stop, seed: Also per call.
        candidates, transfer, transfer_strength, proposer: As in ``RapidGenerator``.
        max_sessions: How many documents' sessions are kept.
    """

    model: str | None = None
    drafter: str | None = None
    rapid: Any = Field(default=None, exclude=True, repr=False)
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

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        if self.rapid is None:
            self._chat = RapidChat.of_fields(self)
            return
        self.model = self.model or self.rapid.target.name
        if "temperature" not in data:
            self.temperature = self.rapid.settings.temperature
        self._chat = RapidChat(self.rapid, self.max_sessions)

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
    def sessions(self) -> list[Any]:
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

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("stop", "max_tokens", "temperature", "seed")}
        texts = [getattr(document, "text", document) for document in given.get("documents") or ()]
        return RapidChat.options(own, {**given, "documents": texts})


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex messages as the core takes them.

    Raises:
        InvalidInputError: One holds something else than text, or has another role.
    """
    made = []
    for message in messages:
        other = [type(block).__name__ for block in message.blocks if not isinstance(block, TextBlock)]
        if other:
            raise InvalidInputError(f"RapidLLM reads text, not {', '.join(other)}")
        if message.role not in _ROLES:
            raise InvalidInputError(f"RapidLLM takes system, user and assistant messages, got {message.role.value}")
        made.append(Message(_ROLES[message.role], message.content or ""))
    return made


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
