"""Log-probabilities as servers and libraries list them, in either of OpenAI's two shapes.

    {"tokens": [...], "token_logprobs": [...], "top_logprobs": [{...}], "text_offset": [...]}    /completions
    {"content": [{"token": ..., "bytes": ..., "logprob": ..., "top_logprobs": [...]}]}           /chat/completions

llama.cpp sends the second one from both endpoints. What is missing is ``None``: never 0, never an empty sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specrag.models.base import MOST_LOG_PROB

# What a token's text is where its bytes are no characters by themselves.
_DAMAGED = "\ufffd"


@dataclass(frozen=True)
class ListedToken:
    """A token as it is listed.

    Attributes:
        data: The bytes of its text; ``None`` where they are not known.
        log_prob: In nats; ``None`` where it is missing.
        top: The likeliest tokens at its position.
    """

    text: str
    data: bytes | None
    log_prob: float | None
    id: int | None
    top: Mapping[str, float]


def log_prob(value: Any) -> float | None:
    """A log-probability in nats; ``None`` where ``value`` is none: ``null``, no number, or above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    number = float(value) if abs(value) < 1e300 or isinstance(value, float) else math.copysign(math.inf, value)
    return None if number > MOST_LOG_PROB else min(0.0, number) if number == number else math.nan


def listed_tokens(logprobs: Any) -> list[ListedToken] | None:
    """The tokens of a choice's ``logprobs``; ``None`` where there are none or they are not in one of the shapes."""
    if isinstance(logprobs, Mapping):
        if isinstance(logprobs.get("token_logprobs"), list):
            return _parallel(logprobs)
        logprobs = logprobs.get("content")
    if not isinstance(logprobs, Sequence) or isinstance(logprobs, str | bytes) or not logprobs:
        return None
    if not all(isinstance(item, Mapping) and isinstance(item.get("token"), str) for item in logprobs):
        return None
    return [_item(item) for item in logprobs]


def ends_in(text: str, tokens: Sequence[ListedToken]) -> list[int] | None:
    """The index in ``text`` at which each token ends; ``None`` where the tokens do not add up to ``text``.

    A token that ends inside a character ends before it. Tokens before ``text`` have ends of 0 or less, tokens after it
    ends beyond its length.
    """
    spellings = [(token.text, len(token.text)) for token in tokens]
    whole = "".join(piece for piece, _ in spellings)
    ends, at = [], 0
    for _, length in spellings:
        at += length
        ends.append(at)
    if not _holds(whole, text) and all(token.data is not None for token in tokens):
        data = [token.data or b"" for token in tokens]
        whole, ends = b"".join(data).decode(errors="replace"), ends_of_bytes(data)
    if not _holds(whole, text):
        return None
    start = 0 if whole.startswith(text) else whole.rfind(text)
    return [end - start for end in ends]


def ends_of_beginning(text: str, tokens: Sequence[ListedToken]) -> list[int] | None:
    r"""The index in ``text`` at which each token ends, where the tokens make up the beginning of ``text`` alone.

    llama.cpp does not list the token in which a stop string begins, whose first characters may belong to ``text``:
    ".\n" with the stop string "\n".
    """
    data = [token.data for token in tokens if token.data is not None]
    whole = b"".join(data).decode(errors="replace")
    if len(data) < len(tokens) or not text.startswith(whole):
        return None
    return ends_of_bytes(data)


def stop_hides(
    rest: str, unlisted: int, stop: Sequence[str], spelled: Callable[[str], Sequence[int]] | None = None
) -> bool:
    """Whether the first token that is not listed holds all of ``rest`` and the beginning of a stop string.

    Then every token that lies within the text is listed.

    Args:
        rest: The end of the text, which the listed tokens do not cover.
        unlisted: How many tokens the server counted, and did not list.
        stop: The strings that may have ended the text.
        spelled: Where the tokens of a text end, if the model's tokenizer is known.
    """
    if spelled is None:
        return unlisted == 1 and bool(stop)
    ends = [spelled(rest + string) for string in stop]
    return any(len(each) == unlisted and each[0] > len(rest) for each in ends)


def _holds(whole: str, text: str) -> bool:
    return whole.startswith(text) or (bool(text) and text in whole)


def ends_of_bytes(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The characters of the text up to the end of each token; one that ends inside a character ends before it."""
    ends, done, rest = [], 0, b""
    for token in tokens:
        rest += bytes(token)
        whole = rest.decode("utf-8", errors="ignore")
        if rest.decode("utf-8", errors="replace").endswith(_DAMAGED) and not rest.endswith(_DAMAGED.encode()):
            ends.append(done + len(whole))
            continue
        done += len(whole)
        rest = b""
        ends.append(done)
    return ends


def all_listed(tokens: Sequence[ListedToken], written: int, *, cut: bool, stop: Sequence[str] = ()) -> bool:
    """Whether every token of a text is listed.

    llama.cpp lists the tokens that make up one character as one, with the log-probability of the last.

    Args:
        written: How many tokens the server counted; 0 where it did not.
        cut: The text ended at its limit, so neither a stop string nor an end of sequence is missing in the list.
        stop: The strings that may have ended it. Their tokens need not be listed.
    """
    if written <= len(tokens) or all(token.text.isascii() for token in tokens):
        return True
    ended = cut or not tokens[-1].text
    may_miss = 0 if ended else max([1, *(len(string.encode()) for string in stop)])
    return written - len(tokens) <= may_miss


def _parallel(logprobs: Mapping[str, Any]) -> list[ListedToken] | None:
    values, texts, tops = logprobs["token_logprobs"], logprobs.get("tokens"), logprobs.get("top_logprobs")
    if not values or not isinstance(texts, list) or len(texts) != len(values):
        return None
    if not isinstance(tops, list) or len(tops) != len(values):
        tops = [None] * len(values)
    return [
        ListedToken(text, _bytes_of(text), log_prob(value), None, _top(top))
        for text, value, top in zip(map(str, texts), values, tops, strict=True)
    ]


def _item(item: Mapping[str, Any]) -> ListedToken:
    text, data, number = str(item["token"]), item.get("bytes"), item.get("id")
    whole = isinstance(data, list) and all(type(byte) is int and 0 <= byte < 256 for byte in data)
    return ListedToken(
        text,
        bytes(data) if whole and isinstance(data, list) else _bytes_of(text),
        log_prob(item.get("logprob")),
        number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None,
        _top(item.get("top_logprobs")),
    )


def _bytes_of(text: str) -> bytes | None:
    return None if _DAMAGED in text else text.encode(errors="replace")


def _top(listed: Any) -> dict[str, float]:
    """The likeliest tokens, from a mapping or a list of items; empty where a value is missing or no number."""
    if isinstance(listed, Mapping):
        pairs = [(str(token), log_prob(value)) for token, value in listed.items()]
    elif isinstance(listed, list) and all(isinstance(item, Mapping) for item in listed):
        pairs = [(str(item.get("token")), log_prob(item.get("logprob"))) for item in listed]
    else:
        return {}
    found: dict[str, float] = {}
    for token, value in pairs:
        if value is None or math.isnan(value):
            return {}
        found[token] = max(value, found.get(token, -math.inf))
    return found
