"""Events of ``SpeculativeRAG.stream`` about stages that not every question has; public in ``specrag.schema``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageBegan:
    """A stage begins that not every question has.

    Attributes:
        stage: ``"read"``: a reader reads all passages. ``"perspectives"``: after the readers, the language models draft
            too. ``"escalate"``: the verifier answers itself.
        index: That of the reader's first draft.
        model: The name of the reader or of the verifier; ``""`` for the perspectives.
    """

    stage: Literal["read", "perspectives", "escalate"]
    index: int | None = None
    model: str = ""


@dataclass(frozen=True)
class ReadingDone:
    """A reader has read: its drafts follow, ``drafts`` in number. ``log_no_answer``: log P(no span answers)."""

    index: int
    model: str
    drafts: int
    log_no_answer: float | None = None
