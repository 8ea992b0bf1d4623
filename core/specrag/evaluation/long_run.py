"""A run of systems over long documents: question by question, resumable, with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specrag.evaluation.long_systems import LongSystems
from specrag.evaluation.records import Question, require
from specrag.evaluation.runs import AnswerRow, RunInfo, writing_run

#: Called after each row, with the row, the number of questions that are done, and the seconds that are left.
Progress = Callable[[AnswerRow, int, float | None], None]


def run_long_systems(
    runner: LongSystems,
    questions: Sequence[Question],
    folder: str | Path,
    *,
    source: str = "",
    settings: dict[str, Any] | None = None,
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
        progress: Told of each row.

    Returns:
        The rows of this runner's systems.

    Raises:
        InvalidInputError: A question lacks a document or answers, or the folder holds another run.
    """
    require(questions, answers=True, context=True)
    names = [system.name for system in runner.systems]
    info = RunInfo.about(questions, runner.describe(), source=source, settings=settings)
    with writing_run(folder, info, questions) as log:
        waiting = [q for q in questions if any((name, q.id) not in log.done for name in names)]
        began = time.monotonic()
        for asked, question in enumerate(waiting):
            done = [name for name in names if (name, question.id) in log.done and not log.done[name, question.id].error]
            left = None if not asked else (time.monotonic() - began) / asked * (len(waiting) - asked)
            for row in runner.answers(question, done):
                log.append(row)
                if progress is not None:
                    progress(row, len(questions) - len(waiting) + asked, left)
        return [row for row in log.done.values() if row.system in names]
