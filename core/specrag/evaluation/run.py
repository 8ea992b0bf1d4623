"""Asks every question of every system, and writes each answer down as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from specrag.baselines import System
from specrag.errors import InvalidInputError, described, kind_of
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, Run, RunInfo, details_of, writing_run
from specrag.evaluation.scoring import asked_text, check_questions, measured, right_by
from specrag.evaluation.systems import Entry
from specrag.schema import SpeculativeAnswer, Usage

#: Makes the row of one question.
Asker = Callable[[Question], AnswerRow]
#: Called with (answers there, answers in all).
Progress = Callable[[int, int], None]
_PACKAGES = ("specrag", "torch", "transformers", "numpy")


def evaluate(
    systems: Mapping[str, System | Entry],
    questions: Sequence[Question],
    folder: str | Path,
    *,
    source: str = "",
    settings: Mapping[str, Any] | None = None,
    retry: bool = False,
    progress: Progress = lambda done, total: None,
) -> Run:
    """Ask ``systems`` all ``questions`` over their passages. A run that is in ``folder`` goes on.

    Args:
        systems: By the names under which they are shown; ``specrag.evaluation.systems.build`` makes them from names.
        questions: With passages, and with answers, choices or the mark that they are unanswerable.
        folder: Of the run; see ``specrag.evaluation.runs``.
        source: Where the questions came from, for the reader.
        settings: What else changes the answers. A run with other settings is another run.
        retry: Ask again what failed in an earlier process.
        progress: Called after each answer.

    Raises:
        InvalidInputError: Something is wrong with the questions or systems, or the folder holds another run. Nothing
            was asked then.
        SpecRAGError: The disk is full. The error of a system is a row with ``error``; it ends nothing.
    """
    check_questions(questions)
    entries = {name: _entry(name, system) for name, system in systems.items()}
    if not entries:
        raise InvalidInputError("there is no system to evaluate")
    info = RunInfo.about(
        questions,
        {name: entry.about for name, entry in entries.items()},
        source=source,
        settings=settings,
        versions=versions(),
    )
    askers = {name: _asker(name, entry) for name, entry in entries.items()}
    return ask_all(askers, questions, folder, info, retry=retry, progress=progress)


def ask_all(
    askers: Mapping[str, Asker],
    questions: Sequence[Question],
    folder: str | Path,
    info: RunInfo,
    *,
    retry: bool = False,
    progress: Progress = lambda done, total: None,
) -> Run:
    """The loop of a run: on each question the askers take turns, and another one begins each time.

    Args:
        askers: By the name of the system. What one raises becomes a row with ``error``.
        questions: Checked by the caller.
        folder: Of the run.
        info: What the run is.
        retry: Ask again what failed in an earlier process.
        progress: Called after each answer.

    Raises:
        InvalidInputError: The folder holds another run.
        SpecRAGError: The disk is full.
    """
    names = list(askers)
    with writing_run(folder, info, questions) as log:
        failed = {key for key, row in log.done.items() if row.error is not None} if retry else set()
        done, total = 0, len(names) * len(questions)
        for number, question in enumerate(questions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                done += 1
                if (name, question.id) in log.done and (name, question.id) not in failed:
                    continue
                log.append(_asked(name, askers[name], question))
                progress(done, total)
    return Run.load(folder)


def _asked(name: str, asker: Asker, question: Question) -> AnswerRow:
    """The row of one question, or one that says why there is no answer."""
    start = time.perf_counter()
    try:
        return asker(question)
    except Exception as error:  # one question shall not cost the run, whatever a system raises
        return AnswerRow(
            system=name, id=question.id, error=described(error), seconds=round(time.perf_counter() - start, 4)
        )


def _entry(name: str, given: Any) -> Entry:
    entry = given if isinstance(given, Entry) else Entry(given)
    if not isinstance(entry.system, System):
        raise InvalidInputError(
            f"{name!r} must have answer, aanswer, stream and astream, as SpeculativeRAG has; got {kind_of(given)}"
        )
    return entry


def _asker(name: str, entry: Entry) -> Asker:
    def ask(question: Question) -> AnswerRow:
        start = time.perf_counter()
        answer = entry.system.answer(asked_text(question), question.passages)
        return row_of(name, question, answer, time.perf_counter() - start, entry.roles)

    return ask


def row_of(
    name: str,
    question: Question,
    answer: SpeculativeAnswer,
    seconds: float,
    roles: tuple[str, str] = ("drafter", "verifier"),
) -> AnswerRow:
    """The row of an answer over passages.

    Args:
        name: Of the system.
        question: What was asked.
        answer: What it said.
        seconds: How long it took.
        roles: Whose tokens ``drafter_usage`` and ``verifier_usage`` are.
    """
    right, metrics = measured(question, answer.text, abstained=answer.abstained)
    timings = {stage: round(value, 4) for stage, value in vars(answer.timings).items() if value and stage != "total"}
    usage: dict[str, Usage] = {}
    for role, used in zip(roles, (answer.drafter_usage, answer.verifier_usage), strict=True):
        if used != Usage():
            usage[role] = usage.get(role, Usage()) + used
    return AnswerRow(
        system=name,
        id=question.id,
        text=answer.text,
        right=right,
        abstained=answer.abstained,
        metrics=metrics,
        confidence=answer.confidence,
        seconds=round(seconds, 4),
        timings=timings,
        usage=usage,
        answer=details_of(answer, None if question.unanswerable else right_by(question)),
    )


def versions() -> dict[str, str]:
    """The versions of the packages that matter, where they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
