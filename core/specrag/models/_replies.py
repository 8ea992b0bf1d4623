"""Reading the replies of OpenAI-compatible servers: completions, echoed prompts, chat messages, embeddings.

Pure functions on the decoded JSON. A reply that cannot be used is a ``ServerError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specrag.errors import ServerError
from specrag.models.base import GeneratedText, Segment
from specrag.models.chat import ChatReply, ends_of_bytes
from specrag.models.tokenization import ConversationEncoder, EncodedConversation, IncrementalDecoder, assign_tokens
from specrag.schema import Usage

Reply = Mapping[str, Any]
#: Per named segment, the log-probabilities of its tokens in nats.
Named = dict[str, tuple[float, ...]]


def choice_of(reply: Reply) -> Mapping[str, Any]:
    """The first choice of a completion.

    Raises:
        ServerError: There is none.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ServerError(f"the server's reply has no choices; its keys: {', '.join(reply)}")
    return choices[0]


def usage_of(reply: Reply) -> Usage:
    """The tokens that the server counted; 0 where it does not say."""
    used = reply.get("usage") or {}
    return Usage(int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))


def read_chat_reply(reply: Reply) -> ChatReply:
    """The reply of ``/chat/completions``."""
    choice = choice_of(reply)
    return ChatReply(
        text=str((choice.get("message") or {}).get("content") or ""),
        content=(choice.get("logprobs") or {}).get("content") or None,
        usage=usage_of(reply),
        cut=choice.get("finish_reason") == "length",
    )


def read_echo(reply: Reply, pieces: Sequence[Segment]) -> Named | None:
    """The log-probabilities, in nats, of each named piece of a prompt that was sent as text.

    ``None`` where the reply does not hold the whole prompt with its log-probabilities.
    """
    echoed = choice_of(reply).get("logprobs") or {}
    values = echoed.get("token_logprobs") or []
    tokens = [str(token) for token in echoed.get("tokens") or ()]
    text, whole = "".join(piece.text for piece in pieces), "".join(tokens)
    if not values or len(whole.encode()) < len(text.encode()):
        return None
    ends = ends_of_bytes([list(token.encode()) for token in tokens])
    shift = max(0, whole.find(text))  # an echoed beginning-of-sequence token
    return _named(assign_tokens(pieces, *_spans([end - shift for end in ends])), values)


def read_echoed_ids(reply: Reply, encoded: EncodedConversation) -> Named | None:
    """The same for a prompt that was sent as token ids."""
    values = (choice_of(reply).get("logprobs") or {}).get("token_logprobs") or []
    return None if len(values) < len(encoded.ids) else _named(encoded.segments, values)


def _named(segments: Mapping[str, Sequence[int]], values: Sequence[Any]) -> Named:
    return {name: tuple(_log_prob(values[p]) for p in at) for name, at in segments.items()}


def _log_prob(value: Any) -> float:
    return math.nan if value is None else float(value)


def _spans(ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The characters of each token: ends and starts. A token that ends inside a character gets the span of the token
    that completes the character.
    """
    full, starts = list(ends), [0, *ends[:-1]]
    for i in range(len(full) - 2, -1, -1):
        if full[i] == starts[i]:
            full[i] = full[i + 1]
    return full, starts


class WrittenPart:
    """The tokens of one part, collected over one request, or several that continue each other."""

    def __init__(self, encoder: ConversationEncoder | None) -> None:
        self._encoder = encoder
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.log_probs_known = False
        self.text = ""  # without the last stop string
        self.text_with_stop = ""
        self._texts: list[str] = []
        self._top: list[Mapping[str, float]] = []

    def add(self, choice: Mapping[str, Any]) -> str | None:
        """Take the choice of the next reply; the stop string that ended it, where the server names one."""
        stopped = choice.get("stop_reason") if isinstance(choice.get("stop_reason"), str) else None
        listed = choice.get("logprobs") or {}
        self.log_probs_known = bool(listed)
        self.ids += choice.get("token_ids") or []
        self._texts += [str(token) for token in listed.get("tokens") or ()]
        self.log_probs += [_log_prob(value) for value in listed.get("token_logprobs") or ()]
        self._top += [dict(top or {}) for top in listed.get("top_logprobs") or ()]
        self.text = self.text_with_stop + str(choice.get("text") or "")
        self.text_with_stop = self.text + (stopped or "")
        return stopped

    def part(self, *, cut: bool, with_top: bool) -> GeneratedText:
        """The part as it was written; ``cut``: it ended at the limit of its tokens."""
        ends, kept = self._kept()
        return GeneratedText(
            text=self.text,
            log_probs=tuple(self.log_probs[:kept]) if self.log_probs_known else None,
            tokens=kept,
            token_ends=tuple(ends[:kept]) if self.log_probs_known else None,
            finish="length" if cut else "stop",
            top_log_probs=tuple(self._top) if with_top and self._top else None,
        )

    def split(self) -> tuple[list[int], str]:
        """The ids whose characters all belong to the text, and the rest of the text after them."""
        ends, kept = self._kept()
        if len(ends) != len(self.ids):
            kept = 0  # the server did not say which tokens it wrote: the whole text is tokenised anew
        return self.ids[:kept], self.text[ends[kept - 1] if kept else 0 :]

    def _ends(self) -> list[int]:
        if self.ids and self._encoder is not None and len(self.ids) == len(self.log_probs):
            decoder = IncrementalDecoder(self._encoder.tokenizer)
            for token in self.ids:
                decoder.add(token)
            decoder.flush()
            return decoder.ends
        return ends_of_bytes([list(text.encode()) for text in self._texts])

    def _kept(self) -> tuple[list[int], int]:
        """The ends of all tokens, and how many are of the text: not of the stop string, no end of sequence."""
        ends, last = self._ends(), len(self.text)
        kept = sum(1 for end in ends if end <= last)
        while kept and (ends[kept - 2] if kept > 1 else 0) == ends[kept - 1] == last:
            kept -= 1  # no characters: an end of sequence
        return ends, kept


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
    try:
        vectors = np.asarray(ordered, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ServerError(f"an embedding of the server holds what is no number: {error}") from error
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ServerError("an embedding of the server holds what is no finite number (NaN, infinity, a list)")
    return vectors
