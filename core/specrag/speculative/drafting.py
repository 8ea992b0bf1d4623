"""Drafting: each subset of passages gives an answer with its rationale (Wang et al., arXiv 2407.08223, section 3.2).

``Drafter`` does it with a language model. What the pipeline needs of a drafter is ``drafts``: assignments go in, and
drafts or failures come out as they are made.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from specrag._fields import check_whole_numbers
from specrag.errors import ModelError, described
from specrag.models.base import Completion, GeneratedText, GenerationRequest, LanguageModel, Sampling, Stage, Turn
from specrag.schema import Draft, DraftFailure, Passage
from specrag.speculative._fitting import fitted
from specrag.speculative.affirmation import yes_log_probability
from specrag.speculative.prompts import RIGHT, Prompts
from specrag.speculative.work import Work, working_on

#: How many likely tokens are listed where the drafter gives its verdict. "Yes" is one of the first two.
VERDICT_LOG_PROBS = 5


@dataclass(frozen=True)
class Assignment:
    """What one draft is made from: subset number ``index``, as positions in the caller's list and as passages."""

    index: int
    subset: tuple[int, ...]
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class _Job:
    """An assignment, and how the model is asked for its draft."""

    assignment: Assignment
    request: GenerationRequest
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Drafter:
    """Makes drafts with a language model.

    Args:
        lm: The model that writes them.
        prompts: What it is asked.
        max_rationale_tokens, max_answer_tokens: Limits of the two parts of a draft, in tokens.
        sampling: How tokens are drawn. Greedy by default: drafts of the same subset are then equal.

    Raises:
        InvalidInputError: A limit below 1.
    """

    lm: LanguageModel
    prompts: Prompts = Prompts()
    max_rationale_tokens: int = 64
    max_answer_tokens: int = 24
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        check_whole_numbers(
            least=1, max_rationale_tokens=self.max_rationale_tokens, max_answer_tokens=self.max_answer_tokens
        )

    def drafts(self, question: str, assignments: Sequence[Assignment]) -> AsyncIterator[Draft | DraftFailure]:
        """One draft or failure per assignment, as they arrive. An error of the model costs its draft alone.

        Raises:
            InvalidInputError: The question does not fit the model's window.
        """
        if self.lm.capabilities.batched:
            return self._in_one_batch(question, assignments)
        return self._one_by_one(question, assignments)

    async def _in_one_batch(
        self, question: str, assignments: Sequence[Assignment]
    ) -> AsyncIterator[Draft | DraftFailure]:
        jobs = self._jobs(question, assignments)
        start = time.perf_counter()
        try:
            completions = await self._generate([job.request for job in jobs], self.sampling)
        except Exception:  # find the draft that fails, and keep the others
            for job in jobs:
                yield await self._draft(job)
            return
        seconds = time.perf_counter() - start
        for job, completion in zip(jobs, completions, strict=True):
            try:
                yield self._read(completion, job, seconds)
            except ModelError as error:
                yield _failure(job, str(error))

    async def _one_by_one(
        self, question: str, assignments: Sequence[Assignment]
    ) -> AsyncIterator[Draft | DraftFailure]:
        await self.lm.prepare()  # the window is known before the passages are cut to fit
        tasks = [asyncio.create_task(self._draft(job)) for job in self._jobs(question, assignments)]
        try:
            for next_done in asyncio.as_completed(tasks):
                yield await next_done
        finally:
            for task in tasks:
                task.cancel()

    def _jobs(self, question: str, assignments: Sequence[Assignment]) -> list[_Job]:
        jobs = []
        for assignment in assignments:
            fitted, cut = self.fit(question, assignment.passages)
            notes = (f"passages cut to fit the drafter's window of {self.lm.context_window} tokens",) if cut else ()
            jobs.append(_Job(assignment, self.request(question, fitted), notes))
        return jobs

    async def _draft(self, job: _Job) -> Draft | DraftFailure:
        """The draft of ``job``, with a call of its own."""
        start = time.perf_counter()
        try:
            with working_on(Work("draft", job.assignment.index)):
                completion = (await self._generate([job.request], self._seeded(job.assignment.index)))[0]
            return self._read(completion, job, time.perf_counter() - start)
        except Exception as error:  # a failing model costs its draft, whatever it raises
            return _failure(job, described(error))

    async def _generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion]:
        return await self.lm.agenerate(requests, sampling, top_log_probs=self.top_log_probs)

    @property
    def top_log_probs(self) -> int:
        """How many likely tokens the model must list with a draft: some where it gives a verdict."""
        judged = self.prompts.verdict_header is not None and self.lm.capabilities.prefill is not False
        return VERDICT_LOG_PROBS if judged else 0

    def _seeded(self, index: int) -> Sampling:
        """The sampling of one draft: seeded as its row of a batch is."""
        seed = self.sampling.seed
        return self.sampling if seed is None else replace(self.sampling, seed=seed + index)

    def _read(self, completion: Completion, job: _Job, seconds: float) -> Draft:
        return replace(self.read(completion, job.assignment, seconds), notes=(*job.notes, *completion.notes))

    def read(self, completion: Completion, assignment: Assignment, seconds: float = 0.0) -> Draft:
        """A draft out of what the model wrote in ``seconds``.

        Raises:
            ModelError: It wrote no answer, or its log-probabilities are not numbers.
        """
        rationale, answer = self.parts(completion)
        if not answer.text.strip():
            cut = ": it ended at its limit of tokens" if answer.finish == "length" else ""
            raise ModelError(f"the drafter wrote no answer{cut}")
        log_rationale, log_answer = total(rationale.log_probs), total(answer.log_probs)
        log_verdict = _verdict(completion)
        if any(value is not None and math.isnan(value) for value in (log_rationale, log_answer, log_verdict)):
            raise ModelError("the drafter's log-probabilities are not numbers (NaN)")
        abstained = self.prompts.is_abstention(answer.text)
        return Draft(
            index=assignment.index,
            subset=assignment.subset,
            passages=assignment.passages,
            text=answer.text.strip(),
            rationale=rationale.text.strip(),
            abstained=abstained,
            log_rationale=log_rationale,
            log_answer=log_answer,
            rationale_tokens=rationale.tokens,
            answer_tokens=answer.tokens,
            usage=completion.usage,
            seconds=seconds,
            drafter=self.lm.name,
            log_verdict=None if abstained else log_verdict,
        )

    def parts(self, completion: Completion) -> tuple[GeneratedText, GeneratedText]:
        """The rationale and the answer that the model wrote.

        Raises:
            ModelError: It wrote no answer.
        """
        if not completion.staged:
            return split_reply(completion.parts[0], self.prompts)
        if len(completion.parts) < 2:
            raise ModelError("the drafter wrote no answer: its reply has one part, where two were asked for")
        return completion.parts[0], completion.parts[1]

    def request(self, question: str, passages: Sequence[Passage]) -> GenerationRequest:
        """The generation that makes a draft: rationale, then answer, one line each, and the verdict where it is asked.

        The verdict is one token more, behind the draft in the cache that made it.
        """
        header = self.prompts.verdict_header
        return GenerationRequest(
            turns=(
                *(turn for asked, reply in self.prompts.examples for turn in _example(asked, reply)),
                Turn.of("user", self.prompts.draft_text(question, passages)),
            ),
            stages=(
                Stage(self.prompts.rationale_header, self.max_rationale_tokens, ("\n",)),
                Stage(f"\n{self.prompts.answer_header}", self.max_answer_tokens, ("\n",)),
                *([] if header is None else [Stage(f"\n{header}", max_tokens=1)]),
            ),
            free_format=self.prompts.free_format,
        )

    def fit(self, question: str, passages: Sequence[Passage]) -> tuple[tuple[Passage, ...], bool]:
        """``passages``, cut where together they exceed the model's window, and whether they were cut.

        Raises:
            InvalidInputError: The question alone does not fit.
        """
        return fitted(self.lm, passages, lambda shown: self.request(question, shown))


