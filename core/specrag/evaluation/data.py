"""Questions with passages: specrag's own files, and contexts of misleading passages made from a corpus.

``Question`` is the record; ``load`` reads it from every known format, ``load_questions`` from specrag's own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from specrag._files import path_of, write_text
from specrag.evaluation.formats import FORMATS, formats, load
from specrag.evaluation.formats.own import to_row
from specrag.evaluation.records import Question, Turn, require
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.text import passage_text, spelled

__all__ = [
    "FORMATS",
    "Question",
    "Turn",
    "formats",
    "load",
    "load_questions",
    "require",
    "save_questions",
    "with_distractors",
    "with_retrieved",
]


def load_questions(path: str | Path) -> list[Question]:
    """Read a JSON-lines file of questions with passages, in specrag's own format.

    A row: ``id``, ``question``, ``answers`` (any is right), and either ``passages`` (a list of ``title`` and
    ``text``) or the one passage that answers, as ``title`` and ``text``. ``weight`` (1 by default) matters to
    training alone.

    Raises:
        InvalidInputError: A line is not a question, or has no passage; the message names it.
    """
    questions = load(path, "specrag")
    require(questions, passages=True)
    return questions


def save_questions(questions: Sequence[Question], path: str | Path) -> None:
    """Write what ``load`` reads as the format "specrag". The file appears whole or stays as it was.

    Raises:
        InvalidInputError: ``path`` is a folder.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    lines = (json.dumps(to_row(question), ensure_ascii=False) + "\n" for question in questions)
    write_text(path_of(path), "".join(lines))


def with_distractors(
    questions: Sequence[Question], corpus: Sequence[Passage], embedder: Embedder, count: int = 10
) -> list[Question]:
    """Each question's own passages and the nearest others of ``corpus`` that hold none of its answers.

    The passages are shuffled with a seed made from the question's id: what a retriever that often
    misranks would return.
    """
    texts = {passage_text(p): p for p in corpus}
    keys = list(texts)
    vectors = embedder.embed(keys)
    asked = embedder.embed([q.question for q in questions])
    made = []
    for question, order in zip(questions, np.argsort(-(asked @ vectors.T), axis=1), strict=True):
        own = {passage_text(p) for p in question.passages}
        answers = spelled(question.answers)
        others: list[Passage] = []
        for at in order:
            if len(own) + len(others) >= count:
                break
            key = keys[int(at)]
            if key not in own and not any(answer in key.casefold() for answer in answers):
                others.append(texts[key])
        passages = [*question.passages, *others]
        shuffled = np.random.default_rng(zlib.crc32(question.id.encode())).permutation(len(passages))
        gold = tuple(int(np.flatnonzero(shuffled == g)[0]) for g in question.gold)
        made.append(replace(question, passages=tuple(passages[int(i)] for i in shuffled), gold=gold))
    return made


def with_retrieved(questions: Sequence[Question], search: Callable[[str], Iterable[Passage]]) -> list[Question]:
    """Each question with the passages that ``search`` finds for it, in place of its own.

    Which of them answer is not known: ``gold`` is empty.
    """
    return [replace(question, passages=tuple(search(question.question)), gold=()) for question in questions]
