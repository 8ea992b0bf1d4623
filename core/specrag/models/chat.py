"""Chat models of other libraries (LangChain, LlamaIndex) and of hosted APIs, as language models.

A chat API writes the beginning of its replies itself. So the format is asked for in words (``free_format``). It cannot
score given text. Log-probabilities have the form of OpenAI's API, where the model gives any.
"""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrag import _blocking
from specrag.errors import LogProbsUnavailableError, ModelError, SpecRAGError, described
from specrag.models._logprobs import all_listed, ends_in, ends_of_beginning, listed_tokens, stop_hides
from specrag.models._options import names_log_probs, refused_option
from specrag.models._secrets import redacted, secrets_of
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
    """What a chat API is asked: the conversation as (role, text) pairs, and the limits of the reply.

    Attributes:
        without: Names of options that the API refused before: they are not sent.
    """

    messages: tuple[tuple[str, str], ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    top_log_probs: int = 0
    log_probs: bool = True
    without: frozenset[str] = frozenset()


#: The options of a request that it can do without; ``ChatRequest.without`` holds some of them.
OPTIONS = ("temperature", "top_p", "top_k", "seed", "max_tokens", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class ChatReply:
    """What it answered.

    Attributes:
        content: OpenAI's ``logprobs.content``, one mapping per token; ``None`` where it gives none.
        cut: Whether the reply ended at its limit of tokens.
        thought: The API took the model's thinking off, whose tokens are in ``usage``.
    """

    text: str
    content: Sequence[Mapping[str, Any]] | None = None
    usage: Usage = Usage()
    cut: bool = False
    thought: bool = False


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
        stop=chat_stop(request),
        sampling=sampling,
        top_log_probs=top_log_probs,
        log_probs=log_probs,
    )


def chat_stop(request: GenerationRequest) -> tuple[str, ...]:
    """The strings that end the reply to ``request``: none where it is in free form."""
    return request.stages[0].stop if is_plain(request) else ()


def own_options(model: Any, sampling: Sampling) -> frozenset[str]:
    """Options that the user set on a library's model itself and that ``sampling`` does not change.

    A temperature on the model counts, unless the pipeline samples with one of its own.
    """
    field = getattr(type(model), "model_fields", {}).get("temperature")
    value = getattr(model, "temperature", None)
    own = field is not None and value is not None and value != field.default
    return frozenset({"temperature"} if own and sampling.greedy else ())


def is_plain(request: GenerationRequest) -> bool:
    """Whether one part without a header is asked for."""
    return len(request.stages) == 1 and not request.stages[0].header


#: The types of a message's parts that hold its text. Others are thoughts, calls and media.
TEXT_PARTS = ("text", "input_text", "output_text", "text-plain")


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or a list of strings and parts of which those with text count."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") in TEXT_PARTS else part
        for part in content
    ]
    return "".join(text for text in texts if isinstance(text, str))


# The fields in which libraries and servers say why a reply ended, the fields that hold those, and the values that mean
# "at its limit of tokens".
_REASONS = ("finish_reason", "stop_reason", "done_reason", "finishReason", "stopReason", "reason")
_WITHIN = ("choices", "candidates", "incomplete_details")
_AT_LIMIT = frozenset({"length", "max_tokens", "max_output_tokens", "max_length", "model_length"})


def ended_at_limit(told: Any) -> bool:
    """Whether the metadata of a reply, a mapping or an object, says that the reply ended at its limit of tokens.

    OpenAI says "length", Anthropic "max_tokens", Google "MAX_TOKENS", and each under a name of its own.
    """
    inner = [_told(told, name) for name in _WITHIN]
    whole = [told, *(one for each in inner for one in (each if isinstance(each, list) else [each]))]
    reasons = [_told(one, name) for one in whole for name in _REASONS]
    return any(str(getattr(each, "name", None) or each).rpartition(".")[2].lower() in _AT_LIMIT for each in reasons)


def _told(told: Any, name: str) -> Any:
    return told.get(name) if isinstance(told, Mapping) else getattr(told, name, None)


_TAG = re.compile(r"(?i)[<\[](/?)(?:think|thinking|thought|reasoning|seed:think)[>\]]")


def answer_start(text: str) -> int:
    """The index in ``text`` after the model's thinking: the length of ``text`` where the thinking has no end.

    A template may have written the tag that opens it, so that only the one that closes it is there.
    """
    begin, opened = 0, False
    for tag in _TAG.finditer(text):
        if tag[1]:
            begin, opened = tag.end(), False
        elif not text[begin : tag.start()].strip():
            opened = True
    return len(text) if opened else begin + (len(text[begin:]) - len(text[begin:].lstrip()) if begin else 0)


