"""Reading the replies of OpenAI-compatible servers: completions, echoed prompts, chat messages, embeddings.

Pure functions on the decoded JSON. A reply that cannot be used is a ``ServerError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from specrag._fields import json_kind
from specrag.errors import ServerError
from specrag.models._http import NoSuchEndpointError
from specrag.models._logprobs import ends_in, listed_tokens
from specrag.models.base import Segment
from specrag.models.chat import ChatReply, content_text, ended_at_limit
from specrag.models.tokenization import EncodedConversation, assign_tokens
from specrag.schema import Usage

Reply = Mapping[str, Any]
#: Per named segment, the log-probabilities of its tokens in nats.
Named = dict[str, tuple[float, ...]]


def choice_of(reply: Reply) -> Mapping[str, Any]:
    """The first choice of a completion.

    Raises:
        ServerError: There is none, or the server says that it failed.
    """
    choices = reply.get("choices")
    if reply.get("error") and not choices:
        raise ServerError(f"the server answered with an error: {_error_text(reply['error'])}")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ServerError(f"the server's reply has no choices; its keys: {', '.join(reply)}")
    choice: Mapping[str, Any] = choices[0]
    if choice.get("finish_reason") == "error" or reply.get("error"):
        raise ServerError(f"the server failed while it wrote: {str(reply.get('error') or choice.get('error'))[:200]}")
    return choice


def checked_completion(reply: dict[str, Any]) -> dict[str, Any]:
    """``reply`` of ``/completions``.

    Raises:
        NoSuchEndpointError: It is a chat's message: the server answers every path as it answers chats.
        ServerError: It has no text, or its log-probabilities are NaN.
    """
    choice = choice_of(reply)
    text = choice.get("text")
    if text is None and isinstance(choice.get("message"), Mapping):
        raise NoSuchEndpointError("it answers /completions with a chat message")
    if not isinstance(text, str):
        raise ServerError(f"the text of the server's reply is {_kind(text)}, expected a string")
    _check_log_probs(choice)
    return reply


def checked_chat(reply: dict[str, Any]) -> dict[str, Any]:
    """``reply`` of ``/chat/completions``.

    Raises:
        ServerError: It has no message, or its log-probabilities are NaN.
    """
    choice = choice_of(reply)
    message = choice.get("message")
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | list | None):
        raise ServerError(f"the message of the server's reply is {_kind(message)}, expected an object with a content")
    _check_log_probs(choice)
    return reply


def _check_log_probs(choice: Mapping[str, Any]) -> None:
    """Whether none is NaN: a model whose numbers overflowed wrote no answer, and another server may."""
    if any(
        token.log_prob is not None and math.isnan(token.log_prob)
        for token in listed_tokens(choice.get("logprobs")) or ()
    ):
        raise ServerError("the log-probabilities of the server's reply are not numbers (NaN): its model is broken")


def _error_text(error: Any) -> str:
    message = error.get("message") if isinstance(error, Mapping) else None
    return str(message or error)[:200]


def _kind(value: Any) -> str:
    return "missing" if value is None else json_kind(value)


def usage_of(reply: Reply) -> Usage:
    """The tokens that the server counted; 0 where it does not say."""
    used = reply.get("usage")
    counts = used if isinstance(used, Mapping) else {}
    return Usage(_count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens")))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def read_chat_reply(reply: Reply) -> ChatReply:
    """The reply of ``/chat/completions``."""
    choice = choice_of(reply)
    message = choice.get("message") or {}
    listed = choice.get("logprobs")
    content = listed.get("content") if isinstance(listed, Mapping) else None
    return ChatReply(
        text=content_text(message.get("content")),
        content=content if isinstance(content, list) and content else None,
        usage=usage_of(reply),
        cut=ended_at_limit(choice),
        thought=bool(message.get("reasoning_content") or message.get("reasoning")),
    )


@dataclass(frozen=True)
class Echoed:
    """What an echoed prompt says of its named pieces: a piece whose log-probabilities are missing is left out."""

    named: Named
    notes: tuple[str, ...] = ()


def read_echo(reply: Reply, pieces: Sequence[Segment], encoded: EncodedConversation | None = None) -> Echoed | None:
    """The log-probabilities, in nats, of each named piece of a prompt that was sent as text.

    ``None`` where the server does not echo the prompt with its log-probabilities.

    Args:
        encoded: The same conversation, tokenised here. It places the tokens where their texts do not: a token that is
            part of a character may be listed as U+FFFD.
    """
    tokens = listed_tokens(choice_of(reply).get("logprobs"))
    if tokens is None or len(tokens) <= max(1, usage_of(reply).completion_tokens):
        return None
    values = [token.log_prob for token in tokens]
    text = "".join(piece.text for piece in pieces)
    ends = ends_in(text, tokens)
    if ends is not None:
        ends, starts = _spans(ends)
        echoed = sum(1 for start in starts if start < len(text))  # what follows was written by the server
        return _named(assign_tokens(pieces, ends[:echoed], starts[:echoed]), values)
    written = usage_of(reply).completion_tokens or 1
    if encoded is not None and len(encoded.ids) == len(tokens) - written:
        return _named(encoded.segments, values)
    return Echoed({}, ("left out: the tokens that the server echoes do not add up to what it was sent",))


def read_echoed_ids(reply: Reply, encoded: EncodedConversation) -> Echoed | None:
    """The same for a prompt that was sent as token ids."""
    tokens = listed_tokens(choice_of(reply).get("logprobs")) or []
    return None if len(tokens) < len(encoded.ids) else _named(encoded.segments, [token.log_prob for token in tokens])


def _named(segments: Mapping[str, Sequence[int]], values: Sequence[float | None]) -> Echoed:
    named: Named = {}
    for name, at in segments.items():
        found = [values[position] for position in at]
        known = [value for value in found if value is not None]
        if known and len(known) == len(found):
            named[name] = tuple(known)
    missing = ", ".join(name for name in segments if name not in named)
    return Echoed(
        named, (f"left out: the server gives no log-probabilities of some tokens ({missing})",) * bool(missing)
    )


def _spans(ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The characters of each token: ends and starts. A token that ends inside a character gets the span of the token
    that completes the character.
    """
    full, starts = list(ends), [0, *ends[:-1]]
    for i in range(len(full) - 2, -1, -1):
        if full[i] == starts[i]:
            full[i] = full[i + 1]
    return full, starts


