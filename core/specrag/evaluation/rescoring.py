"""Ablations of the scores from stored drafts, without asking any model again (Wang et al., 2407.08223, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

from specrag.errors import InvalidInputError
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, Run
from specrag.evaluation.scoring import measured
from specrag.schema import Draft, ScoreName, Verdict
from specrag.speculative.selection import rank


def with_rescored(run: Run, system: str, scores: Sequence[Sequence[ScoreName]]) -> Run:
    """``run`` with one more system per entry of ``scores``: the drafts of ``system``, chosen by those scores alone.

    The rows take over the time and tokens of the drafts they are made from. The confidence and an escalation belong to
    the choice that was made then, so they are left out. Nothing is written.

    Args:
        run: With answers of ``system``.
        system: A system that stores drafts with scores.
        scores: For instance ``[("draft",), ("draft", "self_reflect")]``.

    Raises:
        InvalidInputError: The run has no such system, a score is unknown, or a draft that could be chosen lacks one.
    """
    rows = run.of_system(system)
    if not rows:
        raise InvalidInputError(f"the run has no answers of {system!r}; it has {', '.join(run.info.systems)}")
    by_id = {question.id: question for question in run.questions}
    systems, answers = dict(run.info.systems), list(run.answers)
    for chosen in map(check_scores, scores):
        name = f"{system} by {'+'.join(chosen)}"
        systems[name] = {**run.info.systems[system], "rescored": list(chosen)}
        answers += [_rescored(name, row, by_id[row.id], chosen) for row in rows.values()]
    return replace(run, info=replace(run.info, systems=systems), answers=tuple(answers))


def check_scores(names: Sequence[str]) -> tuple[ScoreName, ...]:
    """``names`` as they are, if there is one, each is a score and none is named twice.

    Raises:
        InvalidInputError: Otherwise.
    """
    unknown = [name for name in names if name not in get_args(ScoreName)]
    if unknown or not names:
        what = f"unknown scores {unknown}" if unknown else "no score is named"
        raise InvalidInputError(f"{what}: choose among {', '.join(get_args(ScoreName))}")
    if len(set(names)) < len(names):
        raise InvalidInputError(f"a score is named twice in {'+'.join(names)}: name each once")
    return cast(tuple[ScoreName, ...], tuple(names))


def _rescored(name: str, row: AnswerRow, question: Question, scores: Sequence[ScoreName]) -> AnswerRow:
    """``row`` with the draft that ``scores`` choose; a failed row stays one."""
    if row.error is not None or row.answer is None:
        return replace(row, system=name)
    stored = {draft["index"]: draft for draft in row.answer.get("drafts", ()) if draft.get("verified", True)}
    ranked, counted = rank([_verdict(draft) for draft in stored.values()], scores)
    contest = [verdict for verdict in ranked if not verdict.draft.abstained]
    if contest and set(counted) != set(scores):
        lacking = ", ".join(score for score in scores if score not in counted)
        raise InvalidInputError(f"question {row.id!r}: the stored drafts of {row.system!r} have no score {lacking}")
    text = contest[0].draft.text if contest else ""
    right, metrics = measured(question, text, abstained=not contest)
    drafts = [stored[verdict.draft.index] | {"score": verdict.log_score} for verdict in ranked]
    answer = {**row.answer, "drafts": drafts, "scores_used": list(counted), "escalated": None, "confidence": None}
    return replace(
        row,
        system=name,
        text=text,
        right=right,
        abstained=not contest,
        metrics=metrics,
        confidence=None,
        answer=answer,
    )


def _verdict(stored: Any) -> Verdict:
    draft = Draft(
        index=stored["index"],
        subset=tuple(stored["subset"]),
        passages=(),
        text=stored["answer"],
        rationale=stored["rationale"],
        abstained=stored["abstained"],
    )
    return Verdict(draft, **{f"log_{score}": stored.get(f"log_{score}") for score in get_args(ScoreName)})
