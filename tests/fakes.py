"""Stand-ins for faults: models that misbehave in ways that real ones cannot be made to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from specrag.errors import LogProbsUnavailableError
from specrag.models import Capabilities, Completion, GeneratedText, LanguageModel, Score
from specrag.models.base import Reader, Reading, Span
from specrag.models.embedders import Embedder
from specrag.schema import Passage, Usage


def part(text: str, log_prob: float | None = -0.5) -> GeneratedText:
    words = max(1, len(text.split()))
    return GeneratedText(text, None if log_prob is None else (log_prob,) * words, words)


def shortened(passages: Sequence[Passage], words: int = 40) -> list[Passage]:
    """The beginnings of real passages: a real model reads them in a fraction of the time."""
    return [replace(passage, text=" ".join(passage.text.split()[:words])) for passage in passages]


class ScriptedLM(LanguageModel):
    """Replies what ``reply(prompt text)`` says: (rationale, answer), a Completion, or an exception to raise."""

    name = "scripted"

    def __init__(
        self,
        reply: Callable[[str], object],
        *,
        batched: bool = True,
        scores: Callable[[str], float] | None = lambda text: -1.0,
        log_probs: bool = True,
        delay: Callable[[str], float] = lambda text: 0.0,
        window: int | None = None,
    ) -> None:
        self.reply, self.scores, self.delay = reply, scores, delay
        self._batched, self._log_probs, self._window = batched, log_probs, window
        self.generate_calls: list[int] = []
        self.score_calls: list[int] = []

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(self.scores is not None or None, self._log_probs, self._batched, True)

    @property
    def context_window(self):
        return self._window

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def generate(self, requests, sampling=None, *, top_log_probs=0):
        self.generate_calls.append(len(requests))
        return [self._complete(request, top_log_probs) for request in requests]

    def _complete(self, request, top_log_probs) -> Completion:
        made = self.reply(request.turns[-1].text)
        if isinstance(made, Exception):
            raise made
        if isinstance(made, Completion):
            return made
        log_prob = -0.5 if self._log_probs else None
        return Completion(tuple(part(text, log_prob) for text in made), Usage(10, 5))

    async def agenerate(self, requests, sampling=None, *, top_log_probs=0):
        await asyncio.sleep(max(self.delay(r.turns[-1].text) for r in requests))
        return self.generate(requests, sampling, top_log_probs=top_log_probs)

    def score(self, requests: Sequence) -> list[Score]:
        if self.scores is None:
            raise LogProbsUnavailableError("scripted to have no scores")
        self.score_calls.append(len(requests))
        made = []
        for turns in requests:
            value = self.scores(turns[1].text)
            if isinstance(value, Exception):
                raise value
            names = {segment.name for turn in turns for segment in turn.segments if segment.name}
            made.append(Score(dict.fromkeys(names, (value,)), Usage(prompt_tokens=7)))
        return made

    async def ascore(self, requests):
        await asyncio.sleep(max(self.delay(turns[1].text) for turns in requests))
        return self.score(requests)


def first_passage_lm(**options) -> ScriptedLM:
    """Answers with the number of the first ``passage <number>`` that it reads."""

    def reply(prompt: str) -> tuple[str, str]:
        first = prompt.split("passage ")[1].split(" ")[0]
        return f"Passage {first} says so.", f"answer {first}"

    return ScriptedLM(reply, **options)


def failing_lm(position: int, stage: str = "draft") -> ScriptedLM:
    """Writes "answer 0", "answer 1", ... one per call. Draft ``position`` fails, in drafting or in verification."""
    calls: list[str] = []

    def reply(prompt: str) -> object:
        calls.append(prompt)
        number = len(calls) - 1
        return RuntimeError("away") if stage == "draft" and number == position else ("because", f"answer {number}")

    def scores(text: str) -> object:
        return RuntimeError("away") if stage == "verify" and f"answer {position}" in text else -1.0

    return ScriptedLM(reply, batched=False, scores=scores)


class HashEmbedder(Embedder):
    """Vectors out of the texts' bytes: quick, equal for equal texts, of no meaning."""

    name = "hash"

    def __init__(self, dimension: int = 16) -> None:
        self.dimension, self.calls = dimension, 0

    def embed(self, texts):
        self.calls += len(texts)
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for i, text in enumerate(texts):
            seed = int.from_bytes(text.encode()[-8:].rjust(8, b"x"), "little")
            vectors[i] = np.random.default_rng(seed).standard_normal(self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


NAN = math.nan


class ScriptedReader(Reader):
    """Finds the spans that ``script`` names: {text of a span: probability}, anywhere; the rest is no answer."""

    def __init__(
        self, script: dict[str, float], *, name: str = "scripted-reader", error: Exception | None = None
    ) -> None:
        self.script, self.name, self.error = script, name, error
        self.read_calls: list[int] = []

    def read(self, question, texts, *, spans_per_passage=8):
        self.read_calls.append(len(texts))
        if self.error is not None:
            raise self.error
        found = [
            Span(number, at, at + len(said), math.log(share))
            for said, share in self.script.items()
            for number, text in enumerate(texts)
            for at in [text.find(said)]
            if at >= 0
        ]
        left = 1 - sum(math.exp(span.log_prob) for span in found)
        return Reading(tuple(sorted(found, key=lambda s: -s.log_prob)), math.log(max(left, 1e-9)), 10 * len(texts))

    def score(self, question, texts, spans):
        values = [self.script.get(texts[number][start:end]) for number, start, end in spans]
        return [None if value is None else math.log(value) for value in values]
