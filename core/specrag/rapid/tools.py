"""Tools in conversations: whether a model's chat template shows them, and how calls are read from a reply.

The format is that of the chat templates that know ``<tool_call>`` (Qwen2.5, Qwen3, Hermes, SmolLM3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import GenerationRequest, ToolCall, Turn
from specrag.models.tokenization import ConversationEncoder

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # without an end, all that follows is thought
_CALL_OR_THOUGHT = re.compile(rf"<tool_call>\s*(?P<call>.*?)\s*</tool_call>|{_THOUGHT.pattern}", re.DOTALL)
_TAG = re.compile(r"<tool_call>.*?</tool_call>|</?think>", re.DOTALL)


def check_tools(encoder: ConversationEncoder) -> None:
    """Check that the chat template shows tools in the format that ``parse_tool_calls`` reads.

    Raises:
        InvalidInputError: It does not.
    """
    template = encoder.tool_template or ""
    if "tools" not in template or "<tool_call>" not in template:
        raise InvalidInputError(
            "this model's chat template has no tools in the <tool_call> format "
            "(Qwen2.5, Qwen3, Hermes and SmolLM3 have): use such a model, or call without tools"
        )


def opens_thought(encoder: ConversationEncoder) -> bool:
    """Whether the chat template begins each reply with ``<think>``, which the reply then does not show."""
    if encoder.template is None:
        return False
    return encoder.render_generation(GenerationRequest((Turn.of("user", "?"),))).rstrip().endswith("<think>")


def parse_tool_calls(text: str, *, thinking: bool = False) -> tuple[str, list[ToolCall], list[str]]:
    """A reply as (its text, the calls in it, the blocks that look like a call and cannot be read).

    What a model thinks is not what it asks for: a call inside ``<think>`` stays text.

    Args:
        text: What the model wrote.
        thinking: Whether the template wrote the opening tag (see ``opens_thought``). Without a closing one, the reply
            was cut in the middle of the thought.
    """
    calls, broken, kept, at = [], [], [], _end_of_opened_thought(text)
    if thinking and not at:
        return text, [], []
    kept.append(text[:at])
    for match in _CALL_OR_THOUGHT.finditer(text, at):
        kept.append(text[at : match.start()])
        at = match.end()
        block = match["call"]
        if block is None:
            kept.append(match[0])
            continue
        try:
            calls.append(_call(block))
        except (KeyError, TypeError, ValueError, RecursionError):
            broken.append(block)
    return "".join([*kept, text[at:]]).strip() if calls or broken else text, calls, broken


def without_thinking(text: str) -> str:
    """``text`` without what the model thought."""
    return _THOUGHT.sub("", text[_end_of_opened_thought(text) :]).strip()


def _end_of_opened_thought(text: str) -> int:
    """Where a thought ends whose opening tag the template wrote; 0 where there is none."""
    tag = next((m for m in _TAG.finditer(text) if m[0] in ("<think>", "</think>")), None)
    return tag.end() if tag is not None and tag[0] == "</think>" else 0


def _call(block: str) -> ToolCall:
    """The call in ``block``.

    Raises:
        ValueError: It is no JSON, or not of the form of a call. Also a ``KeyError`` or ``TypeError``.
    """
    row = json.loads(block)
    if not isinstance(row["name"], str) or not row["name"]:
        raise ValueError("a call has a name")
    return ToolCall(row["name"], call_arguments(row.get("arguments")))


def call_arguments(arguments: Any) -> dict[str, Any]:
    """The arguments of a call out of a mapping, or out of its JSON. ``None``: there are none.

    Raises:
        ValueError: They are something else.
    """
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of a call are an object, got {kind_of(arguments)}")
    return dict(arguments or {})
