"""What is evaluated: a question with its answers, and the passages, choices, document or dialogue that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specrag._unicode import well_formed_values
from specrag.errors import InvalidInputError, kind_of
from specrag.schema import Passage


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
        question: What the user says.
        reply: The reply that the data set gives, where it gives one.
        answers: Texts of which any is right, where the data set has short answers.
    """

    question: str
    reply: str = ""
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("question", "reply", "answers"):
            object.__setattr__(self, name, well_formed_values(getattr(self, name)))


@dataclass(frozen=True)
class Question:
    """A question with its right answers, and what it is to be answered from.

    Attributes:
        id: Names the question in its data set.
        question: The question; for a dialogue, what the user says last.
        answers: Texts of which any is right. Empty when ``unanswerable``, and for a dialogue.
        passages: What a retriever found.
        gold: The positions in ``passages`` that answer it, where known.
        weight: How often a round of training shows it, on average.
        choices: The texts to choose from, in the order in which they are shown as A, B, C, ...
        correct: The positions in ``choices`` that are right.
        context: One long document that holds the answer.
        turns: The turns of a dialogue, in order.
        unanswerable: The passages do not answer it, and the right reaction is to abstain.
        source: The data set or format that it comes from, where known.
        metadata: What else the data set says about it. Carried along, never interpreted.

    Raises:
        InvalidInputError: A field has the wrong type, or a position is out of range.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    gold: tuple[int, ...] = ()
    weight: float = 1.0
    choices: tuple[str, ...] = ()
    correct: tuple[int, ...] = ()
    context: str = ""
    turns: tuple[Turn, ...] = ()
    unanswerable: bool = False
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("question", self.question), ("context", self.context)):
            if not isinstance(value, str):
                raise InvalidInputError(f"question {self.id!r}: {name} must be a text, got {kind_of(value)}")
        for name in ("id", "question", "context", "answers", "choices", "source", "metadata"):
            object.__setattr__(self, name, well_formed_values(getattr(self, name)))
        if not self.question.strip():
            raise InvalidInputError(f"question {self.id!r}: the question is empty")
        for name, texts in (("answers", self.answers), ("choices", self.choices)):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise InvalidInputError(f"question {self.id!r}: {name} must be a tuple of texts, got {texts!r}")
        for name, positions, length in (
            ("gold", self.gold, len(self.passages)),
            ("correct", self.correct, len(self.choices)),
        ):
            if any(not isinstance(at, int) or not 0 <= at < length for at in positions):
                listed = "passages" if name == "gold" else "choices"
                raise InvalidInputError(
                    f"question {self.id!r}: {name} is {positions}, but there are {length} {listed} (positions from 0)"
                )
        if self.unanswerable and self.answers:
            raise InvalidInputError(f"question {self.id!r} is unanswerable and has answers: {self.answers}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The letters under which the choices are shown: A, B, C, ..."""
        return choice_labels(len(self.choices))


def choice_labels(count: int) -> tuple[str, ...]:
    """The first ``count`` capital letters.

    Raises:
        InvalidInputError: There are more choices than letters.
    """
    if count > 26:
        raise InvalidInputError(f"got {count} choices; at most 26 have a letter")
    return tuple(chr(ord("A") + i) for i in range(count))


def require(
    questions: Sequence[Question],
    *,
    answers: bool = False,
    passages: bool = False,
    choices: bool = False,
    context: bool = False,
    turns: bool = False,
) -> None:
    """Check, before anything is computed, that every question has what an evaluation needs.

    Args:
        questions: The data set.
        answers: Every question must have answers, or be unanswerable.
        passages: Every question must have passages.
        choices: Every question must have choices and say which is right.
        context: Every question must have a document.
        turns: Every question must be a dialogue.

    Raises:
        InvalidInputError: There are no questions, or some lack what is needed. The message names the first.
    """
    if not questions:
        raise InvalidInputError("the data set is empty: there is no question to evaluate")
    needs = (
        (answers, "answers", lambda q: bool(q.answers) or q.unanswerable),
        (passages, "passages (retrieve some for them first)", lambda q: bool(q.passages)),
        (choices, "choices with the right one marked", lambda q: bool(q.choices and q.correct)),
        (context, "a long document (`context`)", lambda q: bool(q.context)),
        (turns, "turns of a dialogue", lambda q: bool(q.turns)),
    )
    for needed, what, has in needs:
        lacking = [q.id for q in questions if needed and not has(q)]
        if lacking:
            raise InvalidInputError(
                f"{len(lacking)} of {len(questions)} questions lack {what}; the first is {lacking[0]!r}"
            )
