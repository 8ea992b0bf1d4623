"""Open-domain questions, with or without retrieved passages: NQ-open, lost in the middle, Self-RAG, PopQA, FlashRAG."""

from __future__ import annotations

import json
from collections.abc import Iterator

from specrag.evaluation.formats.base import Format, has
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question
from specrag.schema import Passage

_VERDICTS = {"SUPPORTS": "true", "REFUTES": "false"}  # Self-RAG scores these model outputs as true and false


def contexts(row: Row) -> tuple[Passage, ...]:
    """The passages under ``ctxs``, best first, with the retriever's ids and scores where it gives them."""
    listed = row.rows("ctxs" if "ctxs" in row.values else "top_contexts") if _has_contexts(row) else []
    passages = []
    for passage in listed:
        identifier = passage.get("id")
        passages.append(
            Passage(
                passage.text("text").strip(),
                title=passage.get("title") or None,
                id=None if identifier is None else str(identifier),
                score=passage.real("score", None),
                metadata=passage.rest("text", "title", "id", "score"),
            )
        )
    return tuple(passages)


def _has_contexts(row: Row) -> bool:
    return row.get("ctxs", "top_contexts") is not None


def _self_rag(row: Row) -> Iterator[Question]:
    """A row of Self-RAG's files (Asai et al., arXiv 2310.11511).

    A claim of PubHealth has two choices, true and false. Without ``answers``, its ``label`` is read. The branch for
    PubHealth is written to the published schema, the fields that Self-RAG's code reads; no genuine row was at hand.
    """
    if row.get("answers") is not None:
        answers = row.answers("answers")
    else:
        label = row.text("label")
        answers = (_VERDICTS.get(label.upper(), label.lower()),)
    verdict = answers[0].lower() in ("true", "false") and row.get("claim") is not None
    yield Question(
        row.name("id", "question_id"),
        row.text("question", "claim"),
        tuple(answer.lower() for answer in answers) if verdict else answers,
        contexts(row),
        choices=("true", "false") if verdict else (),
        correct=(("true", "false").index(answers[0].lower()),) if verdict else (),
        source="self-rag",
        metadata=row.rest("id", "question", "answers", "ctxs", "top_contexts"),
    )


SELF_RAG = Format(
    name="self-rag",
    expects="rows with 'question' (PubHealth: 'claim'), 'answers' and 'ctxs' (each with 'title' and 'text'), as "
    "Self-RAG publishes TriviaQA, PopQA and PubHealth, and as DPR and Contriever write what they retrieve",
    recognises=lambda row: (
        not _is_lost(row)
        and "choices" not in row
        and (("question" in row and "answers" in row) or ("claim" in row and "label" in row))
        and any(key in row for key in ("ctxs", "top_contexts", "question_id"))
    ),
    read=_self_rag,
)


def _is_lost(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("ctxs"), list):
        return False
    return "nq_annotated_gold" in row or any(
        "isgold" in passage for passage in row["ctxs"] if isinstance(passage, dict)
    )


def _lost_in_the_middle(row: Row) -> Iterator[Question]:
    """A row of "Lost in the Middle" (Liu et al., arXiv 2307.03172).

    It is written to the published schema, the fields that the authors' README lists; no genuine row was at hand.
    """
    passages = contexts(row)
    gold = tuple(i for i, passage in enumerate(passages) if passage.metadata.get("isgold"))
    if not gold:
        raise row.wrong("one of 'ctxs' with 'isgold': true")
    yield Question(
        row.name("id"),
        row.text("question"),
        row.answers("answers"),
        passages,
        gold,
        source="lost-in-the-middle",
        metadata=row.rest("id", "question", "answers", "ctxs"),
    )


LOST_IN_THE_MIDDLE = Format(
    name="lost-in-the-middle",
    expects="rows with 'question', 'answers' and 'ctxs', of which one has 'isgold': true",
    recognises=lambda row: _is_lost(row) and "question" in row,
    read=_lost_in_the_middle,
)


def _nq_open(row: Row) -> Iterator[Question]:
    yield Question(
        row.name("id"),
        row.text("question"),
        row.answers("answer"),
        source="nq-open",
        metadata=row.rest("question", "answer"),
    )


NQ_OPEN = Format(
    name="nq-open",
    expects="rows with 'question' and 'answer' (a list of texts), without passages",
    recognises=lambda row: (
        "question" in row
        and isinstance(row.get("answer"), list)
        and not {"options", "context", "ctxs", "text"} & set(row)
    ),
    read=_nq_open,
)


def _popqa(row: Row) -> Iterator[Question]:
    try:
        possible = json.loads(row.text("possible_answers"))
    except json.JSONDecodeError as error:
        raise row.wrong(f"'possible_answers' to be a JSON list in a text ({error})") from error
    answers = Row({"possible_answers": possible}, row.number, row.where, row.path).answers("possible_answers")
    paragraphs = row.rows("paragraphs") if row.get("paragraphs") else []
    yield Question(
        row.name("id"),
        row.text("question"),
        answers,
        tuple(Passage(paragraph.text("text"), title=paragraph.get("title")) for paragraph in paragraphs),
        tuple(i for i, paragraph in enumerate(paragraphs) if paragraph.get("is_supporting")),
        source="popqa",
        metadata=row.rest("id", "question", "possible_answers", "paragraphs"),
    )


POPQA = Format(
    name="popqa",
    expects="rows with 'question' and 'possible_answers' (a JSON list written as a text), tab-separated or JSON; "
    "HippoRAG's copy adds 'paragraphs'",
    recognises=has("question", "possible_answers"),
    read=_popqa,
)


def _flashrag(row: Row) -> Iterator[Question]:
    yield Question(
        row.name("id"),
        row.text("question"),
        row.answers("golden_answers"),
        source="flashrag",
        metadata=row.row("metadata").values if row.get("metadata") else {},
    )


FLASHRAG = Format(
    name="flashrag",
    expects="rows with 'question' and 'golden_answers', without passages, as FlashRAG publishes many data sets",
    recognises=has("question", "golden_answers"),
    read=_flashrag,
)
