"""Rows of ``answers.jsonl`` for systems over a long context, and the tables made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow
from specrag.evaluation.scoring import measured
from specrag.evaluation.statistics import mcnemar, wilson_interval
from specrag.models.tokenization import IncrementalDecoder
from specrag.rapid.decoding import RapidStats, TracedRound
from specrag.schema import Usage


def pieces(
    trace: Sequence[TracedRound], tokens: int, tokenizer: Any, end_tokens: Collection[int] = ()
) -> list[list[str]]:
    """A traced answer as pieces of text, each with its origin.

    Args:
        trace: ``RapidStats.trace``.
        tokens: How many tokens the answer has (``RapidStats.tokens``); what was accepted after its end is left out.
        tokenizer: Of the target.
        end_tokens: Tokens that end an answer and have no text.

    Returns:
        ``[text, origin]``: "accepted" (a candidate that was kept), "target" (a token that the target added) or
        "rejected" (candidates that were not kept, which are no part of the answer).
    """
    decoder, made, left = IncrementalDecoder(tokenizer), [], tokens
    for step in trace:
        for origin, ids in (("accepted", step.candidates[: step.accepted]), ("target", (step.following,))):
            if origin == "target" and left > 0 and (refused := step.candidates[step.accepted :]):
                text = str(tokenizer.decode(list(refused), skip_special_tokens=True))
                made.append([text, "rejected"])
            kept, before = ids[:left], len(decoder.text)
            left -= len(kept)
            for token in kept:
                if token not in end_tokens:
                    decoder.add(token)
            made.append([decoder.text[before:], origin])
    if rest := decoder.flush():
        made.append([rest, made[-1][1] if made else "target"])
    joined: list[list[str]] = []
    for text, origin in made:
        if text and joined and joined[-1][1] == origin != "rejected":
            joined[-1][0] += text
        elif text:
            joined.append([text, origin])
    return joined


@dataclass(frozen=True, kw_only=True)
class LongReading:
    """What was read before an answer, by whom and how fast.

    Attributes:
        prefill_seconds: Reading the document; shared by the systems whose target reads it.
        retrieval_seconds: Retrieving the context that is shown; for the first question of a document with its
            embeddings.
        drafter_seconds: The drafter's own reading; shared by the systems with the same drafter and context.
        drafter_tokens: Tokens of the context that the drafter saw.
        holds_answer: Whether the retrieved context holds an answer.
        document_tokens: Tokens of the document.
    """

    prefill_seconds: float
    retrieval_seconds: float = 0.0
    drafter_seconds: float = 0.0
    drafter_tokens: int = 0
    holds_answer: bool = False
    document_tokens: int = 0


def answer_row(
    system: str,
    question: Question,
    text: str,
    stats: RapidStats,
    reading: LongReading,
    made: list[list[str]],
    *,
    seconds: float,
    error: str | None = None,
) -> AnswerRow:
    """A row of ``answers.jsonl``. Speeds count decoding alone: neither the document's reading nor the drafter's.

    ``rapid`` holds ``pieces``, ``acceptance``, ``accepted``, ``candidates``, ``tokens``, ``tokens_per_second``,
    ``first_token_seconds`` (the retrieval and the question's reading, which come before it), and the fields of
    ``LongReading``.
    """
    right, metrics = measured(question, text, abstained=False)
    usage = {"target": Usage(stats.prompt_tokens, stats.tokens)}
    if stats.candidates:
        usage["drafter"] = Usage(reading.drafter_tokens, stats.candidates)
    return AnswerRow(
        system=system,
        id=question.id,
        text=text,
        right=right and error is None,
        metrics=metrics,
        seconds=seconds,
        timings={
            "question": stats.prefill_seconds,
            "startup": stats.startup_seconds,
            "draft": stats.draft_seconds,
            "verify": stats.verify_seconds,
            "decode": stats.decode_seconds,
        },
        usage=usage,
        rapid=_details(question, stats, reading, made),
        error=error,
    )


def _details(question: Question, stats: RapidStats, reading: LongReading, made: list[list[str]]) -> dict[str, Any]:
    decoding = stats.decode_seconds - stats.startup_seconds
    return {
        "pieces": made,
        "acceptance": stats.acceptance if stats.candidates else None,
        "accepted": stats.accepted,
        "candidates": stats.candidates,
        "rounds": len(stats.schedule),
        "from_target": stats.from_target,
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens / decoding if decoding > 0 else None,
        "prefill_seconds": reading.prefill_seconds,
        "retrieval_seconds": reading.retrieval_seconds,
        "drafter_seconds": reading.drafter_seconds,
        "first_token_seconds": reading.retrieval_seconds + stats.first_token_seconds,
        "decode_seconds": decoding,
        "drafter_tokens": reading.drafter_tokens,
        "document_tokens": reading.document_tokens,
        "retrieved_holds_answer": reading.holds_answer,
        "depth": question.metadata.get("depth"),
        "finish": stats.finish,
        "notes": list(stats.notes),
    }


@dataclass(frozen=True)
class LongFigures:
    """The figures of one system over the questions that the reference answered too.

    Attributes:
        system: Its name.
        questions: How many.
        right: How many of them are right.
        interval: The 95 % Wilson interval of the share.
        won: Right where the reference is wrong.
        lost: Wrong where the reference is right.
        p: Of McNemar's test against the reference.
        acceptance: Accepted of all candidates; ``None`` without candidates.
        tokens_per_second: The median.
        drafter_seconds: The median of the drafter's own reading.
        both_fail: Questions on which the target alone and the drafter alone are both wrong, of those that all three
            answered; ``None`` where one of them is not there.
        rescued: How many of these are right.
    """

    system: str
    questions: int
    right: int
    interval: tuple[float, float]
    won: int
    lost: int
    p: float
    acceptance: float | None
    tokens_per_second: float
    drafter_seconds: float
    both_fail: int | None
    rescued: int | None


def long_figures(
    rows: Sequence[AnswerRow], systems: Sequence[str], *, reference: str = "long-context"
) -> Iterator[LongFigures]:
    """The figures of each of ``systems`` that has rows, in their order.

    Args:
        rows: Of any number of systems.
        systems: Names.
        reference: What the systems are compared with; where it has no rows, the first of ``systems``.
    """
    by_system: dict[str, dict[str, AnswerRow]] = {}
    for row in rows:
        by_system.setdefault(row.system, {})[row.id] = row
    target = by_system.get(reference) or by_system.get(systems[0], {})
    for name in systems:
        own = by_system.get(name, {})
        ids = [key for key in own if key in target]
        if ids:
            yield _figures(name, ids, own, target, by_system)


def _figures(
    name: str,
    ids: list[str],
    own: Mapping[str, AnswerRow],
    target: Mapping[str, AnswerRow],
    by_system: Mapping[str, Mapping[str, AnswerRow]],
) -> LongFigures:
    hits, base = [own[key].right for key in ids], [target[key].right for key in ids]
    made = [own[key].rapid or {} for key in ids if own[key].error is None]
    candidates = sum(one["candidates"] for one in made)
    drafter = by_system.get(drafter_alone(name) or "", {})
    both = [key for key in ids if key in drafter and not drafter[key].right and not target[key].right]
    speeds = [one["tokens_per_second"] for one in made if one["tokens_per_second"]]
    return LongFigures(
        system=name,
        questions=len(ids),
        right=sum(hits),
        interval=wilson_interval(sum(hits), len(hits)),
        won=sum(a and not b for a, b in zip(hits, base, strict=True)),
        lost=sum(b and not a for a, b in zip(hits, base, strict=True)),
        p=mcnemar([float(hit) for hit in hits], [float(hit) for hit in base]),
        acceptance=sum(one["accepted"] for one in made) / candidates if candidates else None,
        tokens_per_second=median(speeds) if speeds else 0.0,
        drafter_seconds=median([one["drafter_seconds"] for one in made]) if made else 0.0,
        both_fail=len(both) if drafter else None,
        rescued=sum(own[key].right for key in both) if drafter else None,
    )


def drafter_alone(name: str) -> str | None:
    """The system in which the drafter of the system ``name`` answers alone from what it reads; ``None``: it has none.

    A drafter with an irrelevant context is compared with the one that reads the same.
    """
    name = name.partition(":")[0]
    plain = name.removesuffix("-irrelevant")
    if not plain.startswith(("rapid-", "hybrid-", "rag-self", "rag-upward-")):
        return None
    return ("rag-upward" if "-upward" in plain else "rag") + name[len(plain) :]


def long_table(figures: Sequence[LongFigures]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| system | right | 95 % interval | won, lost | p | accepted | tokens/s | drafter reads | both fail: right |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in figures:
        low, high = one.interval
        accepted = "" if one.acceptance is None else f"{one.acceptance:.0%}"
        both = "" if one.both_fail is None else f"{one.rescued} of {one.both_fail}"
        reads = f"{one.drafter_seconds:.1f} s" if one.drafter_seconds else ""
        lines.append(
            f"| {one.system} | {one.right} of {one.questions} ({one.right / one.questions:.0%}) "
            f"| {low:.0%} to {high:.0%} "
            f"| +{one.won} -{one.lost} | {one.p:.2f} | {accepted} | {one.tokens_per_second:.1f} | {reads} | {both} |"
        )
    return "\n".join(lines)
