"""The values that pass between the stages of Speculative RAG. All are frozen.

Log-probabilities are natural logarithms (nats) of the models' own distributions at temperature 1.
``None`` means "not available". It never stands for a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from specrag._fields import mapping_of, number_of, passage_fields, text_of, vector_of
from specrag._stages import ReadingDone as ReadingDone
from specrag._stages import StageBegan as StageBegan
from specrag._unicode import well_formed_values
from specrag.errors import InvalidInputError, a, kind_of

EmbeddingSource = Literal["passages", "embedder", "none"]
ScoreName = Literal["draft", "self_contain", "self_reflect", "listwise", "span", "agreement", "verdict"]
#: Scores that drafting gives, without a verifier.
OWN_SCORES: frozenset[ScoreName] = frozenset(("draft", "agreement", "verdict"))
#: The paper's three scores.
ALL_SCORES: tuple[ScoreName, ...] = ("draft", "self_contain", "self_reflect")


@dataclass(frozen=True)
class Passage:
    """A retrieved passage.

    Args:
        text: What the drafter reads. A passage with an empty text is left out of the drafts.
        title: The models see it before the text.
        id: The caller's own key. The answer's citations carry it.
        score: The retriever's similarity, on any scale. The answer's citations carry it.
        embedding: A vector of shape [dim]. It replaces the embedder's when every passage of the question has one
            (see ``SpeculativeRAG(reuse_embeddings=...)``).
        metadata: Anything else that the citations shall carry.

    Raises:
        InvalidInputError: The text is not a string, or another field has another type.

    Half characters (lone surrogates) in its texts become U+FFFD. A title or score that is missing in the way of tables,
    such as NaN, is ``None``.
    """

    text: str
    title: str | None = None
    id: str | None = None
    score: float | None = None
    embedding: np.ndarray | None = field(default=None, repr=False, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidInputError(f"Passage.text must be a string, got {kind_of(self.text)}")
        read = {
            "text": self.text,
            "title": text_of(self.title, "Passage.title"),
            "id": text_of(self.id, "Passage.id"),
            "score": number_of(self.score, "Passage.score"),
            "embedding": vector_of(self.embedding, "Passage.embedding"),
            "metadata": mapping_of(self.metadata),
        }
        for name, value in read.items():
            try:
                object.__setattr__(self, name, well_formed_values(value))
            except RecursionError:
                raise InvalidInputError(f"Passage.{name} holds itself, or is nested too deeply") from None

    @classmethod
    def of(cls, value: Any) -> Passage:
        """A passage from what a caller has.

        Args:
            value: A ``Passage``, a string, a mapping, or an object with ``page_content`` and ``metadata`` (a LangChain
                ``Document``). A mapping has ``text`` or ``page_content``, and may have ``title``, ``id``, ``score``,
                ``embedding`` and ``metadata``. A title, a score (also named ``similarity``, ``similarity_score`` or
                ``relevance_score``) and an embedding that stand in the metadata alone are read from there.

        Raises:
            InvalidInputError: It is none of these, it has no text, or the mapping has a key that is not listed here.
        """
        if isinstance(value, Passage):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            given = dict(value)
        elif hasattr(value, "page_content") and hasattr(value, "metadata"):
            given = {"text": value.page_content, "id": getattr(value, "id", None), "metadata": value.metadata}
        else:
            raise InvalidInputError(
                "a passage is a Passage, a string, a mapping with 'text', or a document with page_content and "
                f"metadata; got {a(value)}"
            )
        return cls(**passage_fields(given))


def passages_of(values: Iterable[Any], name: str = "passages") -> list[Passage]:
    """Passages from a caller's list; see ``Passage.of`` for what may stand in it.

    Raises:
        InvalidInputError: ``values`` is not a list of passages. The message names the position and the type.
    """
    if isinstance(values, str | bytes | Mapping | Passage) or not isinstance(values, Iterable):
        raise InvalidInputError(f"{name} must be a list of passages, got {a(values)}")
    passages = []
    for position, value in enumerate(values):
        try:
            passages.append(Passage.of(value))
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}[{position}]: {error}") from error
    return passages


@dataclass(frozen=True)
class Usage:
    """Tokens of one model call or of several."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