def read_chat(reply: ChatReply, request: GenerationRequest, top_log_probs: int) -> Completion:
    """The whole reply as one part, without thinking; ``staged`` only where one part was asked for."""
    text = reply.text[answer_start(reply.text) :]
    part = GeneratedText(text, None, reply.usage.completion_tokens, finish="length" if reply.cut else "stop")
    tokens = listed_tokens(reply.content) or []
    notes: tuple[str, ...] = ()
    if tokens:
        written = 0 if reply.thought else reply.usage.completion_tokens
        ends = ends_in(text, tokens)
        if ends is None and not reply.cut and stop_hides(text, written - len(tokens), chat_stop(request)):
            ends = ends_of_beginning(text, tokens)
        kept = [i for i, end in enumerate(ends or ()) if 0 < end <= len(text)]
        values = [tokens[i].log_prob for i in kept]
        known = tuple(value for value in values if value is not None)
        if ends and known and len(known) == len(values) and all_listed(tokens, written, cut=reply.cut):
            part = replace(part, log_probs=known, tokens=len(kept), token_ends=tuple(ends[i] for i in kept))
        elif text.strip():
            notes = ("the log-probabilities do not add up to the reply, so they are left out",)
        if top_log_probs:
            part = replace(part, top_log_probs=tuple(token.top for token in tokens))
    return Completion((part,), reply.usage, staged=is_plain(request), notes=notes)


class ChatLM(LanguageModel):
    """A chat model of another library as a drafter or verifier. A subclass implements ``reply``.

    Keys that its attributes hold stand in no error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._learned: dict[str, bool] = {}  # what the model can do; copies share it
        self._refused: set[str] = set()  # options that it refuses; copies share them too

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            prompt_log_probs=False, generation_log_probs=self._learned.get("log_probs"), batched=False, prefill=False
        )

    @abstractmethod
    async def reply(self, request: ChatRequest) -> ChatReply:
        """One answer of the model. Options in ``request.without`` are not sent."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        return _blocking.run(self.agenerate(requests, sampling, top_log_probs=top_log_probs))

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        return list(await asyncio.gather(*(self._one(request, sampling, top_log_probs) for request in requests)))

    async def _one(self, request: GenerationRequest, sampling: Sampling, top_log_probs: int) -> Completion:
        """The reply to one request. An option that the model refuses is left out, from then on."""
        for _ in range(1 + len(OPTIONS)):
            without = frozenset(self._refused)
            log_probs = self._learned.get("log_probs") is not False and "logprobs" not in without
            asked = replace(chat_request(request, sampling, top_log_probs, log_probs), without=without)
            try:
                reply = await self.reply(asked)
            except SpecRAGError:
                raise
            except Exception as error:
                if not self._drops(error, asked):
                    shown = redacted(f"{self.name}: {described(error)}", secrets_of(self, depth=3))
                    raise ModelError(shown) from None
                continue
            if reply.content is not None:
                self._learned["log_probs"] = True
            elif reply.text:
                self._learned["log_probs"] = False
            made = read_chat(reply, request, top_log_probs)
            return replace(made, notes=(*made.notes, *_notes(without)))
        raise ModelError(f"{self.name} refuses every option: {', '.join(sorted(self._refused))}")

    def _drops(self, error: Exception, asked: ChatRequest) -> bool:
        """Whether ``error`` says that an option of ``asked`` is not supported, which is then remembered."""
        status = getattr(error, "status_code", None)
        if status not in (None, 400, 404, 422):
            return False
        said = str(error)
        if asked.log_probs and names_log_probs(said):
            self._learned["log_probs"] = False
            self._refused.update({"logprobs", "top_logprobs"})
            return True
        option = refused_option(said, [name for name in OPTIONS if name not in self._refused | asked.without])
        if option is None:
            return bool(self._refused - asked.without)  # another request has found it out
        self._refused.add(option)
        return True

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        raise LogProbsUnavailableError(f"{self.name} cannot score given text: it is a chat model")


def _notes(refused: frozenset[str]) -> tuple[str, ...]:
    """What an answer says of options that were not sent."""
    names = sorted(refused - {"logprobs", "top_logprobs"})
    return (f"refused by the model, so not sent: {', '.join(names)}",) if names else ()
