"""A reply while it is made, and as OpenAI's API shows it: whole, or as a stream of chunks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from specrag.serving.errors import ApiError


@dataclass(frozen=True)
class Told:
    """Something that happened on the way to the reply, for the extension field."""

    event: Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A piece of the reply."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of a reply.

    Attributes:
        finish: OpenAI's ``finish_reason``.
        prompt_tokens, completion_tokens: What the models read and wrote.
        details: The extension field.
    """

    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


Reply = AsyncIterator[Told | Text | Finished]


@dataclass(frozen=True)
class Shape:
    """How an endpoint shows its replies.

    Args:
        id: Of the reply.
        model: As the request names it.
        chat: Chat completions, else completions.
    """

    id: str
    model: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The reply in one object."""
        text, end = "", None
        async for item in reply:
            if isinstance(item, Text):
                text += item.text
            elif isinstance(item, Finished):
                end = item
        assert end is not None  # a reply ends so, or raises
        choice: dict[str, Any] = {"index": 0, "finish_reason": end.finish, "logprobs": None}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": end.usage, "specrag": plain(end.details)}

    async def streamed(self, reply: Reply, *, usage: bool, events: bool) -> AsyncIterator[dict[str, Any]]:
        """The reply in chunks.

        Args:
            usage: The last chunk has the usage.
            events: What happens on the way is told too.
        """
        if self.chat:
            yield self._chunk({"role": "assistant", "content": ""})
        async for item in reply:
            if isinstance(item, Text):
                yield self._chunk({"content": item.text} if self.chat else item.text)
            elif isinstance(item, Finished):
                end = self._chunk({} if self.chat else "", item.finish)
                yield {**end, "specrag": plain(item.details)}
                if usage:
                    yield {**self._chunk(None), "choices": [], "usage": item.usage}
            elif events:
                yield {**self._chunk({} if self.chat else ""), "specrag": {"event": plain(item.event)}}

    def _chunk(self, delta: Any, finish: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice["delta" if self.chat else "text"] = delta
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": [choice]}


def plain(value: Any) -> Any:
    """``value`` as JSON has it. A number that JSON lacks (an infinite log-probability) becomes ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sent(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event. JSON has no line ends, so that one line holds it."""
    shown = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    return f"data: {shown}\n\n".encode()


def sent_error(error: ApiError) -> bytes:
    """An error that comes when the stream has begun. Official clients raise it."""
    return sent(error.body())
