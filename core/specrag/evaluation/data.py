"""Questions with passages: the JSON-lines format, and contexts made from a corpus.

A row: ``id``, ``question``, ``answers`` (any is right), and either ``passages`` (a list of ``title`` and
``text``) or the one passage that answers, as ``title`` and ``text``. ``weight`` (1 by default) matters to training alone.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from specrag.errors import InvalidInputError
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.text import passage_text


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Attributes:
        gold: The positions in ``passages`` that answer it, where known.
        weight: How often a round of training shows it, on average.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    gold: tuple[int, ...] = ()
    weight: float = 1.0


def load_questions(path: str | Path) -> list[Question]:
    """Read a JSON-lines file of questions.

    Raises:
        InvalidInputError: A line is not a question; the message names it.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            listed = row.get("passages") or [{"title": row.get("title"), "text": row["text"]}]
            supporting = set(row.get("supporting_titles", ()))
            gold = tuple(i for i, p in enumerate(listed) if p.get("title") in supporting)
            if "passages" not in row:
                gold = (0,)
            questions.append(
                Question(
                    id=str(row.get("id", number)),
                    question=row["question"],
                    answers=tuple(row["answers"]),
                    passages=tuple(Passage(p["text"], title=p.get("title")) for p in listed),
                    gold=tuple(row.get("gold", gold)),
                    weight=float(row.get("weight", 1.0)),
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"{path}, line {number}: not a question ({error})") from error
    return questions


def save_questions(questions: Sequence[Question], path: str | Path) -> None:
    """Write what ``load_questions`` reads."""
    rows = (
        {
            "id": q.id,
            "question": q.question,
            "answers": q.answers,
            "gold": q.gold,
            "passages": [{"title": p.title, "text": p.text} for p in q.passages],
        }
        for q in questions
    )
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


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
        answers = [answer.casefold() for answer in question.answers]
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
