"""The interface between the pipelines and what runs a model: ``LanguageModel``, its requests and its results.

A request is a conversation with marked pieces. For generation, they are the parts that the model must write, each
after a fixed header (``Stage``). For scoring, they are the pieces whose log-probability is wanted (``Segment.name``).
Backends render, tokenise and batch. They know nothing of drafts or verdicts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specrag._abandoned import in_thread
from specrag._fields import check_numbers, check_whole_numbers
from specrag._unicode import well_formed
from specrag.errors import InvalidInputError, ModelError, kind_of
from specrag.schema import Usage

Role = Literal["system", "user", "assistant", "tool"]

#: What the weights of a model in this process are kept as, on a CPU; see ``TransformersLM``.
Quantization = Literal["int8", "int4", "gguf"]

#: Log-probabilities are at most 0; so much above it is rounding.
MOST_LOG_PROB = 1e-3


@dataclass(frozen=True)
class Segment:
    """A piece of a turn's text. A ``name`` asks for the log-probabilities of the piece's tokens.

    With ``control``, control tokens in the text are meant as such. Otherwise they are defused, so that a text that
    somebody else wrote cannot use them.
    """

    text: str
    name: str | None = None
    control: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", well_formed(self.text))


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for."""

    name: str
    arguments: Mapping[str, Any]

    def rendered(self) -> str:
        """The call as text, in the format of the templates that know ``<tool_call>``."""
        call = {"name": self.name, "arguments": dict(self.arguments)}
        return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. Its content is its segments, joined with nothing between them.

    Attributes:
        role: Who says it. A turn of the role ``"tool"`` is what a tool returned.
        segments: The content.
        tool_calls: The calls that an assistant asks for after the content.
    """

    role: Role
    segments: tuple[Segment, ...]
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, role: Role, text: str) -> Turn:
        """A turn of one unnamed segment."""
        return cls(role, (Segment(text),))

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True)
class Stage:
    """A part that the model writes after ``header``, up to ``max_tokens``, a stop string or an end of sequence.

    Stop strings count from the first visible character on: white space before it ends nothing. A server that cannot
    wait for that character may return an empty part.

    The header is prefilled, not sampled, so it is always there; its tokens are not scored. A line break that ended the
    stage before is not fed: the header begins with it. Of a stop string of several tokens, a model in this process has
    read all but the last one when the next stage begins; a server has not.

    Raises:
        InvalidInputError: ``max_tokens`` is no whole number or below 1, or a stop string is empty or no text.
    """

    header: str = ""
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole_numbers(least=1, max_tokens=self.max_tokens)
        object.__setattr__(self, "stop", stop_strings(self.stop))


def stop_strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings of a caller: one, several or none.

    Raises:
        InvalidInputError: One is empty or no text.
    """
    listed = (given,) if isinstance(given, str) else tuple(given or ())
    for string in listed:
        if not isinstance(string, str):
            raise InvalidInputError(f"a stop string must be a text, got {kind_of(string)}")
        if not string:
            raise InvalidInputError("a stop string must not be empty")
    return listed


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation that ends with the user's turn, and what the assistant must write.

    Attributes:
        free_format: The format in words. A backend that cannot prefill headers adds it to the last turn.
    """

    turns: tuple[Turn, ...]
    stages: tuple[Stage, ...] = (Stage(),)
    free_format: str = ""

    @property
    def max_tokens(self) -> int:
        """The limit of all stages together, without their headers."""
        return sum(stage.max_tokens for stage in self.stages)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Log-probabilities in results do not depend on it: they are at temperature 1.

    Args:
        temperature: 0 is greedy.
        top_k: Only the ``top_k`` likeliest tokens are drawn; 0: all.
        top_p: Only the likeliest tokens whose probabilities sum to ``top_p`` are drawn; after ``top_k``.
        seed: Row i of a batch draws from its own generator, seeded with ``seed + i``.

    Raises:
        InvalidInputError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_numbers(temperature=self.temperature, top_p=self.top_p)
        check_whole_numbers(top_k=self.top_k)
        if self.seed is not None:
            check_whole_numbers(seed=self.seed)
        if not self.temperature >= 0:
            raise InvalidInputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise InvalidInputError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every position."""
        return self.temperature == 0


