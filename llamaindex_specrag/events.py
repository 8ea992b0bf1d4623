"""Events that Speculative RAG sends through LlamaIndex's dispatcher. ``index`` is the number of the draft, from 0."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import ConfigDict
from llama_index.core.instrumentation.events import BaseEvent


class _Event(BaseEvent):
    """An event of this package, shown under its class's name."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @classmethod
    def class_name(cls) -> str:
        return cls.__name__


class PerspectivesEvent(_Event):
    """The passages are clustered: ``subsets[j]`` holds the positions that draft j reads."""

    subsets: list[list[int]]
    embedding_source: str


class ReadingEvent(_Event):
    """A reader has read all passages: ``drafts`` drafts follow, the first of them number ``index``."""

    index: int
    reader: str
    drafts: int
    log_no_answer: float | None


class DraftEvent(_Event):
    """Draft number ``index`` arrived."""

    index: int
    answer: str
    rationale: str
    abstained: bool
    subset: list[int]


class DraftFailedEvent(_Event):
    """Draft number ``index`` was lost, in drafting or in verification."""

    index: int
    subset: list[int]
    error: str


class VerdictEvent(_Event):
    """Draft number ``index`` was scored. A score that no model gives is ``None``."""

    index: int
    answer: str
    subset: list[int]
    log_draft: float | None
    log_self_contain: float | None
    log_self_reflect: float | None
    log_listwise: float | None = None
    log_span: float | None = None
    log_verdict: float | None = None