def _verdict(completion: Completion) -> float | None:
    """Log P("Yes") of the third part, the verdict; ``None`` where there is none."""
    if not completion.staged or len(completion.parts) < 3 or not completion.parts[2].top_log_probs:
        return None
    return yes_log_probability(completion.parts[2].top_log_probs[0], RIGHT)


def _failure(job: _Job, error: str) -> DraftFailure:
    return DraftFailure(job.assignment.index, job.assignment.subset, error)


def _example(asked: str, reply: str) -> tuple[Turn, Turn]:
    return Turn.of("user", asked), Turn.of("assistant", reply)


def total(log_probs: Sequence[float] | None) -> float | None:
    """The sum of ``log_probs`` in nats; ``None`` where the backend gives none: no sum stands for a text's certainty."""
    return float(sum(log_probs)) if log_probs else None


def split_reply(reply: GeneratedText, prompts: Prompts) -> tuple[GeneratedText, GeneratedText]:
    """Rationale and answer out of a reply in free form. Without an answer header, the whole reply is the answer.

    A header stands at the beginning of a line. Where the reply begins with the rationale's, the answer's may also
    follow a sentence.

    Raises:
        ModelError: The reply ended at its limit of tokens before an answer header: it is half a rationale.
    """

    def header(text: str, before: str = "(?im)^") -> re.Match[str] | None:
        name = re.escape(text.rstrip(":"))
        return re.search(rf"{before}[\W_]*{name}[\W_]*?:[*_ ]*", reply.text)

    rationale, answer = header(prompts.rationale_header), header(prompts.answer_header)
    begins = rationale is not None and not reply.text[: rationale.start()].strip()
    if answer is None and begins:
        answer = header(prompts.answer_header, r"(?<=[^\w\s,;:])(?=\s)")
    if answer is None:
        if reply.finish == "length":
            raise ModelError(f"the drafter wrote no answer: its reply ended at its limit of {reply.tokens} tokens")
        begin = rationale.end() if rationale and begins else len(reply.text) - len(reply.text.lstrip())
        return _slice(reply, begin, begin), _slice(reply, begin, len(reply.text))
    begin = rationale.end() if rationale is not None and rationale.end() <= answer.start() else 0
    end = reply.text.find("\n", answer.end())
    return (
        _slice(reply, begin, answer.start()),
        _slice(reply, answer.end(), end if end >= 0 else len(reply.text)),
    )


def _slice(reply: GeneratedText, begin: int, end: int) -> GeneratedText:
    """The characters ``begin`` to ``end`` of ``reply``, with the tokens that end there."""
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
