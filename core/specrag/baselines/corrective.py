"""Corrective RAG: passages are graded, and what is of no use is left out (Yan et al., arXiv 2401.15884)."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from specrag._abandoned import in_thread
from specrag._fields import check_numbers
from specrag.baselines._settings import check_count, checked_model, texts_for
from specrag.baselines._writing import Writer
from specrag.baselines.base import answer_of
from specrag.baselines.evaluators import PassageEvaluator, as_evaluator
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel
from specrag.schema import AnswerReady, DraftDone, Event, Passage, Usage, Verdict, VerdictReady, passages_of
from specrag.speculative._asked import Asked
from specrag.speculative._clock import Clock
from specrag.speculative.drafting import Assignment
from specrag.speculative.entries import Streaming
from specrag.speculative.perspectives import distinct_passages
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import draft_score
from specrag.text import passage_text, sentences

Action = Literal["correct", "ambiguous", "incorrect"]
#: Passages that a second retriever is asked for, where it is an index.
SECOND_PASSAGES = 5


@dataclass(frozen=True, kw_only=True)
class CorrectiveRAG(Streaming):
    """Grades each passage, keeps the strips that are of use, and asks a second retriever where nothing is.

    Yan et al., arXiv 2401.15884. An evaluator grades every passage (section 4.2). Where one is above the ``upper``
    threshold, the action is "correct"; where all are below the ``lower`` one, "incorrect"; otherwise "ambiguous"
    (section 4.3). Passages are split into knowledge strips, each strip is graded, and the best ones are put together
    again in their order (section 4.4). The model answers from the strips of the passages ("correct"), of what the
    second retriever finds ("incorrect"), or of both ("ambiguous").

    What differs from the paper: the evaluator is not a T5 that was fine-tuned for it, so the thresholds are on another
    scale (the authors' code has 0.592 and -0.995 for PopQA). The second retriever is any callable or index, not a web
    search with rewritten queries; rewrite the question inside the callable. Without one, "incorrect" is an abstention.
    The prompt is standard RAG's.

    Args:
        model: Reads what is kept and answers.
        evaluator: A ``PassageEvaluator``, a language model (P(yes) of a graded prompt), or an embedder (similarity). By
            default ``model``.
        upper, lower: The two thresholds of the best passage's grade, on the evaluator's scale; by default the
            evaluator's own (``PassageEvaluator.thresholds``). Above ``upper``, the action is "correct"; at ``lower`` or
            below, "incorrect".
        second: A second retriever: a callable from the question to passages (also asynchronous), or an index with
            ``search(question, count)``.
        strip_sentences: Sentences of a strip. A passage with at most two is one strip.
        strips: How many strips are kept, at most, of each source.
        strip_threshold: A strip below it is dropped; by default ``lower``.
        prompts: ``standard`` and ``answer_header`` are used.
        max_answer_tokens: The limit of the answer, in tokens.

    ``answer.critiques`` has the grade of every passage and strip, and ``answer.notes`` says which action was taken.

    Raises:
        InvalidInputError: A setting out of range or of the wrong type, or a model without log-probabilities.
    """

    model: LanguageModel
    evaluator: Any = None
    upper: float | None = None
    lower: float | None = None
    second: Any = None
    strip_sentences: int = 2
    strips: int = 5
    strip_threshold: float | None = None
    prompts: Prompts | None = None
    max_answer_tokens: int = 24
    _evaluator: PassageEvaluator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checked_model(self.model, self.prompts, self.max_answer_tokens)
        check_count(strip_sentences=self.strip_sentences, strips=self.strips)
        check_numbers(upper=self.upper, lower=self.lower, strip_threshold=self.strip_threshold)
        object.__setattr__(self, "_evaluator", as_evaluator(self.evaluator, self.model))
        self._check_thresholds()
        if self.second is not None and not (callable(self.second) or hasattr(self.second, "search")):
            raise InvalidInputError(
                "second must be a callable from the question to passages, or an index with search(question, count); "
                f"got {kind_of(self.second)}"
            )

    def _check_thresholds(self) -> None:
        lower, upper = self.thresholds
        if not lower <= upper:
            raise InvalidInputError(f"lower must be at most upper, got lower={lower} and upper={upper}")
        least, most = self._evaluator.scale
        given = {"lower": lower, "upper": upper, "strip_threshold": self.strip_threshold}
        for name, value in given.items():
            if value is not None and not least <= value <= most:
                raise InvalidInputError(
                    f"{name}={value} is outside the grades of {kind_of(self._evaluator)}, which are in "
                    f"[{least:g}, {most:g}]"
                )

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return texts_for(self.model, self.prompts)

    @property
    def thresholds(self) -> tuple[float, float]:
        """The lower and the upper threshold in use."""
        lower, upper = self._evaluator.thresholds
        return lower if self.lower is None else self.lower, upper if self.upper is None else self.upper

    async def astream(self, question: str, passages: Iterable[Any]) -> AsyncGenerator[Event, None]:
        asked = Asked.of(question, passages, Clock(None))
        if not asked.kept and self.second is None:
            yield AnswerReady(asked.without_passages())
            return
        known = await self._knowledge(asked)
        if not known.strips:
            reason = f"no passage is relevant: the best grade is {max(known.grades, default=0):.2f}"
            made = answer_of(asked, [], reason=reason, verifier_usage=known.usage, **known.shown(self.thresholds))
            yield AnswerReady(made)
            return
        with asked.clock.measure("draft"):
            draft = await Writer(self.model, self.texts, self.max_answer_tokens).draft(
                asked.question, Assignment(0, known.read, recomposed(known.strips))
            )
        yield DraftDone(draft)
        score = draft_score(draft)
        verdict = Verdict(draft, log_draft=score, log_score=score)
        yield VerdictReady(verdict)
        asked.notes.extend(draft.notes)
        made = answer_of(
            asked,
            [verdict],
            passages=list({id(strip.source): strip.source for strip in known.strips}.values()),
            read=known.read,
            drafter_usage=draft.usage,
            verifier_usage=known.usage,
            **known.shown(self.thresholds),
        )
        yield AnswerReady(made)

    async def _knowledge(self, asked: Asked) -> _Knowledge:
        """What the model shall read: the passages are graded, the action is chosen, and strips are kept."""
        inside = [_Source(at, asked.passages[at]) for at in asked.kept]
        grader = _Grader(self._evaluator, asked.question)
        with asked.clock.measure("grade"):
            grades = await grader.grades([passage_text(source.passage) for source in inside])
        action = action_for(grades, *self.thresholds)
        notes = [f"corrective RAG takes the passages as {action}"]
        outside: list[_Source] = []
        if action != "correct" and self.second is not None:
            with asked.clock.measure("retrieve"):
                outside = [_Source(None, passage) for passage in await retrieved(self.second, asked.question)]
            notes.append(f"the second retriever found {len(outside)} passages")
        strips: list[Strip] = []
        with asked.clock.measure("grade"):
            for sources in ([] if action == "incorrect" else inside, outside):
                strips += await self._refined(grader, sources)
        read = tuple(sorted({strip.position for strip in strips if strip.position is not None}))
        graded = list(zip((source.position for source in inside), grades, strict=True))
        return _Knowledge(action, graded, strips, read, notes, grader.usage)

    async def _refined(self, grader: _Grader, sources: Sequence[_Source]) -> list[Strip]:
        """The best strips of ``sources``, in their order; at least one, where there is any source."""
        cut = [
            (source, text) for source in sources for text in knowledge_strips(source.passage.text, self.strip_sentences)
        ]
        grades = await grader.grades([_titled(source.passage, text) for source, text in cut])
        strips = [
            Strip(source.position, source.passage, text, grade)
            for (source, text), grade in zip(cut, grades, strict=True)
        ]
        floor = self.thresholds[0] if self.strip_threshold is None else self.strip_threshold
        ranked = sorted(range(len(strips)), key=lambda i: -strips[i].grade)
        chosen = [i for i in ranked if strips[i].grade >= floor][: self.strips] or ranked[:1]
        return [strips[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class Strip:
    """A piece of a passage, with its grade.

    ``position``: of the passage in the caller's list; ``None``: the second retriever found it.
    """

    position: int | None
    source: Passage
    text: str
    grade: float


@dataclass(frozen=True)
class _Source:
    position: int | None
    passage: Passage


@dataclass(frozen=True)
class _Knowledge:
    """What is known before the model answers. ``graded``: (position, grade) of each passage that was given."""

    action: Action
    graded: Sequence[tuple[int | None, float]]
    strips: Sequence[Strip]
    read: tuple[int, ...]
    notes: Sequence[str]
    usage: Usage

    @property
    def grades(self) -> list[float]:
        return [grade for _, grade in self.graded]

    def shown(self, thresholds: tuple[float, float]) -> dict[str, Any]:
        """The notes and critiques of the answer."""
        passages = [
            {"passage": at, "grade": grade, "verdict": action_for([grade], *thresholds)} for at, grade in self.graded
        ]
        strips = [{"passage": strip.position, "strip": strip.text, "grade": strip.grade} for strip in self.strips]
        return {"notes": self.notes, "critiques": [*passages, *strips]}


class _Grader:
    """Grades the texts of one question, each once. ``usage``: the tokens so far."""

    def __init__(self, evaluator: PassageEvaluator, question: str) -> None:
        self._evaluator, self._question = evaluator, question
        self._known: dict[str, float] = {}
        self.usage = Usage()

    async def grades(self, texts: Sequence[str]) -> list[float]:
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            made, usage = await self._evaluator.agrade(self._question, new)
            self.usage += usage
            self._known |= dict(zip(new, made, strict=True))
        return [self._known[text] for text in texts]


def action_for(grades: Sequence[float], lower: float, upper: float) -> Action:
    """What the grades of all passages call for (section 4.3).

    ``"correct"``: one is above ``upper``; ``"incorrect"``: none is above ``lower``; otherwise ``"ambiguous"``. Of one
    grade, it is the verdict on its passage.
    """
    best = max(grades, default=float("-inf"))
    return "correct" if best > upper else "ambiguous" if best > lower else "incorrect"


def knowledge_strips(text: str, size: int) -> list[str]:
    """``text`` in strips of ``size`` sentences; of at most two sentences, whole (section 4.4)."""
    bounds = sentences(text)
    if len(bounds) <= 2:
        return [text.strip()] if text.strip() else []
    groups = [bounds[i : i + size] for i in range(0, len(bounds), size)]
    return [text[group[0][0] : group[-1][1]] for group in groups]


def recomposed(strips: Sequence[Strip]) -> tuple[Passage, ...]:
    """The strips of each passage as one passage again, in their order and under its title."""
    by_source: dict[int, list[Strip]] = {}
    for strip in strips:
        by_source.setdefault(id(strip.source), []).append(strip)
    return tuple(
        Passage(" ".join(strip.text for strip in group), title=group[0].source.title, id=group[0].source.id)
        for group in by_source.values()
    )


async def retrieved(second: Any, question: str) -> list[Passage]:
    """The passages that a second retriever finds, neither empty nor repeated.

    Raises:
        InvalidInputError: It returns something else.
    """
    if hasattr(second, "search"):
        found = await in_thread(second.search, question, SECOND_PASSAGES)
    elif inspect.iscoroutinefunction(second) or inspect.iscoroutinefunction(getattr(second, "__call__", None)):  # noqa: B004
        found = await second(question)
    else:
        found = await in_thread(second, question)
    passages = passages_of(found, "the second retriever's passages")
    kept, _ = distinct_passages(passages)
    return [passages[at] for at in kept]


def _titled(passage: Passage, text: str) -> str:
    """A strip as it is graded: after the passage's title."""
    return passage_text(Passage(text, title=passage.title))