@dataclass(frozen=True)
class Draft:
    """An answer α with its rationale β, made from one subset δ of the passages (paper, section 3.2).

    Attributes:
        index: The number of the draft, from 0. For drafts that a language model writes, its position among the subsets
            of ``SubsetsChosen``; drafts that a reader copies come after them.
        subset: Positions of its passages in the list that the caller gave. Of a copied draft: the passages that hold
            it, the likeliest first.
        passages: Those passages.
        text: The answer α.
        rationale: The rationale β; may be empty.
        abstained: The answer is the marker that says: the passages do not answer.
        log_rationale: log P(β | Q, δ), over the tokens of the text alone.
        log_answer: log P(α | Q, δ, β), over the tokens of the text alone.
        rationale_tokens, answer_tokens: How many tokens these two are sums over.
        usage: Tokens of the model call that made it.
        seconds: How long that call took.
        notes: What was not done as asked, for example passages that were cut.
        drafter: The name of the model that made it.
        places: Where a copied answer stands: (which of ``passages``, first character, one past the last), in the
            passage as ``specrag.text.passage_text`` gives it. Empty for a draft that was written. The rationale of a
            copied draft is copied too, so that only its answer has a log-probability.
        log_no_answer: log P(no span answers), of the reader that copied it.
        log_verdict: log P("Yes") of the drafter's verdict on this draft; ``None`` where it was not trained to give one.
    """

    index: int
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
    drafter: str = ""
    places: tuple[tuple[int, int, int], ...] = ()
    log_no_answer: float | None = None
    log_verdict: float | None = None


@dataclass(frozen=True)
class DraftFailure:
    """A draft that was lost, in drafting or in verification, and why. The answer is made from the others.

    ``index`` and ``subset`` are as in ``Draft``.
    """

    index: int
    subset: tuple[int, ...]
    error: str


