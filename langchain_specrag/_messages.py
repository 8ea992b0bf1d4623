"""Between LangChain's messages and those of RAPID's core."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import UsageMetadata

from specrag.errors import InvalidInputError
from specrag.rapid import Message, RapidStats, ToolCall
from specrag.rapid.tools import parse_tool_calls

# Blocks that carry text, and tool calls, which stand in `tool_calls` too.
_TEXT_BLOCKS = ("text", "tool_call", "tool_use")


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


def reply_fields(text: str, *, with_tools: bool) -> dict[str, Any]:
    """Content and, where there were tools, tool calls of a reply: fields of an ``AIMessage``."""
    if not with_tools:
        return {"content": text}
    content, calls, broken = parse_tool_calls(text)
    return {
        "content": content,
        "tool_calls": [{"name": c.name, "args": dict(c.arguments), "id": f"call_{uuid4().hex[:12]}"} for c in calls],
        "invalid_tool_calls": [{"name": None, "args": b, "id": None, "error": "not a JSON tool call"} for b in broken],
    }


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
