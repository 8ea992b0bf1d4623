"""Conversations for RAPID: messages and documents as a caller has them, as a prompt with its context and a question."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import ToolCall, Turn
from specrag.models.tokenization import ConversationEncoder
from specrag.rapid.prompt import Prompt, conversation_prompt, document_prompt
from specrag.rapid.tools import call_arguments, check_tools, without_thinking

# A single message with less text before its last paragraph is all question.
_CONTEXT_CHARACTERS = 1000
# The context between two rules of dashes, as in LlamaIndex's question-answering templates and others like them.
_RULED = re.compile(r"\A.*?^-{5,}\n.*?^-{5,}\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
        role: ``"system"`` (or ``"developer"``, which means the same), ``"user"``, ``"assistant"``, or ``"tool"``: what
            a tool returned, in the order of the calls.
        content: The text.
        tool_calls: The calls that an assistant's message asks for.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


def assistant_message(text: str, calls: Iterable[tuple[str | None, Any]] = ()) -> Message:
    """An assistant's message with the calls that it made, each a name and arguments.

    Arguments may be a mapping or its JSON. A call with others was never made as one: it is shown as text.
    """
    made, broken = [], []
    for name, arguments in calls:
        try:
            if not isinstance(name, str):
                raise ValueError("a call without a name")
            made.append(ToolCall(name, call_arguments(arguments)))
        except ValueError:
            shown = arguments if name is None else f"{name}: {arguments}"
            broken.append(f"<tool_call>\n{shown}\n</tool_call>")
    return Message("assistant", "\n".join([*([text] if text else []), *broken]), tuple(made))


def document_texts(documents: Any) -> Sequence[str]:
    """The texts of ``documents``: one or several texts, or objects with ``page_content`` or ``text``; ``None``: none.

    Raises:
        InvalidInputError: One of them is something else.
    """
    if documents is None:
        return ()
    if isinstance(documents, str) or _document_text(documents) is not None:
        documents = [documents]
    elif isinstance(documents, Mapping | bytes) or not isinstance(documents, Iterable):
        documents = [documents]  # refused below, by its type
    texts = []
    for document in documents:
        text = document if isinstance(document, str) else _document_text(document)
        if text is None:
            raise InvalidInputError(
                f"documents are texts, or objects with page_content or text, got {kind_of(document)}"
            )
        texts.append(text)
    return texts or ()


def _document_text(document: Any) -> str | None:
    found = getattr(document, "page_content", None)
    found = getattr(document, "text", None) if found is None else found
    return found if isinstance(found, str) else None


def conversation(
    encoder: ConversationEncoder,
    messages: Sequence[Message],
    documents: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[Prompt, str]:
    """A conversation as (the prompt with its context, the question).

    Raises:
        InvalidInputError: The last message asks nothing, a role is unknown, or the template has no tools.
    """
    if not messages or messages[-1].role not in ("user", "tool"):
        raise InvalidInputError("the last message must be the user's, or a tool's result")
    if tools:
        check_tools(encoder)
    turns = [_turn(message) for message in messages]
    question = turns[-1].text
    if not question.strip():
        raise InvalidInputError("the last message is empty")
    if documents:
        document = "\n\n".join(text.strip() for text in documents if text.strip())
        if not document:
            raise InvalidInputError("the documents are empty")
        return document_prompt(encoder, document, turns, tools), question
    if turns[-1].role == "user" and not any(turn.role in ("user", "tool") for turn in turns[:-1]):
        document, question = split_context(question)
        if document:
            return document_prompt(encoder, document, turns, tools), question
    return conversation_prompt(encoder, turns, tools), question


def split_context(text: str) -> tuple[str, str]:
    """A long message as (its context, its question). A short one is all question."""
    ruled = _RULED.match(text)
    if ruled and text[ruled.end() :].strip():
        return text[: ruled.end()].strip(), text[ruled.end() :].strip()
    before, gap, last = text.rstrip().rpartition("\n\n")
    if gap and len(before) >= _CONTEXT_CHARACTERS and len(last) < len(before):
        return before.strip(), last.strip()
    return "", text


def _turn(message: Message) -> Turn:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidInputError(f"a message's role must be system, user, assistant or tool, got {role!r}")
    text = message.content
    if role == "assistant":  # templates show no earlier thoughts
        text = without_thinking(text)
    elif role == "tool" and not text.strip():  # a tool that returned nothing
        text = "null"
    return replace(Turn.of(role, text), tool_calls=message.tool_calls)  # type: ignore[arg-type]
