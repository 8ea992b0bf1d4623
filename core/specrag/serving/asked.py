"""What a request asks, whichever endpoint it came by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specrag.models.base import Sampling
from specrag.rapid.conversation import Message
from specrag.serving.errors import refused
from specrag.serving.keys import Owner
from specrag.serving.requests import ChatRequest, CompletionRequest, Extension, Generation

# OpenAI's seeds may be negative, and larger than some generators take.
_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request for a text.

    Attributes:
        owner: Who asks.
        model: As named in the request.
        messages: The conversation.
        where: The name of the field that holds the question, for errors.
        max_tokens: The most tokens of the reply; ``None``: as many as the model's own limit.
        stop: Strings that end the reply.
        temperature, top_p, seed: ``None``: the server's own.
        file_ids: Uploaded files to read.
        options: The extension field.
    """

    owner: Owner
    model: str
    messages: tuple[Message, ...]
    where: str
    max_tokens: int | None
    stop: tuple[str, ...]
    temperature: float | None
    top_p: float | None
    seed: int | None
    file_ids: tuple[str, ...]
    options: Extension

    @property
    def question(self) -> str:
        """The last message, which is the user's.

        Raises:
            ApiError: It is another's, or empty.
        """
        last = self.messages[-1]
        if last.role != "user":
            raise refused("the last message must be the user's", self.where)
        if not last.content.strip():
            raise refused("the question is empty", self.where)
        return last.content

    def sampling(self, own: Sampling) -> Sampling:
        """``own`` with what the request says."""
        return Sampling(
            temperature=own.temperature if self.temperature is None else self.temperature,
            top_k=own.top_k,
            top_p=own.top_p if self.top_p is None else self.top_p,
            seed=own.seed if self.seed is None else self.seed,
        )


def asked(request: Generation, owner: Owner, most: int) -> Asked:
    """What ``request`` asks.

    Args:
        most: The most tokens that a request may ask for.

    Raises:
        ApiError: A message has parts that are not taken, or too many tokens are asked for.
    """
    files: list[str] = list(request.specrag.file_ids)
    if isinstance(request, ChatRequest):
        where, messages = f"messages[{len(request.messages) - 1}].content", []
        for at, message in enumerate(request.messages):
            text, attached = _read_content(message.content, f"messages[{at}].content")
            files += [file for file in attached if file not in files]
            messages.append(Message("system" if message.role == "developer" else message.role, text))
    else:
        assert isinstance(request, CompletionRequest)
        where, messages = "prompt", [Message("user", request.prompt)]
    if request.longest is not None and request.longest > most:
        name = "max_completion_tokens" if getattr(request, "max_completion_tokens", None) else "max_tokens"
        raise refused(f"'{name}' may be {most} at most on this server, got {request.longest}", name)
    return Asked(
        owner=owner,
        model=request.model,
        messages=tuple(messages),
        where=where,
        max_tokens=request.longest,
        stop=tuple(request.stop or ()),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=None if request.seed is None else request.seed % _SEEDS,
        file_ids=tuple(files),
        options=request.specrag,
    )


def _read_content(content: Any, where: str) -> tuple[str, list[str]]:
    """The text of a message's content, and the ids of the files that it names.

    Raises:
        ApiError: It has a part of another kind.
    """
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise refused("a text or a list of parts is expected", where, "invalid_type")
    texts, files = [], []
    for at, part in enumerate(content):
        field = f"{where}[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_string(part.get("text"), f"{field}.text"))
        elif kind == "file":
            file = part.get("file")
            if not isinstance(file, dict) or not file.get("file_id"):
                raise refused("a file is named by its id: upload it with POST /v1/files", f"{field}.file.file_id")
            files.append(_string(file["file_id"], f"{field}.file.file_id"))
        else:
            raise refused("parts of the types 'text' and 'file' are taken", f"{field}.type", "unsupported_value")
    return "\n".join(texts), files


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise refused("a text is expected", where, "invalid_type")
    return value


def shown_roles(messages: Sequence[Message]) -> str | None:
    """A note on the messages that a model which reads the last one alone leaves out; ``None`` where there is none."""
    if len(messages) < 2:
        return None
    return f"the last message is the question: {len(messages) - 1} messages before it were not read"
