"""Questions on one long document: InfiniteBench (En.QA, En.MC, En.Sum), LongBench v2. Dialogues: MT-Bench-101."""

from __future__ import annotations

from collections.abc import Iterator

from specrag.evaluation.formats.base import Format, has
from specrag.evaluation.formats.choice import correct_choice
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question, Turn

_SUMMARIZE = "Summarize the document."


def _infinitebench(row: Row) -> Iterator[Question]:
    """A row of InfiniteBench (Zhang et al., arXiv 2402.13718).

    En.MC's ``answer`` is the option's text, alone or with its letter after it. The schema is that of the authors' code;
    no genuine row was at hand.
    """
    asked = row.text("input").strip()
    answers = row.answers("answer")
    options = row.texts("options") if row.get("options") else ()
    correct = correct_choice(row, options, answers[0]) if options else None
    yield Question(
        row.name("id"),
        asked or _SUMMARIZE,
        answers if correct is None else (options[correct],),
        choices=options,
        correct=() if correct is None else (correct,),
        context=row.text("context"),
        source="infinitebench",
        metadata={"task": "En.MC" if options else "En.QA" if asked else "En.Sum"},
    )


INFINITEBENCH = Format(
    name="infinitebench",
    expects="rows with 'context', 'input' (the question; empty for En.Sum), 'answer' and, for En.MC, 'options'",
    recognises=has("context", "input", "answer"),
    read=_infinitebench,
)


_OPTIONS = ("choice_A", "choice_B", "choice_C", "choice_D")


def _longbench(row: Row) -> Iterator[Question]:
    """A row of LongBench v2 (Bai et al., arXiv 2412.15204).

    The schema is the one that the authors publish; no genuine row was at hand.
    """
    choices = tuple(row.text(key) for key in _OPTIONS)
    correct = correct_choice(row, choices, row.text("answer"))
    yield Question(
        row.name("_id"),
        row.text("question"),
        (choices[correct],),
        choices=choices,
        correct=(correct,),
        context=row.text("context"),
        source="longbench-v2",
        metadata=row.rest("_id", "question", "answer", "context", *_OPTIONS),
    )


LONGBENCH_V2 = Format(
    name="longbench-v2",
    expects="rows with '_id', 'question', 'choice_A' to 'choice_D', 'answer' (A to D) and 'context'",
    recognises=has("question", "context", *_OPTIONS),
    read=_longbench,
)


def _dialogue(row: Row) -> Iterator[Question]:
    """A dialogue of MT-Bench-101 (Bai et al., arXiv 2402.14762).

    Turn t is answered after the given replies of the turns before it. There are no short answers: an answer is
    compared with the given reply.
    """
    turns = tuple(
        Turn(turn.text("user"), reply=turn.text("bot") if turn.get("bot") else "") for turn in row.rows("history")
    )
    if not turns:
        raise row.wrong("'history' to hold at least one turn")
    yield Question(
        row.name("id"), turns[-1].question, (), turns=turns, source="mt-bench-101", metadata=row.rest("id", "history")
    )


MT_BENCH_101 = Format(
    name="mt-bench-101",
    expects="rows with 'history': a list of turns, each with 'user' and 'bot'",
    recognises=has("history"),
    read=_dialogue,
)
