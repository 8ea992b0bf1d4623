"""Speculative RAG over an index: replies, with what happens on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Literal

from specrag._abandoned import in_thread
from specrag.models.tokenization import StopStrings
from specrag.retrieval import PassageIndex
from specrag.schema import (
    AnswerReady,
    Draft,
    DraftDone,
    DraftFailed,
    Event,
    Passage,
    ReadingDone,
    SpeculativeAnswer,
    StageBegan,
    SubsetsChosen,
    Timings,
    VerdictReady,
)
from specrag.serving.asked import Asked, shown_roles
from specrag.serving.metrics import Metrics
from specrag.serving.replies import Finished, Text, Told
from specrag.speculative.pipeline import SpeculativeRAG

#: How an abstention begins. The extension field has its reason.
ABSTENTION = "I found no answer in the documents"


async def reply(
    rag: SpeculativeRAG,
    index: PassageIndex,
    name: str,
    asked: Asked,
    top: int,
    metrics: Metrics,
    *,
    arrived: float,
) -> AsyncIterator[Told | Text | Finished]:
    """The reply to a question over an index.

    Args:
        name: The index's.
        top: Passages to retrieve, where the request names no number.
        arrived: When the request came, of ``perf_counter``. Its deadline counts from then on.

    Raises:
        SpecRAGError: See ``SpeculativeRAG.answer``.
    """
    pipeline, began = _configured(rag, asked), perf_counter()
    passages = await in_thread(index.search, asked.question, asked.options.top or top)
    retrieving = perf_counter() - began
    pipeline, notes = _in_time(pipeline, perf_counter() - arrived)
    yield Told({"type": "passages", "passages": [passage_row(passage) for passage in passages]})
    answer = None
    async with aclosing(pipeline.astream(asked.question, passages)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, AnswerReady):
                answer = event.answer
            elif told := _told(event):
                yield Told(told)
    assert answer is not None  # a stream ends with its answer or raises
    seconds = {"retrieve": retrieving, **_seconds(answer.timings), "total": perf_counter() - began}
    _measure(metrics, answer, seconds)
    pieces, finish = _shown(answer, asked, pipeline.max_answer_tokens)
    for piece in pieces:
        yield Text(piece)
    used = answer.drafter_usage + answer.verifier_usage
    left_out = shown_roles(asked.messages)
    details = {
        **details_of(answer, passages, seconds),
        "index": name,
        "notes": [*notes, *answer.notes, *([left_out] if left_out else [])],
    }
    yield Finished(finish, used.prompt_tokens, used.completion_tokens, details)


def _configured(rag: SpeculativeRAG, asked: Asked) -> SpeculativeRAG:
    """The pipeline with what the request says."""
    changes: dict[str, Any] = {}
    if (sampling := asked.sampling(rag.sampling)) != rag.sampling:
        changes["sampling"] = sampling
    if asked.seed is not None:
        changes["seed"] = asked.seed
    if asked.max_tokens is not None and asked.max_tokens < rag.max_answer_tokens:
        changes["max_answer_tokens"] = asked.max_tokens
    if asked.options.deadline is not None:
        changes["deadline"] = min(asked.options.deadline, rag.deadline or asked.options.deadline)
    return rag.replace(**changes) if changes else rag


def _in_time(rag: SpeculativeRAG, passed: float) -> tuple[SpeculativeRAG, list[str]]:
    """The pipeline with what is left of its deadline after ``passed`` seconds, and what to say of that."""
    if rag.deadline is None:
        return rag, []
    left = round(rag.deadline - passed, 3)
    notes = [] if left > 0 else [f"the deadline of {rag.deadline:g} s passed before the drafts began"]
    return rag.replace(deadline=max(left, 1e-9)), notes


def _shown(answer: SpeculativeAnswer, asked: Asked, limit: int) -> tuple[list[str], Literal["stop", "length"]]:
    """The text of the reply in pieces, within the request's limits, and how it ends.

    A written answer was cut at its tokens. A copied one and an abstention are cut at so many words.
    """
    if answer.abstained:
        text = f"{ABSTENTION}: {answer.reason}." if answer.reason else f"{ABSTENTION}."
    else:
        text = answer.text
    end = StopStrings(asked.stop).find(text, 0) if asked.stop else None
    if end is not None:
        text = text[:end]
    pieces = [text[begin:stop] for begin, stop in _words(text)]
    winner = answer.verdicts[0].draft if answer.verdicts and not answer.abstained and not answer.escalated else None
    if winner is not None and not winner.places:
        cut = end is None and asked.max_tokens is not None and winner.answer_tokens >= limit
        return pieces, "length" if cut else "stop"
    if asked.max_tokens is not None and len(pieces) > asked.max_tokens:
        return pieces[: asked.max_tokens], "length"
    return pieces, "stop"


def _words(text: str) -> list[tuple[int, int]]:
    """Where the words of ``text`` stand, each with the white space before it."""
    found, begin = [], 0
    for at in range(1, len(text) + 1):
        if at == len(text) or (text[at].isspace() and not text[at - 1].isspace()):
            found.append((begin, at))
            begin = at
    return found


# --- the extension field --------------------------------------------------------------------------------


def passage_row(passage: Passage) -> dict[str, Any]:
    """A passage as plain values."""
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "score": passage.score,
        "metadata": dict(passage.metadata),
    }


def details_of(answer: SpeculativeAnswer, passages: Sequence[Passage], seconds: Mapping[str, float]) -> dict[str, Any]:
    """How an answer was made: the extension field of a response. Passages are named by their position in the list."""
    details = answer.details()
    return {
        "model": "speculative-rag",
        "abstained": answer.abstained,
        "reason": answer.reason,
        "confidence": answer.confidence,
        "rationale": answer.rationale,
        "citations": [{"passage": at, **passage_row(passages[at])} for at in answer.subset],
        "drafts": [
            {**verdict.to_row(), **_made(verdict.draft), "log_agreement": verdict.log_agreement, "same": verdict.same}
            for verdict in answer.verdicts
        ],
        "failures": details["failures"],
        "scores_used": details["scores_used"],
        "escalated": answer.escalated,
        "usage": {"drafter": details["drafter_usage"], "verifier": details["verifier_usage"]},
        "timings": dict(seconds),
        "passages": [passage_row(passage) for passage in passages],
    }


def _made(draft: Draft) -> dict[str, Any]:
    """What ``Verdict.to_row`` does not say of a draft. ``places``: in the text of the passage."""
    places = [[draft.subset[which], first, end] for which, first, end in draft.places]
    return {"drafter": draft.drafter, "copied": bool(draft.places), "places": places, "seconds": draft.seconds}


def _told(event: Event) -> dict[str, Any] | None:
    if isinstance(event, StageBegan):
        return {"type": "stage", "stage": event.stage, "model": event.model}
    if isinstance(event, SubsetsChosen):
        return {"type": "subsets", "subsets": [list(subset) for subset in event.subsets]} if event.subsets else None
    if isinstance(event, DraftDone):
        draft = event.draft
        row = {"index": draft.index, "answer": draft.text, "rationale": draft.rationale, "abstained": draft.abstained}
        return {"type": "draft", "draft": {**row, "subset": list(draft.subset), **_made(draft)}}
    if isinstance(event, VerdictReady):
        return {"type": "verdict", "draft": event.verdict.to_row()}
    if isinstance(event, DraftFailed):
        failure = event.failure
        return {"type": "failure", "index": failure.index, "subset": list(failure.subset), "error": failure.error}
    assert isinstance(event, ReadingDone | AnswerReady)
    return None


def _seconds(timings: Timings) -> dict[str, float]:
    stages = ("embed", "cluster", "draft", "verify", "escalate")
    return {stage: getattr(timings, stage) for stage in stages}


def _measure(metrics: Metrics, answer: SpeculativeAnswer, seconds: dict[str, float]) -> None:
    metrics.stages("speculative-rag", seconds)
    for verdict in answer.verdicts:
        metrics.drafts.labels("abstained" if verdict.draft.abstained else "verified").inc()
    metrics.drafts.labels("unverified").inc(len(answer.unverified))
    metrics.drafts.labels("failed").inc(len(answer.failures))
