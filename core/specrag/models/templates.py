"""Chat templates: what a tokenizer's template writes before, between and after the turns of a conversation.

Templates differ in what they accept. Some have no system role, some want user and assistant to alternate, some know
neither tools nor their results. What a template refuses is arranged anew, with the same texts in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from specrag.errors import InvalidInputError, said
from specrag.models.base import Segment, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters around a turn's number. No template and no tokenizer gives them a meaning.
OPEN, CLOSE = "\ue0f0", "\ue0f1"
_MARKER = re.compile(f"{OPEN}(\\d+){CLOSE}")
_TOOL_ROLE = re.compile(r"""["']tool["']""")
_JOIN = "\n\n"
# What a template raises: its own refusal, or what an expression in it runs into (1 / 0, a macro that calls itself).
_REFUSALS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, NameError, RecursionError),
)
# Frames that are remembered. A frame with tools is as long as their schemas.
_MOST_FRAMES = 256

#: What stands between the turns' contents: texts, and the numbers of the turns.
_Frame = list[str | int]


class ChatTemplate:
    """The chat template of a tokenizer, or several with names.

    Args:
        tokenizer: Renders.
        default: The template's source.
        with_tools: The one for conversations with tools, where the tokenizer has one of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, default: str, with_tools: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.default, self.with_tools = default, with_tools or default
        self._frames: dict[tuple[Any, ...], _Frame] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> ChatTemplate | None:
        """The template that ``chosen`` names: ``"auto"`` for the tokenizer's own, one of its names, or a source.

        ``None`` where there is none.

        Raises:
            InvalidInputError: The tokenizer has several templates, and none is the default.
        """
        own = getattr(tokenizer, "chat_template", None)
        named: Mapping[str, str] = own if isinstance(own, Mapping) else {"default": own} if own else {}
        if chosen is None or (chosen == "auto" and not named):
            return None
        if chosen != "auto":
            return cls(tokenizer, named.get(chosen, chosen))
        if "default" not in named and len(named) > 1:
            raise InvalidInputError(
                f"the tokenizer has the chat templates {', '.join(named)} and none is the default: give one of these "
                "names as chat_template="
            )
        return cls(tokenizer, named.get("default", next(iter(named.values()))), named.get("tool_use"))

    def pieces(
        self, turns: Sequence[Turn], *, generate: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Segment]:
        """The conversation as the template writes it, in pieces.

        Args:
            turns: What is said. Nothing in it looks like a control token.
            generate: Begin a reply after the last turn.
            tools: JSON schemas.

        Raises:
            InvalidInputError: The template cannot write this conversation.
        """
        source = self.with_tools if tools else self.default
        problem = ""
        for arranged in arrangements([written_out(turn, source) for turn in turns], [written_out(t) for t in turns]):
            key = (tuple(map(_shape, arranged)), generate, json.dumps(list(tools)) if tools else "")
            if key not in self._frames:
                try:
                    frame = self._frame(source, arranged, generate, tools)
                except _REFUSALS as error:
                    problem = problem or said(error)
                    continue
                if len(self._frames) >= _MOST_FRAMES:
                    self._frames.clear()
                self._frames[key] = frame
            return _filled(self._frames[key], arranged)
        raise InvalidInputError(
            f"the chat template cannot write a conversation of the roles {', '.join(turn.role for turn in turns)}: "
            f"{problem}; change the conversation, or give another chat_template="
        )

    def _frame(self, source: str, turns: Sequence[Turn], generate: bool, tools: Sequence[Mapping[str, Any]]) -> _Frame:
        """What the template writes around the contents of ``turns``.

        Raises:
            ValueError: It left out a turn, or wrote one twice.
        """
        try:
            return self._rendered(source, _messages(turns), generate, tools)
        except _REFUSALS as error:
            try:  # templates of models that also see images take lists of parts
                in_parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in _messages(turns)]
                return self._rendered(source, in_parts, generate, tools)
            except _REFUSALS:
                raise error from None

    def _rendered(
        self, source: str, messages: list[dict[str, Any]], generate: bool, tools: Sequence[Mapping[str, Any]]
    ) -> _Frame:
        rendered: Any = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, chat_template=source, tools=list(tools) or None
        )
        frame: _Frame = [int(part) if i % 2 else part for i, part in enumerate(_MARKER.split(str(rendered)))]
        wanted = [i for i, message in enumerate(messages) if message["content"]]
        if sorted(part for part in frame if isinstance(part, int)) != wanted:
            raise ValueError("it dropped a turn, or wrote one twice")
        return frame


def arrangements(*forms: Sequence[Turn]) -> Iterator[list[Turn]]:
    """The same conversation in forms that more and more templates accept. The first is ``forms[0]`` as it is."""
    tried: list[list[Turn]] = []
    for turns in forms:
        for arrange in (list, _alternating, _one_system_turn, _no_system_turn):
            arranged = arrange(turns)
            if arranged not in tried:
                tried.append(arranged)
                yield arranged


def _alternating(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of the same role as one turn. Results of tools stay apart."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role != "tool":
            merged[-1] = _joined(merged[-1], turn)
        else:
            merged.append(turn)
    return merged


def _one_system_turn(turns: Sequence[Turn]) -> list[Turn]:
    """System turns after the first turn become the beginning of the user turn that follows, or of one of their own."""
    first = turns[:1] if turns and turns[0].role == "system" else []
    return _alternating([*first, *(replace(turn, role=_without_system(turn)) for turn in turns[len(first) :])])


def _no_system_turn(turns: Sequence[Turn]) -> list[Turn]:
    """System turns become the beginning of the user turn that follows, or of one of their own."""
    return _alternating([replace(turn, role=_without_system(turn)) for turn in turns])


def _without_system(turn: Turn) -> Any:
    return "user" if turn.role == "system" else turn.role


def _joined(first: Turn, second: Turn) -> Turn:
    between = (Segment(_JOIN),) if first.text and second.text else ()
    return Turn(first.role, (*first.segments, *between, *second.segments), (*first.tool_calls, *second.tool_calls))


def written_out(turn: Turn, source: str = "") -> Turn:
    """``turn`` with tool calls and results as text, where the template ``source`` does not know how to write them."""
    if turn.tool_calls and "tool_calls" not in source:
        calls = "\n".join(call.rendered() for call in turn.tool_calls)
        between = "\n" if turn.text else ""
        return Turn(turn.role, (*turn.segments, Segment(between + calls)))
    if turn.role == "tool" and not _TOOL_ROLE.search(source):
        return Turn("user", (Segment("<tool_response>\n"), *turn.segments, Segment("\n</tool_response>")))
    return turn


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as a template takes them, with a marker in place of each content that is not empty."""
    messages, open_calls, count = [], [], 0
    for i, turn in enumerate(turns):
        message: dict[str, Any] = {"role": turn.role, "content": f"{OPEN}{i}{CLOSE}" if turn.text else ""}
        if turn.tool_calls:
            message["tool_calls"] = []
        for call in turn.tool_calls:
            count += 1
            key = f"call{count:05d}"  # nine letters and digits, as some templates want
            open_calls.append((key, call.name))
            function = {"name": call.name, "arguments": dict(call.arguments)}
            message["tool_calls"].append({"id": key, "type": "function", "function": function})
        if turn.role == "tool" and open_calls:  # results come in the order of the calls
            message["tool_call_id"], message["name"] = open_calls.pop(0)
        messages.append(message)
    return messages


def _shape(turn: Turn) -> tuple[Any, ...]:
    """What a frame depends on."""
    return turn.role, bool(turn.text), json.dumps([(call.name, dict(call.arguments)) for call in turn.tool_calls])


def _filled(frame: _Frame, turns: Sequence[Turn]) -> list[Segment]:
    pieces: list[Segment] = []
    for part in frame:
        pieces += turns[part].segments if isinstance(part, int) else [Segment(part)]
    return pieces
