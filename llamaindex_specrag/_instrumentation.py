"""One call's spans and events through LlamaIndex's dispatcher: clustering, each draft, each verdict."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any
from uuid import uuid4

from llama_index.core.instrumentation.events import BaseEvent
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.span import active_span_id

from specrag.schema import DraftDone, DraftFailed, Event, SubsetsChosen, VerdictReady
from specrag.speculative.work import Work

dispatcher = get_dispatcher(__name__)


class PerspectivesEvent(BaseEvent):
    """The passages are clustered: ``subsets[j]`` are the positions that draft j reads."""

    subsets: list[list[int]]
    embedding_source: str

    @classmethod
    def class_name(cls) -> str:
        return "PerspectivesEvent"


class DraftEvent(BaseEvent):
    """A draft arrived."""

    answer: str
    rationale: str
    abstained: bool
    subset: list[int]

    @classmethod
    def class_name(cls) -> str:
        return "DraftEvent"


class DraftFailedEvent(BaseEvent):
    """A draft was lost, in drafting or in verification."""

    subset: list[int]
    error: str

    @classmethod
    def class_name(cls) -> str:
        return "DraftFailedEvent"


class VerdictEvent(BaseEvent):
    """A draft was scored. A score that no model gives is ``None``."""

    answer: str
    subset: list[int]
    log_draft: float | None
    log_self_contain: float | None
    log_self_reflect: float | None

    @classmethod
    def class_name(cls) -> str:
        return "VerdictEvent"


# A stage and the subset of passages that it concerns; clustering concerns none.
_Key = tuple[str, tuple[int, ...]]


class Spans:
    """Turns the core's events into spans below the one that is active now, and into the dispatcher's events."""

    def __init__(self, question: str) -> None:
        self._parent = active_span_id.get()
        self._arguments = inspect.signature(lambda question: None).bind(question)
        self._open: dict[_Key, list[str]] = defaultdict(list)
        self._start(("SpeculativeRAG.perspectives", ()))

    def span_of(self, work: Work | None) -> str | None:
        """The span that a model call belongs below."""
        spans = self._open.get((_NAMES[work.stage], work.subset)) if work is not None else None
        return spans[0] if spans else self._parent

    def see(self, event: Event) -> None:
        """Something happened in the core."""
        if isinstance(event, SubsetsChosen):
            subsets = [list(subset) for subset in event.subsets]
            self._tell(PerspectivesEvent(subsets=subsets, embedding_source=event.embedding_source), None)
            self._end(("SpeculativeRAG.perspectives", ()), subsets)
            for subset in event.subsets:
                self._start((_NAMES["draft"], subset))
        elif isinstance(event, DraftDone):
            draft = event.draft
            key = (_NAMES["draft"], draft.subset)
            told = DraftEvent(
                answer=draft.text, rationale=draft.rationale, abstained=draft.abstained, subset=list(draft.subset)
            )
            self._tell(told, key)
            self._end(key, draft.text)
            if not draft.abstained:
                self._start((_NAMES["verify"], draft.subset))
        elif isinstance(event, VerdictReady):
            verdict = event.verdict
            key = (_NAMES["verify"], verdict.draft.subset)
            scores = {name: getattr(verdict, name) for name in ("log_draft", "log_self_contain", "log_self_reflect")}
            self._tell(VerdictEvent(answer=verdict.draft.text, subset=list(verdict.draft.subset), **scores), key)
            self._end(key, scores)
        elif isinstance(event, DraftFailed):
            subset = event.failure.subset
            open_ones = [key for s in ("verify", "draft") if self._open[key := (_NAMES[s], subset)]]
            failed = open_ones[0] if open_ones else None
            self._tell(DraftFailedEvent(subset=list(subset), error=event.failure.error), failed)
            if failed is not None:
                self._drop(failed, RuntimeError(event.failure.error))

    def close(self, error: BaseException | None = None) -> None:
        """End what is still open: drafts that came after the deadline, or everything after a failure."""
        for key in [key for key, spans in self._open.items() for _ in spans]:
            if error is None:
                self._end(key, None)
            else:
                self._drop(key, error)

    def _start(self, key: _Key) -> None:
        span = f"{key[0]}-{uuid4()}"
        self._open[key].append(span)
        dispatcher.span_enter(id_=span, bound_args=self._arguments, parent_id=self._parent)

    def _end(self, key: _Key, result: Any) -> None:
        if self._open[key]:
            dispatcher.span_exit(id_=self._open[key].pop(0), bound_args=self._arguments, result=result)

    def _drop(self, key: _Key, error: BaseException) -> None:
        dispatcher.span_drop(id_=self._open[key].pop(0), bound_args=self._arguments, err=error)

    def _tell(self, event: BaseEvent, key: _Key | None) -> None:
        spans = self._open[key] if key is not None else self._open["SpeculativeRAG.perspectives", ()]
        event.span_id = spans[0] if spans else self._parent
        dispatcher.event(event)


_NAMES = {"draft": "SpeculativeRAG.draft", "verify": "SpeculativeRAG.verify"}