def read_embeddings(reply: Reply, count: int) -> np.ndarray:  # [count, dim], float32
    """The vectors of ``/embeddings``, in the order of the texts.

    Raises:
        ServerError: Not one vector per text, an ``index`` that does not say which text it is, vectors of different
            dimensions, or values that are not finite numbers.
    """
    rows = reply.get("data")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ServerError(f"the server's reply has no list of embeddings; its keys: {', '.join(reply)}")
    if len(rows) != count:
        raise ServerError(f"the server returned {len(rows)} embeddings for {count} texts")
    listed = [row.get("index") for row in rows]
    places = list(range(count)) if all(place is None for place in listed) else listed
    if sorted(map(repr, places)) != sorted(map(repr, range(count))):
        raise ServerError(f"the server numbers {count} embeddings {places}: expected each of 0 to {count - 1} once")
    ordered = [rows[places.index(i)].get("embedding") for i in range(count)]
    for vector in ordered:
        if not isinstance(vector, list) or not vector:
            raise ServerError(f"an embedding of the server must be a list of numbers, got {str(vector)[:40]!r}")
    dimensions = sorted({len(vector) for vector in ordered})
    if len(dimensions) > 1:
        raise ServerError(f"the server's embeddings differ in dimension: {', '.join(map(str, dimensions))}")
    values = [value for vector in ordered for value in vector]
    if odd := [value for value in values if isinstance(value, bool) or not isinstance(value, Real | list | None)]:
        raise ServerError(f"an embedding of the server holds what is no number: {str(odd[0])[:40]!r}")
    try:
        vectors = np.asarray(ordered, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"an embedding of the server holds what is no number: {error}") from error
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ServerError("an embedding of the server holds what is no finite number (NaN, infinity, a list)")
    return vectors
