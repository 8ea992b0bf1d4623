"""Chat models of other libraries (LangChain, LlamaIndex) and of hosted APIs, as language models.

A chat API writes the beginning of its replies itself. So the format is asked for in words (``free_format``). It cannot
score given text. Log-probabilities have the form of OpenAI's API, where the model gives any.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specrag import _blocking
from specrag.errors import LogProbsUnavailableError, ModelError, SpecRAGError
from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Sampling,
    Score,
    Turn,
)
from specrag.schema import Usage


@dataclass(frozen=True)
class ChatRequest:
    """What a chat API is asked: the conversation as (role, text) pairs, and the limits of the reply."""

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    top_log_probs: int = 0
    log_probs: bool = True


@dataclass(frozen=True)
class ChatReply:
    """What it answered.

    Attributes:
        content: OpenAI's ``logprobs.content``, one mapping per token; ``None`` where it gives none.
        cut: Whether the reply ended at its limit of tokens.
    """

    text: str
    content: Sequence[Mapping[str, Any]] | None = None
    usage: Usage = Usage()
    cut: bool = False


def chat_request(request: GenerationRequest, sampling: Sampling, top_log_probs: int, log_probs: bool) -> ChatRequest:
    """``request`` for a model whose reply cannot be prefilled with headers."""
    plain = is_plain(request)
    messages = [(turn.role, turn.text) for turn in request.turns]
    if not plain and request.free_format:
        messages[-1] = (messages[-1][0], f"{messages[-1][1]}\n\n{request.free_format}")
    headers = 0 if plain else sum(len(stage.header.encode()) for stage in request.stages)
    return ChatRequest(
        messages=tuple((str(role), text) for role, text in messages),
        max_tokens=request.max_tokens + headers,
        stop=request.stages[0].stop if plain else (),
        sampling=sampling,
        top_log_probs=top_log_probs,
        log_probs=log_probs,
    )


def is_plain(request: GenerationRequest) -> bool:
    """Whether one part without a header is asked for."""
    return len(request.stages) == 1 and not request.stages[0].header


def read_chat(reply: ChatReply, request: GenerationRequest, top_log_probs: int) -> Completion:
    """The whole reply as one part; ``staged`` only where one part was asked for."""
    finish = "length" if reply.cut else "stop"
    if reply.content is None:
        part = GeneratedText(reply.text, None, reply.usage.completion_tokens, finish=finish)  # type: ignore[arg-type]
        return Completion((part,), reply.usage, staged=is_plain(request))
    ends = ends_of_bytes([item.get("bytes") or list(str(item["token"]).encode()) for item in reply.content])
    kept = [i for i, end in enumerate(ends) if 0 < end <= len(reply.text)]
    tops = tuple({t["token"]: float(t["logprob"]) for t in item.get("top_logprobs") or ()} for item in reply.content)
    part = GeneratedText(
        text=reply.text,
        log_probs=tuple(float(reply.content[i]["logprob"]) for i in kept),
        tokens=len(kept),
        token_ends=tuple(ends[i] for i in kept),
        finish=finish,  # type: ignore[arg-type]
        top_log_probs=tops if top_log_probs else None,
    )
    return Completion((part,), reply.usage, staged=is_plain(request))


def ends_of_bytes(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The characters of the text up to the end of each token; one that ends inside a character ends before it."""
    ends, done, rest = [], 0, b""
    for token in tokens:
        rest += bytes(token)
        whole = rest.decode("utf-8", errors="ignore")
        if rest.decode("utf-8", errors="replace").endswith("\ufffd") and not rest.endswith("\ufffd".encode()):
            ends.append(done + len(whole))
            continue
        done += len(whole)
        rest = b""
        ends.append(done)
    return ends


class ChatLM(LanguageModel):
    """A chat model of another library as a drafter or verifier. A subclass implements ``reply``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._learned: dict[str, bool] = {}  # what the model can do; copies share it

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            prompt_log_probs=False, generation_log_probs=self._learned.get("log_probs"), batched=False, prefill=False
        )

    @abstractmethod
    async def reply(self, request: ChatRequest) -> ChatReply:
        """One answer of the model."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        return _blocking.run(self.agenerate(requests, sampling, top_log_probs=top_log_probs))

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        async def one(request: GenerationRequest) -> Completion:
            asked = chat_request(request, sampling, top_log_probs, self._learned.get("log_probs") is not False)
            try:
                reply = await self.reply(asked)
            except SpecRAGError:
                raise
            except Exception as error:
                raise ModelError(f"{self.name}: {type(error).__name__}: {error}") from error
            self._learned["log_probs"] = reply.content is not None
            return read_chat(reply, request, top_log_probs)

        return list(await asyncio.gather(*(one(request) for request in requests)))

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        raise LogProbsUnavailableError(f"{self.name} cannot score given text: it is a chat model")
