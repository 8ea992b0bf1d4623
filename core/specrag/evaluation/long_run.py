"""A run of systems over long documents: question by question, resumable, with the time that is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from specrag.evaluation.long_systems import LongSystems
from specrag.evaluation.records import Question, require
from specrag.evaluation.run import versions
from specrag.evaluation.runs import AnswerLog, AnswerRow, Key, RunInfo, writing_run
from specrag.evaluation.scoring import check_questions

#: Called after each row, with the row, the number of questions that are done, and the seconds that are left.
Progress = Callable[[AnswerRow, int, float | None], None]


def run_long_systems(
    runner: LongSystems,
    questions: Sequence[Question],
    folder: str | Path,
    *,
    source: str = "",
    settings: dict[str, Any] | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> list[AnswerRow]:
    """Every system's answer to every question, in ``folder``; what is there already is not asked again.

    After each question every system has its row, so that an unfinished run can be read too. Questions with the same
    document should follow one another: they share its reading.

    Args:
        runner: The systems.
        questions: With ``context`` and answers.
        folder: Of the run (``specrag.evaluation.runs``).
        source: Where the questions came from, for ``run.json``.
        settings: What else changes the answers, for ``run.json``.
        retry: Ask again what failed in an earlier process.
        progress: Told of each row.

    Returns:
        The rows of this runner's systems.

    Raises:
        InvalidInputError: A question lacks a document or answers, or the folder holds another run.
    """
    names = [system.name for system in runner.systems]
    with _opened(runner, questions, folder, source, settings) as log:
        known = _texts(log, retry)
        waiting = [q for q in questions if any((name, q.id) not in known for name in names)]
        began = time.monotonic()
        for asked, question in enumerate(waiting):
            done = [name for name in names if (name, question.id) in known]
            left = None if not asked else (time.monotonic() - began) / asked * (len(waiting) - asked)
            for row in runner.answers(question, done):
                log.append(row)
                if progress is not None:
                    progress(row, len(questions) - len(waiting) + asked, left)
        return [row for row in log.done.values() if row.system in names]


def run_dialogues(
    runner: LongSystems,
    dialogues: Sequence[Sequence[Question]],
    folder: str | Path,
    *,
    source: str = "",
    settings: dict[str, Any] | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> list[AnswerRow]:
    """As ``run_long_systems``, for questions that follow one another: each dialogue is over one document.

    Raises:
        InvalidInputError: As ``run_long_systems``; or the questions of a dialogue have different documents.
    """
    names = [system.name for system in runner.systems]
    questions = [question for dialogue in dialogues for question in dialogue]
    with _opened(runner, questions, folder, source, settings) as log:
        known, place = _texts(log, retry), {question.id: at for at, question in enumerate(questions)}
        began, made, total = time.monotonic(), 0, len(questions) * len(names)
        before = sum(key in known for key in itertools.product(names, place))
        for dialogue in dialogues:
            for row in runner.dialogue(dialogue, known):
                log.append(row)
                made += 1
                if progress is not None:
                    left = (time.monotonic() - began) / made * (total - before - made)
                    progress(row, place[row.id], left)
        return [row for row in log.done.values() if row.system in names]


def _texts(log: AnswerLog, retry: bool) -> dict[Key, str]:
    """The answers that are there; with ``retry``, without those that failed."""
    return {key: row.text for key, row in log.done.items() if row.error is None or not retry}


def _opened(
    runner: LongSystems,
    questions: Sequence[Question],
    folder: str | Path,
    source: str,
    settings: dict[str, Any] | None,
) -> AbstractContextManager[AnswerLog]:
    require(questions, context=True)
    check_questions(questions, passages=False)
    info = RunInfo.about(questions, runner.describe(), source=source, settings=settings, versions=versions())
    return writing_run(folder, info, questions)
