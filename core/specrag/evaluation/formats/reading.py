"""Questions on a given passage: SQuAD v1.1 and v2, ClapNQ, BoolQ."""

from __future__ import annotations

from collections.abc import Iterator

from specrag.evaluation.formats.base import Format, has
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question
from specrag.schema import Passage


def _squad(article: Row) -> Iterator[Question]:
    title = article.text("title").replace("_", " ") if article.get("title") else None
    for paragraph in article.rows("paragraphs"):
        passage = Passage(paragraph.text("context"), title=title)
        for asked in paragraph.rows("qas"):
            impossible = asked.get("is_impossible") is True
            texts = tuple(dict.fromkeys(answer.text("text") for answer in asked.rows("answers")))
            if not texts and not impossible:
                raise asked.wrong("'answers' with a text each, or 'is_impossible': true")
            yield Question(
                asked.name("id"),
                asked.text("question").strip(),
                () if impossible else texts,
                (passage,),
                () if impossible else (0,),
                unanswerable=impossible,
                source="squad",
                metadata=asked.rest("id", "question", "answers", "is_impossible"),
            )


SQUAD = Format(
    name="squad",
    expects="an object with 'data': a list of articles, each with 'title' and 'paragraphs' (each with 'context' "
    "and 'qas'), v1.1 or v2",
    recognises=lambda row: (
        isinstance(row.get("paragraphs"), list)
        and any("qas" in paragraph for paragraph in row["paragraphs"] if isinstance(paragraph, dict))
    ),
    read=_squad,
)


def _clapnq(row: Row) -> Iterator[Question]:
    passages = tuple(Passage(passage.text("text"), title=passage.get("title")) for passage in row.rows("passages"))
    answers = tuple(dict.fromkeys(out.text("answer") for out in row.rows("output") if out.get("answer")))
    yield Question(
        row.name("id"),
        row.text("input"),
        answers,
        passages,
        tuple(range(len(passages))) if answers else (),
        unanswerable=not answers,
        source="clapnq",
        metadata={"output": row.get("output")},
    )


CLAPNQ = Format(
    name="clapnq",
    expects="rows with 'input' (the question), 'passages' (each with 'title' and 'text') and 'output' (each with "
    "'answer', of a few sentences; empty when the passage does not answer)",
    recognises=has("input", "passages", "output"),
    read=_clapnq,
)

_YES_NO = ("yes", "no")


def _boolq(row: Row) -> Iterator[Question]:
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise row.wrong("'answer' to be true or false")
    correct = 0 if answer else 1
    yield Question(
        row.name("id", "idx"),
        row.text("question"),
        (_YES_NO[correct],),
        (Passage(row.text("passage"), title=row.get("title")),),
        (0,),
        choices=_YES_NO,
        correct=(correct,),
        source="boolq",
    )


BOOLQ = Format(
    name="boolq",
    expects="rows with 'question', 'passage' and 'answer' (true or false)",
    recognises=has("question", "passage", "answer"),
    read=_boolq,
)
