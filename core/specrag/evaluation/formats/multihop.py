"""Questions over several passages: HotpotQA, 2WikiMultihopQA, MuSiQue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specrag.evaluation.formats.base import Format
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question
from specrag.schema import Passage


def _context(row: Row) -> list[Passage]:
    """``context`` as pairs of a title and its sentences, or as two lists (the Hugging Face form)."""
    pairs: Any = row.get("context")
    if isinstance(pairs, dict):
        pairs = list(zip(pairs.get("title") or (), pairs.get("sentences") or pairs.get("content") or (), strict=False))
    if not isinstance(pairs, list) or not all(_is_titled(pair) for pair in pairs):
        raise row.wrong("'context' to be a list of [title, [sentences]]")
    return [Passage(" ".join(sentence.strip() for sentence in sentences), title=title) for title, sentences in pairs]


def _is_titled(pair: Any) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], list)
        and all(isinstance(sentence, str) for sentence in pair[1])
    )


def _supporting(row: Row) -> set[str]:
    """The titles under ``supporting_facts``: pairs of a title and a sentence, or two lists."""
    value: Any = row.get("supporting_facts")
    if isinstance(value, dict):
        return set(value.get("title", ()))
    if not isinstance(value, list) or not all(isinstance(fact, list) and fact for fact in value):
        raise row.wrong("'supporting_facts' to be a list of [title, sentence]; a test file without answers has none")
    return {fact[0] for fact in value}


def _paragraphs(row: Row, source: str) -> Iterator[Question]:
    passages, supporting = _context(row), _supporting(row)
    yield Question(
        row.name("_id", "id"),
        row.text("question"),
        row.answers("answer"),
        tuple(passages),
        tuple(i for i, passage in enumerate(passages) if passage.title in supporting),
        source=source,
        metadata=row.rest("_id", "id", "question", "answer", "context"),
    )


def _is_paragraphs(row: Any) -> bool:
    return all(key in row for key in ("question", "context", "supporting_facts")) and not isinstance(
        row["context"], str
    )


HOTPOTQA = Format(
    name="hotpotqa",
    expects="rows with '_id', 'question', 'answer', 'context' (a list of [title, [sentences]]) and 'supporting_facts'",
    recognises=lambda row: _is_paragraphs(row) and "evidences" not in row,
    read=lambda row: _paragraphs(row, "hotpotqa"),
)
TWO_WIKI = Format(
    name="2wikimultihopqa",
    expects="rows as HotpotQA's, with 'evidences' beside them",
    recognises=lambda row: _is_paragraphs(row) and "evidences" in row,
    read=lambda row: _paragraphs(row, "2wikimultihopqa"),
)


def _musique(row: Row) -> Iterator[Question]:
    """A row of MuSiQue (Trivedi et al., arXiv 2108.00573).

    One of MuSiQue-Full with ``answerable`` false is unanswerable; its former answer stays in ``metadata``.
    """
    paragraphs = row.rows("paragraphs")
    answerable = row.get("answerable") is not False
    answers = row.answers("answer") + (row.texts("answer_aliases") if row.get("answer_aliases") else ())
    yield Question(
        row.name("id"),
        row.text("question"),
        tuple(dict.fromkeys(answers)) if answerable else (),
        tuple(Passage(paragraph.text("paragraph_text"), title=paragraph.get("title")) for paragraph in paragraphs),
        tuple(i for i, paragraph in enumerate(paragraphs) if paragraph.get("is_supporting")),
        unanswerable=not answerable,
        source="musique",
        metadata=row.rest("id", "question", "answer_aliases", "paragraphs"),
    )


MUSIQUE = Format(
    name="musique",
    expects="rows with 'id', 'question', 'answer', 'answer_aliases' and 'paragraphs' (each with 'title', "
    "'paragraph_text' and 'is_supporting'), MuSiQue-Ans or MuSiQue-Full",
    recognises=lambda row: (
        "question" in row
        and isinstance(row.get("paragraphs"), list)
        and any("paragraph_text" in paragraph for paragraph in row["paragraphs"] if isinstance(paragraph, dict))
    ),
    read=_musique,
)
