"""The seam between the pipelines and whatever runs a model.

A request is a conversation whose pieces are marked: for generation, the parts that the model must
write, each behind a fixed header (``Stage``); for scoring, the pieces whose log-probability is wanted
(``Segment.name``). Backends render, tokenise and batch; they know nothing of drafts or verdicts.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specrag.errors import InvalidInputError
from specrag.schema import Usage

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Segment:
    """A piece of a turn's text. A ``name`` asks for the log-probabilities of the piece's tokens."""

    text: str
    name: str | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; its content is its segments, joined without anything between."""

    role: Role
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, role: Role, text: str) -> Turn:
        return cls(role, (Segment(text),))

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Stage:
    """A part that the model writes: after ``header``, up to ``max_tokens``, a stop string or end of sequence.

    Stop strings count from the first visible character on: white space before it ends nothing (a server
    that cannot wait for it may return an empty part).

    The header is put into the model's mouth: it costs no sampling, cannot be forgotten, and its tokens
    count for no log-probability. A line break that ended the stage before is not fed: the header begins with it.
    """

    header: str = ""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if "" in self.stop:
            raise InvalidInputError("a stop string must not be empty")


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation that ends in the user's turn, and what the assistant shall write.

    ``free_format`` tells the format in words; a backend that cannot put headers into the model's mouth
    adds it to the last turn.
    """

    turns: tuple[Turn, ...]
    stages: tuple[Stage, ...] = (Stage(),)
    free_format: str = ""

    @property
    def max_tokens(self) -> int:
        return sum(stage.max_tokens for stage in self.stages)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Log-probabilities in results do not depend on it: they are at temperature 1.

    Row i of a batch draws from its own generator, seeded with ``seed + i``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InvalidInputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise InvalidInputError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class GeneratedText:
    """What the model wrote in one stage.

    ``log_probs`` has one entry a token of ``text`` (stop strings and end of sequence left out), or is
    ``None`` where the backend gives none; ``token_ends`` says where in ``text`` each of them ends.
    ``top_log_probs`` holds the likeliest tokens' texts, one mapping a position.
    """

    text: str
    log_probs: tuple[float, ...] | None
    tokens: int
    token_ends: tuple[int, ...] | None = None
    finish: Literal["stop", "length"] = "stop"
    top_log_probs: tuple[Mapping[str, float], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to a ``GenerationRequest``: a part a stage.

    ``staged`` is false where the backend could not put headers into the model's mouth (a hosted chat
    API): then there is one part, the whole reply, and the caller looks for the headers in it.
    """

    parts: tuple[GeneratedText, ...]
    usage: Usage = Usage()
    staged: bool = True

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the named segments of one conversation, token by token, in nats."""

    log_probs: Mapping[str, tuple[float, ...]]
    usage: Usage = Usage()


@dataclass(frozen=True)
class Capabilities:
    """What a backend can give; ``None`` means that it is not known before the first call.

    ``batched``: one call with many requests is faster than many calls (a model in this process).
    Otherwise the pipeline sends each request on its own and uses what arrives first (a server).
    ``most_top_log_probs``: how many likely tokens it lists at each position, at most (OpenAI's API: 20).
    """

    prompt_log_probs: bool | None = None
    generation_log_probs: bool | None = None
    batched: bool = True
    prefill: bool | None = None
    most_top_log_probs: int = 20


@dataclass(frozen=True)
class Span:
    """A span of a passage: characters ``start`` to ``end`` of text number ``passage``.

    ``log_prob``: log P(span | question, all passages), in nats.
    """

    passage: int
    start: int
    end: int
    log_prob: float


@dataclass(frozen=True)
class Reading:
    """What a reader finds: the likeliest spans, best first, and log P(no span answers). ``tokens``: how many it read."""

    spans: tuple[Span, ...]
    log_no_answer: float
    tokens: int = 0


class Reader(ABC):
    """Anything that finds the spans of passages that answer a question: a drafter that copies, or a verifier of spans.

    All spans of all passages of a question, and "no span answers", share one distribution.
    """

    name: str = "reader"

    @abstractmethod
    def read(self, question: str, texts: Sequence[str], *, spans_per_passage: int = 8) -> Reading:
        """The likeliest spans of ``texts``.

        Raises:
            InvalidInputError: The question is empty, or ``spans_per_passage`` is below 1.
        """

    @abstractmethod
    def score(self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]) -> list[float | None]:
        """Log P of given spans: (number of the text, first character, one past the last).

        ``None`` for a span that this reader cannot score, because it has more tokens than a span may have.
        """

    async def aread(self, question: str, texts: Sequence[str], *, spans_per_passage: int = 8) -> Reading:
        """``read`` without blocking the event loop."""
        return await asyncio.to_thread(self.read, question, texts, spans_per_passage=spans_per_passage)

    async def ascore(
        self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]
    ) -> list[float | None]:
        """``score`` without blocking the event loop."""
        return await asyncio.to_thread(self.score, question, texts, spans)


class LanguageModel(ABC):
    """Anything that generates and scores text. Subclasses implement one blocking or async form of each.

    Attributes:
        folder: Where its weights lie, or those of its adapter, where that is a folder here. What it was trained with lies
            beside them.
    """

    name: str = "language model"
    folder: Path | None = None

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can give, as far as it is known by now."""

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and completion may have together; ``None`` where it is not known."""
        return None

    @abstractmethod
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        """A completion a request, in order.

        Raises:
            ModelError: The backend failed; nothing of the batch is returned.
        """

    @abstractmethod
    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        """The log-probabilities of every named segment, one ``Score`` a conversation, in order.

        Raises:
            LogProbsUnavailableError: The backend cannot score given text.
            ModelError: It failed.
        """

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        """``generate`` without blocking the event loop."""
        return await asyncio.to_thread(self.generate, requests, sampling, top_log_probs=top_log_probs)

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        """``score`` without blocking the event loop."""
        return await asyncio.to_thread(self.score, requests)

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text``; an upper estimate where the backend has no tokenizer here."""
        return len(text.encode()) // 2 + 1
