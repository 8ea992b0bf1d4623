"""Traces of one call as LlamaIndex shows them: spans and events through its dispatcher."""

from __future__ import annotations

import inspect
from typing import Any
from uuid import uuid4

from llama_index.core.instrumentation.events import BaseEvent
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import active_span_id

from llamaindex_specrag.events import DraftEvent, DraftFailedEvent, PerspectivesEvent, ReadingEvent, VerdictEvent
from specrag.schema import (
    Draft,
    DraftDone,
    DraftFailed,
    Event,
    ReadingDone,
    SpeculativeAnswer,
    SubsetsChosen,
    Verdict,
    VerdictReady,
)
from specrag.speculative.work import Ended, Failed, Started, Step, Work, WorkTracker

dispatcher = get_dispatcher(__name__)

_SCORES = ("log_draft", "log_self_contain", "log_self_reflect", "log_listwise", "log_span", "log_verdict")


class Spans:
    """Shows the core's events as spans below the one that is active now, and as events of the dispatcher."""

    def __init__(self, question: str, *, readers: bool = False) -> None:
        self._parent = active_span_id.get()
        self._arguments = inspect.signature(lambda question: None).bind(question)
        self._tracker = WorkTracker(readers=readers)
        self._spans: dict[Work, str] = {}
        self._show(self._tracker.begin())

    def span_of(self, work: Work | None) -> str | None:
        """The span below which a model call belongs."""
        return self._spans.get(work, self._parent) if work is not None else self._parent

    def see(self, event: Event) -> None:
        """Show what happened in the core."""
        steps = self._tracker.see(event)
        if (told := _told(event)) is not None:
            over = next((step.work for step in steps if not isinstance(step, Started)), None)
            told.span_id = self.span_of(over)
            dispatcher.event(told)
        self._show(steps)

    def close(self, error: BaseException | None = None) -> None:
        """End what is still open: drafts that came after the deadline, or everything after a failure."""
        self._show(self._tracker.close(error))

    def _show(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Started):
                span = f"SpeculativeRAG.{step.work.stage}-{uuid4()}"
                self._spans[step.work] = span
                dispatcher.span_enter(id_=span, bound_args=self._arguments, parent_id=self._parent)
            elif isinstance(step, Ended):
                span = self._spans.pop(step.work)
                dispatcher.span_exit(id_=span, bound_args=self._arguments, result=_result(step))
            elif isinstance(step, Failed):
                dispatcher.span_drop(id_=self._spans.pop(step.work), bound_args=self._arguments, err=step.error)


def _result(step: Ended) -> Any:
    if isinstance(step.made, SubsetsChosen):
        return [list(subset) for subset in step.made.subsets]
    if isinstance(step.made, ReadingDone):
        return step.made.drafts
    if isinstance(step.made, Draft | SpeculativeAnswer):
        return step.made.text
    return _scores(step.made) if isinstance(step.made, Verdict) else None


def _told(event: Event) -> BaseEvent | None:
    if isinstance(event, SubsetsChosen):
        return PerspectivesEvent(
            subsets=[list(subset) for subset in event.subsets], embedding_source=event.embedding_source
        )
    if isinstance(event, ReadingDone):
        return ReadingEvent(
            index=event.index, reader=event.model, drafts=event.drafts, log_no_answer=event.log_no_answer
        )
    if isinstance(event, DraftDone):
        draft = event.draft
        return DraftEvent(
            index=draft.index,
            answer=draft.text,
            rationale=draft.rationale,
            abstained=draft.abstained,
            subset=list(draft.subset),
        )
    if isinstance(event, VerdictReady):
        draft = event.verdict.draft
        return VerdictEvent(index=draft.index, answer=draft.text, subset=list(draft.subset), **_scores(event.verdict))
    if isinstance(event, DraftFailed):
        lost = event.failure
        return DraftFailedEvent(index=lost.index, subset=list(lost.subset), error=lost.error)
    return None


def _scores(verdict: Verdict) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in _SCORES}
