"""From LlamaIndex's messages to those of RAPID's core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from specrag.errors import InvalidInputError, kind_of
from specrag.rapid import Message
from specrag.rapid.conversation import assistant_message

_ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
# Blocks without text of the message: thoughts, tool calls (read elsewhere), citations, marks for another model's cache.
_WITHOUT_TEXT = (ThinkingBlock, ToolCallBlock, CitationBlock, CachePoint)


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex messages as the core takes them. Thoughts are left out.

    Raises:
        InvalidInputError: One holds something else than text.
    """
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> Message:
    role, text = _ROLES[message.role], "\n".join(_texts(message.blocks))
    return assistant_message(text, _calls(message)) if role == "assistant" else Message(role, text)


def _texts(blocks: Sequence[Any]) -> Iterator[str]:
    """The texts of a message's blocks.

    Raises:
        InvalidInputError: A block is an image, a sound or a file.
    """
    for block in blocks:
        if isinstance(block, TextBlock):
            yield block.text
        elif isinstance(block, CitableBlock):
            yield from _texts(block.content)
        elif not isinstance(block, _WITHOUT_TEXT):
            raise InvalidInputError(f"RapidLLM reads text, not {kind_of(block)}")


def _calls(message: ChatMessage) -> Iterator[tuple[str | None, Any]]:
    """The calls of a message: in its blocks, or where LLM packages of earlier versions leave them."""
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    yield from ((block.tool_name, block.tool_kwargs) for block in blocks)
    if not blocks:
        for call in message.additional_kwargs.get("tool_calls") or ():
            function = _field(call, "function")
            yield _field(function, "name"), _field(function, "arguments")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
