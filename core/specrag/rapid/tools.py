"""Tools in conversations: how calls and results are written into a prompt, and how calls are read from a reply.

The format is that of the chat templates that know ``<tool_call>`` (Qwen2.5, Qwen3, Hermes, SmolLM3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specrag.errors import InvalidInputError
from specrag.models.tokenization import ConversationEncoder

_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: Mapping[str, Any]

    def rendered(self) -> str:
        """The call as it stands in a prompt."""
        call = {"name": self.name, "arguments": dict(self.arguments)}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def rendered_result(content: str) -> str:
    """What a tool returned, as it stands in a prompt."""
    return f"<tool_response>\n{content}\n</tool_response>"


def check_tools(encoder: ConversationEncoder) -> None:
    """Check that the chat template shows tools in the format that ``parse_tool_calls`` reads.

    Raises:
        InvalidInputError: It does not.
    """
    template = encoder.template or ""
    if "tools" not in template or "<tool_call>" not in template:
        raise InvalidInputError(
            "this model's chat template has no tools in the <tool_call> format "
            "(Qwen2.5, Qwen3, Hermes and SmolLM3 have): use such a model, or call without tools"
        )


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall], list[str]]:
    """A reply as (its text, the calls in it, the blocks that look like a call and cannot be read)."""
    calls, broken = [], []
    for block in _TOOL_CALL.findall(text):
        try:
            row = json.loads(block)
            arguments = row.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append(ToolCall(str(row["name"]), dict(arguments)))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            broken.append(block)
    return _TOOL_CALL.sub("", text).strip() if calls or broken else text, calls, broken