@dataclass(frozen=True)
class GeneratedText:
    """What the model wrote in one stage.

    Attributes:
        log_probs: One entry per token of ``text``, in nats, without stop strings and end of sequence; ``None`` where
            the backend gives none.
        tokens: How many tokens ``text`` has.
        token_ends: The index in ``text`` at which each token ends.
        finish: ``"length"``: the text ended at ``max_tokens``.
        top_log_probs: Per position, the texts of the likeliest tokens with their log-probabilities.

    Raises:
        ModelError: A log-probability is above 0.
    """

    text: str
    log_probs: tuple[float, ...] | None
    tokens: int
    token_ends: tuple[int, ...] | None = None
    finish: Literal["stop", "length"] = "stop"
    top_log_probs: tuple[Mapping[str, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", well_formed(self.text, keep_length=True))
        _check_log_probs(self.log_probs or ())


@dataclass(frozen=True)
class Completion:
    """The answer to a ``GenerationRequest``: one part per stage.

    Attributes:
        staged: False where the backend could not prefill the headers (a hosted chat API). Then there is one part, the
            whole reply, and the caller looks for the headers in it.
        notes: What was not done as asked.
    """

    parts: tuple[GeneratedText, ...]
    usage: Usage = Usage()
    staged: bool = True
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text of all parts, without their headers."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Score:
    """Log-probabilities of the named segments of one conversation, token by token, in nats.

    Attributes:
        log_probs: By name. A segment whose log-probabilities are missing is left out.
        notes: Why some are missing.

    Raises:
        ModelError: A log-probability is above 0.
    """

    log_probs: Mapping[str, tuple[float, ...]]
    usage: Usage = Usage()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for values in self.log_probs.values():
            _check_log_probs(values)


def _check_log_probs(values: Sequence[float]) -> None:
    if values and max(values) > MOST_LOG_PROB:
        raise ModelError(f"a log-probability is above 0: {max(values)}; expected natural logarithms of probabilities")


@dataclass(frozen=True)
class Capabilities:
    """What a backend can give; ``None``: not known before the first call.

    Attributes:
        prompt_log_probs: Whether it can score given text.
        generation_log_probs: Whether it gives the log-probabilities of what it writes.
        batched: Whether one call with many requests is faster than many calls (a model in this process). Where it is
            not (a server), the pipeline sends each request by itself and uses what arrives first.
        prefill: Whether it can continue a header that was written for it.
        most_top_log_probs: How many likely tokens it lists at each position, at most (OpenAI's API: 20).
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
    """What a reader finds: the likeliest spans, best first, and log P(no span answers). ``tokens`` were read."""

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
        return await in_thread(self.read, question, texts, spans_per_passage=spans_per_passage)

    async def ascore(
        self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]
    ) -> list[float | None]:
        """``score`` without blocking the event loop."""
        return await in_thread(self.score, question, texts, spans)


class LanguageModel(ABC):
    """Anything that generates and scores text. A subclass implements ``generate``, ``score`` and ``capabilities``.

    Attributes:
        name: Which model it is, for messages and results.
        folder: The folder on this machine with its weights, or with those of its adapter. What it was trained with is
            in there too.
    """

    name: str = "language model"
    folder: Path | None = None

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this backend can give, as far as it is known."""

    @property
    def context_window(self) -> int | None:
        """Tokens that prompt and completion may have together; ``None`` where it is not known."""
        return None

    @abstractmethod
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        """One completion per request, in order.

        Args:
            top_log_probs: How many of the likeliest tokens to report per position.

        Raises:
            ModelError: The backend failed; nothing of the batch is returned.
        """

    @abstractmethod
    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        """The log-probabilities of every named segment, one ``Score`` per conversation, in order.

        Raises:
            LogProbsUnavailableError: The backend cannot score given text.
            ModelError: It failed.
        """

    async def prepare(self) -> None:  # noqa: B027 - most models have nothing to find out
        """Find out what should be known before the first call: the window, what a server can do. It never fails."""

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        """``generate`` without blocking the event loop."""
        return await in_thread(self.generate, requests, sampling, top_log_probs=top_log_probs)

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        """``score`` without blocking the event loop."""
        return await in_thread(self.score, requests)

    def count_tokens(self, text: str) -> int:
        """How many tokens ``text`` has; where the backend has no tokenizer here, an estimate, high for most texts."""
        return len(text.encode()) // 2 + 1
