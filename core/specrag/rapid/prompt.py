"""A long prompt: [head: the template up to the context][context][tail: the question and the rest of the template].

The three parts are tokenised apart, so that no question can move the boundary at which the context's cache ends.
This module alone knows the two private-use characters that stand for the question and for the document while a prompt
is rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from specrag.models.base import GenerationRequest, Segment, ToolCall, Turn
from specrag.models.tokenization import ConversationEncoder

# Stand for the question and for the document. Private-use characters: texts have no use for them.
_QUESTION, _DOCUMENT = "\ue0f2", "\ue0f3"


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. The functions of this module make it."""

    head: str
    context: str
    tail: str  # with a marker where the question stands

    def encoded(self, encoder: ConversationEncoder) -> PromptTokens:
        """The prompt as token ids."""
        head = encoder.encode_rendered(self.head) if self.head or encoder.template is None else []
        return PromptTokens(tuple(head), tuple(encoder.encode_text(self.context)), self.tail)


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as token ids. The tail stays text, since every question makes another one of it."""

    head: tuple[int, ...]
    context: tuple[int, ...]
    tail: str

    @cached_property
    def ids(self) -> tuple[int, ...]:
        """Head and context: what is read before any question."""
        return (*self.head, *self.context)

    @property
    def all_question(self) -> bool:
        """Whether nothing comes before the question: a first message where no template writes anything."""
        return not self.context and self.tail.startswith(_QUESTION)

    def with_tail(self, tail: str) -> PromptTokens:
        """The same head and context with another tail."""
        return self if tail == self.tail else replace(self, tail=tail)

    def question(self, encoder: ConversationEncoder, question: str) -> list[int]:
        """The tokens after the context: the tail with ``question`` in it."""
        return encoder.encode_text(self.tail.replace(_QUESTION, encoder.sanitize(question).strip()))

    def shared_with(self, tokens: Sequence[int]) -> int:
        """How many tokens this prompt and ``tokens`` begin with alike."""
        count = 0
        for own, other in zip(self.ids, tokens, strict=False):
            if own != other:
                break
            count += 1
        return count


def document_prompt(
    encoder: ConversationEncoder,
    document: str,
    turns: Sequence[Turn] = (Turn.of("user", ""),),
    tools: Sequence[Mapping[str, Any]] = (),
) -> Prompt:
    """A document as the context. It stands at the beginning of the first user turn, or of the last turn without any.

    Args:
        encoder: Renders with the model's chat template.
        document: The context.
        turns: The conversation about it. The last turn is the question, whose text is left open.
        tools: JSON schemas, for the chat template.
    """
    turns = [*map(_unmarked, turns[:-1]), Turn.of(turns[-1].role, _QUESTION)]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns) - 1)
    turns[first] = Turn.of(turns[first].role, f"{_DOCUMENT}\n\n{turns[first].text}")
    head, _, tail = _rendered(encoder, turns, tools).partition(_DOCUMENT)
    return Prompt(head, _without_markers(encoder.sanitize(document)).strip(), tail)


def conversation_prompt(
    encoder: ConversationEncoder, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()
) -> Prompt:
    """A conversation whose last turn is the question, whose text is left open. All before it is the context."""
    open_turns = [*map(_unmarked, turns[:-1]), Turn.of(turns[-1].role, _QUESTION)]
    before, _, after = _rendered(encoder, open_turns, tools).partition(_QUESTION)
    return Prompt("", before, _QUESTION + after)


def _rendered(encoder: ConversationEncoder, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> str:
    return encoder.render_generation(GenerationRequest(tuple(turns)), tools=[_without_markers(tool) for tool in tools])


def _unmarked(turn: Turn) -> Turn:
    calls = tuple(ToolCall(call.name, _without_markers(call.arguments)) for call in turn.tool_calls)
    return Turn(turn.role, (Segment(_without_markers(turn.text)),), calls)


def _without_markers(value: Any) -> Any:
    """A text, or plain values with texts in them, without the two characters."""
    if isinstance(value, Mapping):
        return {_without_markers(key): _without_markers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_markers(item) for item in value]
    return value.replace(_QUESTION, "").replace(_DOCUMENT, "") if isinstance(value, str) else value
