"""Drafting: a subset of passages -> an answer with its rationale (paper, section 3.2)."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from specrag.errors import InvalidInputError, ModelError
from specrag.models.base import Completion, GeneratedText, GenerationRequest, LanguageModel, Sampling, Stage, Turn
from specrag.schema import Draft, DraftFailure, Passage
from specrag.speculative.prompts import Prompts
from specrag.speculative.work import Work, current_work

# Tokens that a chat template and the passages' delimiters may add to what was counted.
_MARGIN = 64


@dataclass(frozen=True)
class _Job:
    """What one draft is made from."""

    index: int
    subset: tuple[int, ...]
    passages: Sequence[Passage]
    request: GenerationRequest
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Drafter:
    """Makes drafts with a language model.

    Args:
        max_rationale_tokens, max_answer_tokens: Where a draft is cut.
        sampling: How tokens are drawn; greedy by default, which makes repeated subsets pointless.
    """

    lm: LanguageModel
    prompts: Prompts = Prompts()
    max_rationale_tokens: int = 64
    max_answer_tokens: int = 24
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        for name in ("max_rationale_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def request(self, question: str, passages: Sequence[Passage]) -> GenerationRequest:
        """The generation that makes a draft: rationale, then answer, each one line."""
        return GenerationRequest(
            turns=(
                *(turn for asked, reply in self.prompts.examples for turn in _example(asked, reply)),
                Turn.of("user", self.prompts.draft_text(question, passages)),
            ),
            stages=(
                Stage(self.prompts.rationale_header, self.max_rationale_tokens, ("\n",)),
                Stage(f"\n{self.prompts.answer_header}", self.max_answer_tokens, ("\n",)),
            ),
            free_format=self.prompts.free_format,
        )

    def fit(self, question: str, passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], bool]:
        """``passages``, cut where they exceed the model's window together, and whether they were.

        Raises:
            InvalidInputError: The question alone does not fit.
        """
        window = self.lm.context_window
        kept = tuple(passages)
        if window is None:
            return kept, False
        request = self.request(question, kept)
        if sum(len(turn.text.encode()) for turn in request.turns) + request.max_tokens + _MARGIN <= window:
            return kept, False  # no tokenizer makes more tokens than bytes: nothing to count
        bare = self.request(question, [replace(p, text="", embedding=None) for p in kept])
        fixed = sum(self.lm.count_tokens(turn.text) for turn in bare.turns)
        room = window - fixed - bare.max_tokens - _MARGIN
        if room < len(kept):
            raise InvalidInputError(
                f"the question leaves no room for passages in the drafter's window of {window} tokens: shorten it"
            )
        sizes = [self.lm.count_tokens(passage.text) for passage in kept]
        if sum(sizes) <= room:
            return kept, False
        allowed = share(room, sizes)
        return tuple(
            replace(p, text=self._cut(p.text, size, limit)) for p, size, limit in zip(kept, sizes, allowed, strict=True)
        ), True

    def _cut(self, text: str, size: int, limit: int) -> str:
        while size > limit and text:
            text = text[: min(len(text) - 1, int(len(text) * limit / size))]
            size = self.lm.count_tokens(text)
        return text

    async def drafts(
        self, question: str, subsets: Sequence[tuple[int, ...]], passages: Sequence[Sequence[Passage]]
    ) -> AsyncIterator[Draft | DraftFailure]:
        """Drafts as they arrive. ``passages[j]`` are those of ``subsets[j]``; what fails costs its draft alone."""
        jobs: list[_Job] = []
        for j, (subset, members) in enumerate(zip(subsets, passages, strict=True)):
            fitted, cut = self.fit(question, members)
            notes: tuple[str, ...] = ()
            if cut:
                notes = (f"passages cut to fit the drafter's window of {self.lm.context_window} tokens",)
            jobs.append(_Job(j, subset, members, self.request(question, fitted), notes))

        async def one(job: _Job) -> Draft | DraftFailure:
            start = time.perf_counter()
            current_work.set(Work("draft", job.subset))  # of this task alone
            try:
                completion = (await self.lm.agenerate([job.request], self._seeded(job.index)))[0]
                return self._draft(completion, job, time.perf_counter() - start)
            except Exception as error:  # a failing drafter costs its draft, whatever it raises
                return DraftFailure(job.subset, f"{type(error).__name__}: {error}")

        if self.lm.capabilities.batched:
            start = time.perf_counter()
            try:
                completions = await self.lm.agenerate([job.request for job in jobs], self.sampling)
            except Exception:  # find the one that fails, and keep the others
                for job in jobs:
                    yield await one(job)
                return
            seconds = time.perf_counter() - start
            for job, completion in zip(jobs, completions, strict=True):
                try:
                    yield self._draft(completion, job, seconds)
                except ModelError as error:
                    yield DraftFailure(job.subset, str(error))
            return
        tasks = [asyncio.create_task(one(job)) for job in jobs]
        try:
            for next_done in asyncio.as_completed(tasks):
                yield await next_done
        finally:
            for task in tasks:
                task.cancel()

    def _draft(self, completion: Completion, job: _Job, seconds: float) -> Draft:
        return replace(self.read(completion, job.subset, job.passages, seconds), notes=job.notes)

    def _seeded(self, j: int) -> Sampling:
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=seed + j)

    def read(
        self, completion: Completion, subset: tuple[int, ...], passages: Sequence[Passage], seconds: float
    ) -> Draft:
        """A draft out of what the model wrote.

        Raises:
            ModelError: It wrote no answer, or its log-probabilities are not numbers.
        """
        if completion.staged:
            rationale, answer = completion.parts[0], completion.parts[-1]
        else:
            rationale, answer = split_reply(completion.parts[0], self.prompts)
        if not answer.text.strip():
            raise ModelError("the drafter wrote no answer")
        log_rationale, log_answer = total(rationale.log_probs), total(answer.log_probs)
        if any(value is not None and math.isnan(value) for value in (log_rationale, log_answer)):
            raise ModelError("the drafter's log-probabilities are not numbers (NaN)")
        return Draft(
            subset=subset,
            passages=tuple(passages),
            text=answer.text.strip(),
            rationale=rationale.text.strip(),
            abstained=self.prompts.is_abstention(answer.text),
            log_rationale=log_rationale,
            log_answer=log_answer,
            rationale_tokens=rationale.tokens,
            answer_tokens=answer.tokens,
            usage=completion.usage,
            seconds=seconds,
        )


def _example(asked: str, reply: str) -> tuple[Turn, Turn]:
    return Turn.of("user", asked), Turn.of("assistant", reply)


def share(room: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``room`` tokens among texts of ``sizes`` tokens: short ones whole, the rest equally."""
    allowed = [0] * len(sizes)
    left = list(range(len(sizes)))
    while left:
        part = room // len(left)
        short = [i for i in left if sizes[i] <= part]
        for i in short or left:
            allowed[i] = min(sizes[i], part)
            room -= allowed[i]
        if not short:
            break
        left = [i for i in left if i not in short]
    return allowed


