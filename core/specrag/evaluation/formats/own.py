"""specrag's own format: one row per question, with the names of ``Question``'s fields."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specrag.errors import SpecRAGError, said
from specrag.evaluation.formats.base import Format
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question, Turn
from specrag.retrieval.documents import read_documents
from specrag.schema import Passage

_FIELDS = (
    *("id", "question", "answers", "passages", "title", "text", "gold", "supporting_titles", "weight"),
    *("choices", "correct", "context", "document", "turns", "unanswerable", "source", "metadata"),
)


_PASSAGE_FIELDS = ("text", "title", "id", "score", "embedding", "metadata", "gold")


def _read(row: Row) -> Iterator[Question]:
    passages, gold = _passages(row)
    turns = tuple(_turn(turn) for turn in row.rows("turns")) if row.get("turns") else ()
    answers = row.texts("answers") if "answers" in row.values or not turns else ()
    choices = row.texts("choices") if row.get("choices") else ()
    unanswerable = row.flag("unanswerable")
    yield Question(
        id=row.name("id"),
        question=row.text("question") if "question" in row.values or not turns else turns[-1].question,
        answers=answers,
        passages=passages,
        gold=gold,
        weight=row.real("weight", 1.0),
        choices=choices,
        correct=_correct(row, choices, answers),
        context=_context(row),
        turns=turns,
        unanswerable=unanswerable if unanswerable is not None else not answers and not turns,
        source=row.text("source") if row.get("source") else "",
        metadata={**(row.get("metadata") or {}), **row.rest(*_FIELDS)},
    )


def _context(row: Row) -> str:
    """The long document: the text under ``context``, or that of the file whose path is under ``document``.

    A path that is not absolute starts at the folder of the data. A file is read as ``specrag index`` reads it.
    """
    if not row.get("document"):
        return row.text("context") if row.get("context") else ""
    if row.get("context"):
        raise row.wrong("one document: its text under 'context', or the path of its file under 'document', not both")
    path = row.path.absolute().parent / Path(row.text("document")).expanduser()
    try:
        text = _text_of(path, path.stat().st_mtime_ns)
    except (SpecRAGError, OSError) as error:
        raise row.wrong(f"'document' to be the path of a file that can be read: {said(error)}") from error
    if not text.strip():
        raise row.wrong(f"'document' to be the path of a file with text: {path} holds none")
    return text


@functools.lru_cache(maxsize=4)
def _text_of(path: Path, changed: int) -> str:
    """The text of a file, read once for questions that follow one another. ``changed``: when the file changed."""
    return "\n\n".join(document.text for document in read_documents(path))


def _passages(row: Row) -> tuple[tuple[Passage, ...], tuple[int, ...]]:
    """The passages, and which of them answer."""
    if row.get("passages"):
        listed = row.rows("passages")
        supporting = set(row.get("supporting_titles") or ())
        marked = [passage.flag("gold") for passage in listed]
        if any(mark is not None for mark in marked):
            if row.get("gold") is not None or supporting:
                raise row.wrong("gold passages to be named once: by 'gold' in the row, or by 'gold' in its passages")
            gold = tuple(i for i, mark in enumerate(marked) if mark)
        else:
            gold = tuple(i for i, passage in enumerate(listed) if passage.get("title") in supporting)
    else:
        listed = [row] if "text" in row.values else []
        gold = tuple(range(len(listed)))
    given = row.get("gold")
    if given is not None:
        if not isinstance(given, list) or not all(type(at) is int and 0 <= at < len(listed) for at in given):
            raise row.wrong(f"'gold' to be a list of positions among the {len(listed)} passages, got {given!r}")
        gold = tuple(given)
    return tuple(_passage(passage, is_row=passage is row) for passage in listed), gold


def _passage(row: Row, is_row: bool) -> Passage:
    title = row.get("title")
    if is_row:  # the question's own id and fields are not the passage's
        return Passage(row.text("text"), title=title)
    identifier = row.get("id")
    return Passage(
        row.text("text"),
        title=title,
        id=None if identifier is None else str(identifier),
        score=row.real("score", None),
        embedding=row.get("embedding"),
        metadata={**(row.get("metadata") or {}), **row.rest(*_PASSAGE_FIELDS)},
    )


def _turn(row: Row) -> Turn:
    return Turn(
        row.text("question"),
        reply=row.text("reply") if row.get("reply") else "",
        answers=row.texts("answers") if row.get("answers") else (),
    )


def _correct(row: Row, choices: tuple[str, ...], answers: tuple[str, ...]) -> tuple[int, ...]:
    given = row.get("correct")
    if given is None:
        given = [i for i, choice in enumerate(choices) if choice in answers]
    if choices and not given:
        raise row.wrong("'correct' (positions in 'choices'), or an answer that is one of the choices")
    if not isinstance(given, list) or not all(type(at) is int and 0 <= at < len(choices) for at in given):
        raise row.wrong(f"'correct' to be a list of positions among the {len(choices)} choices, got {given!r}")
    return tuple(given)


def to_row(question: Question) -> dict[str, Any]:
    """The question as a row of this format; fields at their defaults are left out."""
    row: dict[str, Any] = {"id": question.id, "question": question.question, "answers": list(question.answers)}
    row["gold"] = list(question.gold)
    row["passages"] = [_passage_row(passage) for passage in question.passages]
    if question.weight != 1.0:
        row["weight"] = question.weight
    optional: Mapping[str, Any] = {
        "choices": list(question.choices),
        "correct": list(question.correct),
        "context": question.context,
        "turns": [{"question": t.question, "reply": t.reply, "answers": list(t.answers)} for t in question.turns],
        "unanswerable": question.unanswerable,
        "source": question.source,
        "metadata": dict(question.metadata),
    }
    return row | {key: value for key, value in optional.items() if value}


def _passage_row(passage: Passage) -> dict[str, Any]:
    row: dict[str, Any] = {"title": passage.title, "text": passage.text}
    optional = {"id": passage.id, "score": passage.score, "metadata": dict(passage.metadata) or None}
    return row | {key: value for key, value in optional.items() if value is not None}


SPECRAG = Format(
    name="specrag",
    expects="rows with 'question' and 'answers' (or 'turns'), and 'passages', one passage's 'title' and 'text', or "
    "none",
    recognises=lambda row: ("question" in row and "answers" in row) or "turns" in row,
    read=_read,
)