@dataclass(frozen=True)
class Verdict:
    """The scores of one draft (paper, section 3.3). A score that no model can give is ``None``.

    Attributes:
        draft: The draft.
        log_draft: log ρ_draft (equation 1).
        log_self_contain: log ρ_SC.
        log_self_reflect: log ρ_SR.
        log_listwise: log ρ_L: the probability of the draft's label among those of all drafts and "none of these".
        log_span: log P of the draft's span, by a reader that verifies.
        log_agreement: Log of the share of drafts that have the same answer.
        log_none: log P of "none of these", beside ``log_listwise``.
        log_verdict: The drafter's verdict on its own draft.
        same: The indexes of other drafts with the same answer, which this one stands for.
        log_score: The weighted sum of the scores that count for this question; ``None`` when none does.
    """

    draft: Draft
    log_draft: float | None = None
    log_self_contain: float | None = None
    log_self_reflect: float | None = None
    log_listwise: float | None = None
    log_span: float | None = None
    log_agreement: float | None = None
    log_none: float | None = None
    log_verdict: float | None = None
    same: tuple[int, ...] = ()
    log_score: float | None = None

    def to_row(self) -> dict[str, Any]:
        """The draft and its scores as plain values, without its passages."""
        return {
            "index": self.draft.index,
            "answer": self.draft.text,
            "rationale": self.draft.rationale,
            "abstained": self.draft.abstained,
            "subset": list(self.draft.subset),
            "score": self.log_score,
            "log_draft": self.log_draft,
            "log_self_contain": self.log_self_contain,
            "log_self_reflect": self.log_self_reflect,
            "log_listwise": self.log_listwise,
            "log_span": self.log_span,
            "log_verdict": self.log_verdict,
        }


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of each stage. ``draft`` and ``verify`` overlap when drafts are verified as they arrive.

    ``retrieve`` and ``grade`` are stages of the systems in ``specrag.baselines``: a second retriever is asked, and
    passages or candidates are judged.
    """

    embed: float = 0.0
    cluster: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    escalate: float = 0.0
    total: float = 0.0
    retrieve: float = 0.0
    grade: float = 0.0


@dataclass(frozen=True)
class SpeculativeAnswer:
    """What the pipeline returns: the chosen draft, all other drafts, and how the choice was made.

    Attributes:
        question: The question, without white space around it.
        text: The winning draft's answer; empty when ``abstained``.
        rationale: The winning draft's rationale; when ``abstained``, that of the best draft, if there is one.
        passages: The winning draft's passages: the citations. Empty when ``abstained``.
        abstained: No draft answers, or none scores above the threshold.
        verdicts: Every draft with its scores, best first; drafts that abstain come last.
        scores_used: Which scores counted. When none did, agreement among the drafts decided, then
            retrieval rank.
        embedding_source: What the perspectives were made from.
        timings: Seconds of each stage.
        confidence: The calibrated probability that the answer is right; ``None`` where no calibration fits the models.
            After an escalation it is that of the choice that gave way.
        escalated: ``"passages"`` or ``"standard"`` where the verifier answered itself, from the best drafts'
            passages or from all; then ``text`` and ``passages`` are not those of the first verdict.
        reason: Why the pipeline abstained; ``None`` when it answered.
        failures: Drafts that were lost, and those that were late because something went wrong.
        unverified: Drafts that were made and not verified: the deadline passed, or the verifier failed.
        drafter_usage, verifier_usage: Tokens that each model read and wrote.
        notes: What was not done as asked: substitutes, cut passages, a missed deadline.
        read: Positions of the passages that the verifier read when it answered itself.
        critiques: What a corrective or self-reflective system judged, one mapping per passage: its position
            (``"passage"``) and the judgements by name. Other systems have none.
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
    confidence: float | None = None
    escalated: str | None = None
    reason: str | None = None
    failures: tuple[DraftFailure, ...] = ()
    drafter_usage: Usage = Usage()
    verifier_usage: Usage = Usage()
    notes: tuple[str, ...] = ()
    read: tuple[int, ...] | None = None
    unverified: tuple[Draft, ...] = ()
    critiques: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values, without embeddings."""
        return _plain(self)

    def details(self) -> dict[str, Any]:
        """How the answer was made, as plain JSON values: all but the answer itself, its passages and its drafts."""
        left_out = ("question", "text", "rationale", "passages", "abstained", "reason", "verdicts", "unverified")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in left_out}

    def to_html(self) -> str:
        """A page that shows the answer: the passages that were read, the drafts, every score and the choice.

        It is one HTML file that loads nothing. Write it with ``encoding="utf-8"``.
        """
        from specrag._page import answer_page  # brings jinja2

        return answer_page(self.to_dict())

    def _repr_html_(self) -> str:
        """The same page in a frame, as notebooks show it."""
        from specrag._page import framed

        return framed(self.to_html(), title=self.question)

    @property
    def subset(self) -> tuple[int, ...]:
        """Positions of ``passages`` in the caller's list; empty when ``abstained``."""
        if self.abstained:
            return ()
        return self.read if self.read is not None else self.verdicts[0].draft.subset

    @property
    def pieces(self) -> list[str]:
        """The text in words, to be streamed; at least one piece."""
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
    """The perspectives are made: ``subsets[j]`` holds the positions of the passages that draft j reads."""

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
    """A draft was scored. Its ``log_score`` is still ``None``: only the answer knows which scores all drafts have."""

    verdict: Verdict


@dataclass(frozen=True)
class AnswerReady:
    """The last event: the answer."""

    answer: SpeculativeAnswer


Event = StageBegan | ReadingDone | SubsetsChosen | DraftDone | DraftFailed | VerdictReady | AnswerReady