def total(log_probs: Sequence[float] | None) -> float | None:
    """The sum in nats; ``None`` where there are none to sum over."""
    return None if log_probs is None else float(sum(log_probs))


def split_reply(reply: GeneratedText, prompts: Prompts) -> tuple[GeneratedText, GeneratedText]:
    """Rationale and answer out of a reply in free form; without an answer header all of it is the answer."""

    def header(text: str) -> re.Match[str] | None:
        name = re.escape(text.rstrip(":"))
        return next(iter(re.finditer(rf"(?im)^[\W_]*{name}[\W_]*?:[*_ ]*", reply.text)), None)

    answer = header(prompts.answer_header)
    if answer is None:
        begin = len(reply.text) - len(reply.text.lstrip())
        return _slice(reply, begin, begin), _slice(reply, begin, len(reply.text))
    rationale = header(prompts.rationale_header)
    begin = rationale.end() if rationale is not None and rationale.end() <= answer.start() else 0
    end = reply.text.find("\n", answer.end())
    return (
        _slice(reply, begin, answer.start()),
        _slice(reply, answer.end(), end if end >= 0 else len(reply.text)),
    )


def _slice(reply: GeneratedText, begin: int, end: int) -> GeneratedText:
    """A part of ``reply`` with the tokens whose characters end in it."""
    inside = [i for i, at in enumerate(reply.token_ends or ()) if begin < at <= end]
    known = reply.log_probs is not None and reply.token_ends is not None
    return replace(
        reply,
        text=reply.text[begin:end],
        log_probs=tuple(reply.log_probs[i] for i in inside) if known and reply.log_probs else None,
        token_ends=None,
        tokens=len(inside) if known else reply.tokens,
        top_log_probs=None,
    )
