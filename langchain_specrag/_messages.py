"""Between LangChain's messages and those of RAPID's core."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, ToolCallChunk
from langchain_core.messages.ai import UsageMetadata

from specrag.errors import InvalidInputError, kind_of
from specrag.models.chat import TEXT_PARTS, content_text
from specrag.rapid import Message, RapidStats
from specrag.rapid.conversation import assistant_message
from specrag.rapid.tools import parse_tool_calls

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
}
# What only images and sounds say. An AI message's other blocks are thoughts and calls, which stand in `tool_calls` too.
_MEDIA = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "video",
    "file",
    "input_file",
    "document",
    "media",
)


def to_message(message: BaseMessage) -> Message:
    """A LangChain message as the core takes it. The thoughts of an AI message are left out.

    Raises:
        InvalidInputError: It holds something else than text, or has another role.
    """
    role = _role(message)
    text = _text(message, role)
    if role != "assistant":
        return Message(role, text)
    calls: list[tuple[str | None, Any]] = []
    if isinstance(message, AIMessage):
        calls += [(call["name"], call["args"]) for call in message.tool_calls]
        calls += [(call.get("name"), call.get("args")) for call in message.invalid_tool_calls]
    return assistant_message(text, calls)


def _role(message: BaseMessage) -> str:
    named = message.role if isinstance(message, ChatMessage) else message.type
    named = named.removesuffix("MessageChunk").lower()  # a chunk's type is its class
    if named not in _ROLES:
        raise InvalidInputError(
            f"ChatRapid takes system, human, AI and tool messages, got {kind_of(message)} of the role {named!r}"
        )
    return _ROLES[named]


def _text(message: BaseMessage, role: str) -> str:
    if isinstance(message.content, str):
        return message.content
    texts, other = [], []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type", "text") in TEXT_PARTS:
            texts.append(content_text([block]))
        elif role != "assistant" or block.get("type") in _MEDIA:
            other.append(str(block.get("type")))
    if other:
        raise InvalidInputError(f"ChatRapid reads text, not {', '.join(other)}")
    return "".join(texts)


def reply_fields(text: str, *, with_tools: bool, thinking: bool = False) -> dict[str, Any]:
    """Content and, where there were tools, tool calls of a reply: fields of an ``AIMessage``."""
    if not with_tools:
        return {"content": text}
    content, calls, broken = parse_tool_calls(text, thinking=thinking)
    return {
        "content": content,
        "tool_calls": [{"name": c.name, "args": dict(c.arguments), "id": f"call_{uuid4().hex[:12]}"} for c in calls],
        "invalid_tool_calls": [{"name": None, "args": b, "id": None, "error": "not a JSON tool call"} for b in broken],
    }


def reply_chunk(text: str, *, thinking: bool = False) -> AIMessageChunk:
    """A whole reply with tool calls, as one piece of a stream."""
    reply = reply_fields(text, with_tools=True, thinking=thinking)
    calls = [
        ToolCallChunk(name=c["name"], args=json.dumps(c["args"]), id=c["id"], index=i, type="tool_call_chunk")
        for i, c in enumerate(reply["tool_calls"])
    ]
    # LangChain completes the JSON of streamed calls, and would make a call of what is none: it stays text.
    broken = "".join(f"<tool_call>{call['args']}</tool_call>" for call in reply["invalid_tool_calls"])
    return AIMessageChunk(content=reply["content"] + broken, tool_call_chunks=calls)


def usage_of(stats: RapidStats) -> UsageMetadata:
    """The tokens that a reply used."""
    return UsageMetadata(
        input_tokens=stats.prompt_tokens, output_tokens=stats.tokens, total_tokens=stats.prompt_tokens + stats.tokens
    )


def metadata_of(model: str | None, stats: RapidStats) -> dict[str, Any]:
    """What a reply's metadata says, as plain values."""
    return {
        "model_name": model,
        "model_provider": "specrag",
        "finish_reason": stats.finish,
        "rapid": stats.to_dict(),
    }
