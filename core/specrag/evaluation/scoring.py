"""Whether an answer to a question is right, by the measure that fits the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import contains_answer, exact_match, f1, right_choice, rouge_l
from specrag.evaluation.records import Question, require

#: An answer with more words than this is a reference, such as a summary: no system repeats it word by word.
REFERENCE_WORDS = 20


def check_questions(questions: Sequence[Question], *, passages: bool = True) -> None:
    """Check, before anything is computed, that answers to all ``questions`` can be judged.

    Raises:
        InvalidInputError: There are no questions; one has neither answers nor choices with the right one marked and is
            not unanswerable; two have one id; or, with ``passages``, one has none.
    """
    require(questions, passages=passages)
    open_ended = [question for question in questions if not question.choices]
    if open_ended:
        require(open_ended, answers=True)
    if len(open_ended) < len(questions):
        require([question for question in questions if question.choices], choices=True)
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InvalidInputError(f"two questions have the id {twice!r}: each needs its own")


def asked_text(question: Question) -> str:
    """The question as a system is asked it: with its choices under their letters, where it has any."""
    if not question.choices:
        return question.question
    choices = (f"{label}. {text}" for label, text in zip(question.labels, question.choices, strict=True))
    return "\n".join([question.question, *choices])


def right_by(question: Question) -> Callable[[str], bool]:
    """Whether a text answers ``question``: it chooses the right choice, or contains one of the answers.

    No text answers a question that is unanswerable; the right reaction is to abstain.
    """
    if question.choices:
        return lambda text: right_choice(text, question.choices, question.correct)
    return lambda text: contains_answer(text, question.answers)


def measured(question: Question, text: str, *, abstained: bool) -> tuple[bool, dict[str, float]]:
    """Whether the answer ``text`` is right, and further measures by name, each in [0, 1].

    "contains", "exact_match" and "f1" for open questions, "choice" for multiple choice. "rouge_l" where the answers are
    references and ``rouge-score`` (the extra ``evaluation``) is installed. To abstain is right on an unanswerable
    question alone.
    """
    shown = "" if abstained else text
    right = abstained if question.unanswerable else not abstained and right_by(question)(text)
    if question.choices:
        return right, {"choice": float(right)}
    metrics = {"contains": float(right), "exact_match": float(exact_match(shown, question.answers))}
    metrics["f1"] = f1(shown, question.answers)
    if has_reference(question) and find_spec("rouge_score") is not None:
        metrics["rouge_l"] = rouge_l(shown, question.answers, variant="rougeLsum")
    return right, metrics


def has_reference(question: Question) -> bool:
    """Whether its answers are references (a summary, a reply): then "rouge_l" tells more than whether it is "right"."""
    lengths = [len(answer.split()) for answer in question.answers]
    return not question.choices and bool(lengths) and min(lengths) > REFERENCE_WORDS
