"""The work on one question, piece by piece: what begins, ends and fails, for adapters that show it as traces.

A piece of work is one stage of the pipeline, for one draft where the stage concerns a draft. ``WorkTracker`` turns
the pipeline's events into the starts and ends of these pieces, and ``current_work`` says to which piece a model call
belongs. Adapters map both to their framework's runs or spans.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from specrag.schema import (
    AnswerReady,
    Draft,
    DraftDone,
    DraftFailed,
    Event,
    ReadingDone,
    SpeculativeAnswer,
    StageBegan,
    SubsetsChosen,
    Verdict,
    VerdictReady,
)

Stage = Literal["read", "perspectives", "draft", "verify", "escalate"]


@dataclass(frozen=True)
class Work:
    """One stage of the pipeline.

    ``index`` is the draft's (``Draft.index``), that of a reader's first draft where it reads, or ``None`` for the
    perspectives and the escalation.
    """

    stage: Stage
    index: int | None = None


#: The piece of work that the running task's model call serves; ``None`` where a call serves several drafts at once.
current_work: ContextVar[Work | None] = ContextVar("specrag_current_work", default=None)


@contextmanager
def working_on(work: Work) -> Iterator[None]:
    """``current_work`` is ``work`` inside the ``with`` block, in this task alone."""
    token = current_work.set(work)
    try:
        yield
    finally:
        current_work.reset(token)


@dataclass(frozen=True)
class Started:
    """``work`` began. ``given``: the subset that a draft is made from, or the draft that is verified.

    ``model`` names who reads or answers, where one model does the work for the whole question.
    """

    work: Work
    given: tuple[int, ...] | Draft | None = None
    model: str = ""


@dataclass(frozen=True)
class Ended:
    """``work`` ended with ``made``. ``None`` means too late: the answer was chosen before the work had a result."""

    work: Work
    made: SubsetsChosen | ReadingDone | Draft | Verdict | SpeculativeAnswer | None


@dataclass(frozen=True)
class Failed:
    """``work`` failed."""

    work: Work
    error: BaseException


Step = Started | Ended | Failed


class WorkTracker:
    """Turns the pipeline's events for one question into the steps of each piece of work.

    A draft is drafted from the moment when the subsets are chosen, and verified from the moment when it arrives,
    unless it abstains. A copied draft is made while its reader reads. Every piece of work that starts also ends or
    fails exactly once.

    Args:
        readers: Readers draft first: the perspectives begin only where the language models are asked after them.
    """

    def __init__(self, *, readers: bool = False) -> None:
        self._readers = readers
        self._open: dict[Work, None] = {}  # in the order in which they began

    def begin(self) -> list[Step]:
        """The question was asked."""
        return [] if self._readers else [self._start(Work("perspectives"))]

    def see(self, event: Event) -> list[Step]:
        """What ``event`` means for the work: first what ends, then what begins."""
        if isinstance(event, StageBegan):
            return [self._start(Work(event.stage, event.index), model=event.model)]
        if isinstance(event, ReadingDone):
            return self._end(Work("read", event.index), event)
        if isinstance(event, AnswerReady):
            return self._end(Work("escalate"), event.answer)
        if isinstance(event, SubsetsChosen):
            drafting = (self._start(Work("draft", j), subset) for j, subset in enumerate(event.subsets))
            return [*self._end(Work("perspectives"), event), *drafting]
        if isinstance(event, DraftDone):
            draft = event.draft
            verifying = [] if draft.abstained else [self._start(Work("verify", draft.index), draft)]
            return [*self._end(Work("draft", draft.index), draft), *verifying]
        if isinstance(event, VerdictReady):
            return self._end(Work("verify", event.verdict.draft.index), event.verdict)
        if isinstance(event, DraftFailed):
            index = event.failure.index
            lost = [
                work for work in self._open if work.index == index
            ]  # reading, drafting or verification: one of them
            return [self._fail(work, RuntimeError(event.failure.error)) for work in lost]
        return []

    def close(self, error: BaseException | None = None) -> list[Step]:
        """The question is done: what is still open is late, or fails with ``error``."""
        still_open = list(self._open)
        if error is None:
            return [step for work in still_open for step in self._end(work, None)]
        return [self._fail(work, error) for work in still_open]

    def _start(self, work: Work, given: tuple[int, ...] | Draft | None = None, model: str = "") -> Started:
        self._open[work] = None
        return Started(work, given, model)

    def _end(
        self, work: Work, made: SubsetsChosen | ReadingDone | Draft | Verdict | SpeculativeAnswer | None
    ) -> list[Step]:
        if work not in self._open:
            return []  # the verdict of a draft that abstains: nothing was asked
        del self._open[work]
        return [Ended(work, made)]

    def _fail(self, work: Work, error: BaseException) -> Failed:
        del self._open[work]
        return Failed(work, error)
