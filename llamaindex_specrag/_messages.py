"""From LlamaIndex's messages to those of RAPID's core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ThinkingBlock, ToolCallBlock

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


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """LlamaIndex messages as the core takes them. Thoughts are left out.

    Raises:
        InvalidInputError: One holds something else than text.
    """
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> Message:
    known = (TextBlock, ThinkingBlock, ToolCallBlock)
    if other := [kind_of(block) for block in message.blocks if not isinstance(block, known)]:
        raise InvalidInputError(f"RapidLLM reads text, not {', '.join(other)}")
    role, text = _ROLES[message.role], message.content or ""
    return assistant_message(text, _calls(message)) if role == "assistant" else Message(role, text)


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
