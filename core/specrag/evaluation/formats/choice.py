"""Closed questions: ARC-Challenge (multiple choice) and PubHealth (is a claim true?)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from specrag.evaluation.formats.base import Format, has
from specrag.evaluation.formats.retrieved import contexts
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question
from specrag.schema import Passage


def _arc(row: Row) -> Iterator[Question]:
    """A row of ARC (Clark et al., arXiv 1803.05457).

    A few questions have the labels 1, 2, 3, 4; a ``Question`` shows its choices as A, B, C, D in the same order.
    """
    if isinstance(row.get("question"), Mapping):  # the authors' own file
        asked = row.row("question")
        question = asked.text("stem")
        listed = [(choice.text("label"), choice.text("text")) for choice in asked.rows("choices")]
    else:  # Hugging Face and Self-RAG
        question = row.text("question")
        choices = row.row("choices")
        listed = list(zip(choices.texts("label"), choices.texts("text"), strict=False))
    labels = [label for label, _ in listed]
    key = row.text("answerKey")
    if key not in labels:
        raise row.wrong(f"'answerKey' to be one of the labels {labels}, got {key!r}")
    correct = labels.index(key)
    yield Question(
        row.name("id"),
        question,
        (listed[correct][1],),
        contexts(row),
        choices=tuple(text for _, text in listed),
        correct=(correct,),
        source="arc-challenge",
        metadata={"labels": labels},
    )


ARC_CHALLENGE = Format(
    name="arc-challenge",
    expects="rows with 'question', 'choices' ('text' and 'label') and 'answerKey', as ARC, Hugging Face and Self-RAG "
    "(which adds 'ctxs') publish them",
    recognises=has("question", "answerKey"),
    read=_arc,
)


_VERDICTS = ("true", "false", "unproven", "mixture")


def _pubhealth(row: Row) -> Iterator[Question]:
    """A row of PubHealth (Kotonya and Toni, arXiv 2010.09926).

    The passage is the article that the claim was checked in. Self-RAG's file, with retrieved passages, is ``self-rag``.
    """
    label = row.text("label").strip().lower()
    if label not in _VERDICTS:
        raise row.wrong(f"'label' to be one of {', '.join(_VERDICTS)}, got {label!r}")
    article = row.text("main_text").strip()
    yield Question(
        row.name("claim_id"),
        row.text("claim").strip(),
        (label,),
        (Passage(article),) if article else (),
        (0,) if article else (),
        choices=_VERDICTS,
        correct=(_VERDICTS.index(label),),
        source="pubhealth",
        metadata=row.rest("claim_id", "claim", "label", "main_text"),
    )


PUBHEALTH = Format(
    name="pubhealth",
    expects="tab-separated columns, among them 'claim_id', 'claim', 'main_text' and 'label' (true, false, unproven or "
    "mixture)",
    recognises=has("claim_id", "claim", "main_text", "label"),
    read=_pubhealth,
)


def correct_choice(row: Row, choices: tuple[str, ...], answer: Any) -> int:
    """The position of an answer that is given as a choice's text or as its letter.

    Raises:
        InvalidInputError: It is neither.
    """
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(choices):
        return ord(answer) - ord("A")
    raise row.wrong(f"the answer to be one of the {len(choices)} choices or its letter, got {answer!r}")
