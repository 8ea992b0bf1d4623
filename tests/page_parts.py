"""A made run of an evaluation for the tests of the page: real questions, made answers of five systems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, RunInfo, writing_run
from specrag.schema import Passage, Usage

SYSTEMS = ("standard", "corrective", "self-reflective", "speculative", "rapid")
#: What a page must show as text, each of it able to break a page that takes it as markup.
HOSTILE = (
    "</script><script>document.title = 'broken'</script><!-- <b>bold</b> & \"quotes\" 'single' ${x} {{ 7 * 7 }} "
    "NUL:\0 half:\ud83d whole:\U0001f642 right to left:\u202e\u05e9\u05dc\u05d5\u05dd <img src=x onerror=alert(1)>"
)


def draft(index: int, answer: str, *, right: bool, score: float, subset: Sequence[int] = (0, 1)) -> dict:
    """A draft as `details_of` writes it."""
    return {
        "index": index,
        "answer": answer,
        "rationale": f"The passage says that it is {answer}, in its second sentence.",
        "abstained": False,
        "subset": list(subset),
        "score": score,
        "log_draft": score + 1.25,
        "log_self_contain": -1.125,
        "log_self_reflect": -0.125,
        "log_listwise": None,
        "log_span": None,
        "drafter": "drafter",
        "log_agreement": None,
        "same": [],
        "verified": True,
        "right": right,
    }


def answered(system: str, question: Question, text: str, *, right: bool, drafts: Sequence[dict] = (), **more):
    """A row of a system that gave `text`."""
    details = {
        "rationale": drafts[0]["rationale"] if drafts else "",
        "reason": "no draft answers" if more.get("abstained") else None,
        "subset": drafts[0]["subset"] if drafts and not more.get("abstained") else [],
        "drafts": list(drafts),
        "scores_used": ["draft", "self_contain", "self_reflect"] if drafts else [],
        "embedding_source": "embedder",
        "escalated": None,
        "failures": [],
        "notes": [],
        "critiques": [],
    }
    given = {
        "metrics": {"contains": float(right), "f1": 0.75 * right},
        "seconds": 1.5,
        "timings": {"draft": 1.0, "verify": 0.5},
        "usage": {"drafter": Usage(1200, 40), "verifier": Usage(400, 2)},
        "answer": details,
    } | more
    return AnswerRow(system=system, id=question.id, text=text, right=right, **given)


def pieces(text: str, dropped: str) -> list[list[str]]:
    """`text` as RAPID's decoding: a word is accepted, the next is the target's own."""
    made = []
    for at, word in enumerate(text.split(" ")):
        made.append([(" " if at else "") + word, "target" if at % 3 == 2 else "accepted"])
        if at % 3 == 1:
            made.append([f" {dropped}", "rejected"])
    return made


def rows_of(at: int, question: Question) -> Iterator[AnswerRow]:
    """The five systems' rows: by the number of the question, each filter of the page has its examples."""
    gold, other = question.answers[0], f"Answer {at % 7}"
    good, bad = at % 3 != 0, at % 4 == 0
    yield answered("standard", question, gold if good else other, right=good, seconds=2 + at % 11)
    corrective = answered("corrective", question, other if bad else gold, right=not bad)
    grades = [{"passage": i, "grade": 0.9 - i / 4, "verdict": "incorrect" if i > 2 else "correct"} for i in range(4)]
    corrective.answer["critiques"] = [*grades, {"passage": 0, "strip": f"It was {gold}.", "grade": 0.75}]
    yield corrective
    silent = at % 5 == 0
    yield answered("self-reflective", question, "" if silent else gold, right=not silent, abstained=silent)
    lost = {"index": 4, "subset": [8, 9], "error": "ModelError: the server closed the connection"}
    votes = [draft(0, gold, right=True, score=-2.5, subset=(0, 3))]
    votes += [draft(i, other, right=False, score=-3.5 - i, subset=(i, 9 - i)) for i in (1, 2, 3)]
    if at % 6 == 1:  # the majority wins, and is wrong
        votes = [*votes[1:], votes[0]]
    one = answered("speculative", question, votes[0]["answer"], right=votes[0]["right"], drafts=votes, confidence=0.625)
    one.answer["failures"] = [lost]
    yield one
    if at % 10 == 9:
        yield AnswerRow(system="rapid", id=question.id, error="OutOfMemoryError: the cache needs 3 GB", seconds=0.25)
    else:
        said = f"The passages say that the answer is {gold}, as the second sentence has it."
        rapid = {"pieces": pieces(said, "maybe"), "acceptance": 0.7125, "tokens_per_second": 20.1}
        yield answered("rapid", question, said, right=True, answer=None, rapid=rapid)


def make_run(folder: Path, questions: Sequence[Question]) -> Path:
    """A run of the five systems over `questions` in `folder`."""
    systems = {name: {"model": "made"} for name in SYSTEMS}
    info = RunInfo.about(questions, systems, source="made/questions.jsonl", settings={"seed": 0})
    with writing_run(folder, info, questions) as log:
        for at, question in enumerate(questions):
            for row in rows_of(at, question):
                log.append(row)
    return folder


def race(at: int, passages: int = 10) -> Question:
    """A question that the first of its passages answers."""
    read = [
        Passage(
            f"Race {at}, heat {i}: runners from several towns took part. "
            + (f"Ada Smith-{at} won the race." if i == 0 else f"Nobody from town {i} won anything that day."),
            title=f"Race {at}, part {i + 1}",
            score=0.9 - i / 20,
        )
        for i in range(passages)
    ]
    return Question(f"race-{at}", f"who won race {at}?", (f"Ada Smith-{at}",), tuple(read), gold=(0,))
