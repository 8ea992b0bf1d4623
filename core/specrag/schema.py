"""The values that pass between the stages of Speculative RAG: all frozen, none with behaviour.

Log-probabilities are natural logarithms (nats) of the models' own distributions at temperature 1.
``None`` stands for "not available", never for a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from specrag.errors import InvalidInputError

EmbeddingSource = Literal["passages", "embedder", "none"]
ScoreName = Literal["draft", "self_contain", "self_reflect"]
ALL_SCORES: tuple[ScoreName, ...] = ("draft", "self_contain", "self_reflect")


@dataclass(frozen=True)
class Passage:
    """A retrieved passage.

    Args:
        text: What the drafter reads. May be empty; such a passage is left out of the drafts.
        title: Shown to the models before the text.
        id: The caller's own key. It is carried along, never interpreted.
        score: The retriever's similarity, whatever its scale. Carried along.
        embedding: A vector of shape [dim]. Used in place of an embedder's when every passage of a
            question has one (see ``SpeculativeRAG(reuse_embeddings=...)``).
        metadata: Anything else the caller wants back with the citation.
    """

    text: str
    title: str | None = None
    id: str | None = None
    score: float | None = None
    embedding: np.ndarray | None = field(default=None, repr=False, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidInputError(f"Passage.text must be a string, got {type(self.text).__name__}")
        if self.embedding is not None:
            vector = np.asarray(self.embedding, dtype=np.float32)
            if vector.ndim != 1:
                raise InvalidInputError(f"Passage.embedding must have one dimension, got shape {vector.shape}")
            object.__setattr__(self, "embedding", vector)


@dataclass(frozen=True)
class Usage:
    """Tokens that went through one model call or several."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


@dataclass(frozen=True)
class Draft:
    """An answer α with its rationale β, made from one subset δ of the passages (paper, section 3.2).

    ``subset`` holds positions in the list of passages that the caller gave. ``log_rationale`` is
    log P(β | Q, δ) and ``log_answer`` is log P(α | Q, δ, β), both over the tokens of the text alone.
    """

    subset: tuple[int, ...]
    passages: tuple[Passage, ...]
    text: str
    rationale: str
    abstained: bool = False
    log_rationale: float | None = None
    log_answer: float | None = None
    rationale_tokens: int = 0
    answer_tokens: int = 0
    usage: Usage = Usage()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DraftFailure:
    """A subset whose draft was lost, and why. The answer is made from the others."""

    subset: tuple[int, ...]
    error: str


@dataclass(frozen=True)
class Verdict:
    """The scores of one draft (paper, section 3.3). A score that no model could give is ``None``.

    ``log_score`` is the sum of the scores that counted for this question, or ``None`` when none did.
    """

    draft: Draft
    log_draft: float | None = None
    log_self_contain: float | None = None
    log_self_reflect: float | None = None
    log_score: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The draft and its scores as plain values, without its passages."""
        return {
            "answer": self.draft.text,
            "rationale": self.draft.rationale,
            "abstained": self.draft.abstained,
            "subset": list(self.draft.subset),
            "score": self.log_score,
            "log_draft": self.log_draft,
            "log_self_contain": self.log_self_contain,
            "log_self_reflect": self.log_self_reflect,
        }


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds. ``draft`` and ``verify`` overlap when drafts are verified as they arrive."""

    embed: float = 0.0
    cluster: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class SpeculativeAnswer:
    """What the pipeline returns: the chosen draft, every other one, and how the choice was made.

    Attributes:
        text: The winning draft's answer; empty when ``abstained``.
        rationale: The winning draft's rationale; when abstaining, the best abstaining draft's, if any.
        passages: The winning draft's passages: the citations. Empty when ``abstained``.
        abstained: No draft answered, or none scored above the threshold.
        reason: Why the pipeline abstained; ``None`` when it answered.
        verdicts: Every draft, best first; drafts that abstain come last.
        failures: Drafts that were lost.
        scores_used: Which of the three scores counted. Empty: agreement among the drafts decided, then rank.
        embedding_source: What the perspectives were made from.
        notes: Substitutes, trimming, a missed deadline: whatever was not done as asked.
    """

    question: str
    text: str
    rationale: str
    passages: tuple[Passage, ...]
    abstained: bool
    verdicts: tuple[Verdict, ...]
    scores_used: tuple[ScoreName, ...]
    embedding_source: EmbeddingSource
    timings: Timings
    reason: str | None = None
    failures: tuple[DraftFailure, ...] = ()
    drafter_usage: Usage = Usage()
    verifier_usage: Usage = Usage()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values, without embeddings."""
        return _plain(self)

    def details(self) -> dict[str, Any]:
        """How it was made, as plain JSON values: everything but the answer itself, its passages and drafts."""
        left_out = ("question", "text", "rationale", "passages", "abstained", "reason", "verdicts")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}

    @property
    def subset(self) -> tuple[int, ...]:
        """Positions of ``passages`` in the caller's list; empty when ``abstained``."""
        return self.verdicts[0].draft.subset if self.verdicts and not self.abstained else ()

    @property
    def pieces(self) -> list[str]:
        """The text in words, for whoever streams it; at least one piece."""
        return re.findall(r"\s*\S+\s*$|\s*\S+", self.text) or [self.text]


def _plain(value: Any) -> Any:
    if isinstance(value, Passage):
        shown = {"text": value.text, "title": value.title, "id": value.id, "score": value.score}
        return {**shown, "metadata": _plain(dict(value.metadata))}
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


# --- events of SpeculativeRAG.stream ---------------------------------------------------------------


@dataclass(frozen=True)
class SubsetsChosen:
    """The perspectives are made: ``subsets[j]`` are the passages that draft j will read."""

    subsets: tuple[tuple[int, ...], ...]
    embedding_source: EmbeddingSource


@dataclass(frozen=True)
class DraftDone:
    """A draft arrived."""

    draft: Draft


@dataclass(frozen=True)
class DraftFailed:
    """A draft was lost."""

    failure: DraftFailure


@dataclass(frozen=True)
class VerdictReady:
    """A draft was scored. ``log_score`` is final only in the answer: scores that some draft lacks are left out."""

    verdict: Verdict


@dataclass(frozen=True)
class AnswerReady:
    """The last event."""

    answer: SpeculativeAnswer


Event = SubsetsChosen | DraftDone | DraftFailed | VerdictReady | AnswerReady
