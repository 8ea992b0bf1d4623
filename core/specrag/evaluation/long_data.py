"""Questions over long documents as a run asks them: each alone, or turn by turn in a dialogue.

A question brings its document (``context``), or its document is made of passages (``DocumentPlan``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specrag._fields import check_whole_numbers
from specrag.errors import InvalidInputError
from specrag.evaluation.long_documents import CountTokens, LongDocuments
from specrag.evaluation.records import Question, require
from specrag.evaluation.scoring import asked_text, check_questions
from specrag.schema import Passage

# Tokens that a question, the instruction and the chat template take beside a document; and of each turn of a dialogue.
_AROUND, _PER_TURN = 152, 60
# How many of them are the instruction and the template.
_TEMPLATE = 24


@dataclass(frozen=True, kw_only=True)
class DocumentPlan:
    """How documents are made of passages.

    Attributes:
        tokens: The lengths, each of a document with what is asked about it and the answers. Several: each question is
            asked about a document of each length.
        depth: Where the evidence stands, from 0 (the beginning) to 1; ``None``: anywhere, by chance.
        share: How many questions have one document, which is read once for all of them.
        seed: Chooses the passages and the depths.

    Raises:
        InvalidInputError: A value is out of range, there is no length, or one is there twice.
    """

    tokens: tuple[int, ...]
    depth: float | None = None
    share: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_numbers(least=1, share=self.share, **{f"tokens[{i}]": given for i, given in enumerate(self.tokens)})
        if not self.tokens or len(set(self.tokens)) < len(self.tokens):
            raise InvalidInputError(f"expected lengths of documents in tokens, each once; got {list(self.tokens)}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InvalidInputError(f"depth must be in [0, 1], or None for a random one; got {self.depth}")


def check_long_questions(questions: Sequence[Question], plan: DocumentPlan | None, *, max_tokens: int = 0) -> None:
    """Check, before a model is loaded, that every question has a document, or evidence to put into one, and answers.

    A dialogue needs no evidence: its document may hold other texts alone.

    Args:
        max_tokens: Of an answer. ``made_documents`` checks again, with the lengths of the questions.

    Raises:
        InvalidInputError: Something is missing, and the message says which question lacks it; or the documents of
            ``plan`` are too short in any case.
    """
    require(questions)
    check_questions([turn for question in questions for turn in turns_of(question)], passages=False)
    if plan is None:
        lacking = [question.id for question in questions if not question.context]
        missing = "a document (`context`, or the path of a file under `document`)"
        remedy = "give them one, or have documents made of the passages: --documents TOKENS"
    else:
        lacking = [question.id for question in questions if not question.gold and not question.turns]
        missing = "evidence to put into a document: passages, and `gold`, the positions of those that answer"
        remedy = "mark it, or leave --documents out where the questions have documents"
    if lacking:
        raise InvalidInputError(
            f"{len(lacking)} of {len(questions)} questions lack {missing}; the first is {lacking[0]!r}: {remedy}"
        )
    for tokens in () if plan is None else plan.tokens:
        _room(tokens, questions, lambda text: 0, max_tokens, 1)


def turns_of(question: Question) -> list[Question]:
    """A dialogue as one question per turn, over the same document; any other question as it is.

    Raises:
        InvalidInputError: A turn has neither answers nor a reply to compare with.
    """
    if not question.turns:
        return [question]
    asked = []
    for number, turn in enumerate(question.turns, 1):
        answers = turn.answers or (turn.reply,)
        if not any(answers):
            raise InvalidInputError(f"turn {number} of the dialogue {question.id!r} has neither answers nor a reply")
        alone = replace(question, id=f"{question.id}/{number}", question=turn.question, answers=answers, turns=())
        asked.append(alone)
    return asked


def made_documents(
    questions: Sequence[Question],
    corpus: Sequence[Passage],
    count_tokens: CountTokens,
    plan: DocumentPlan,
    *,
    max_tokens: int,
    turns: int = 1,
) -> list[list[Question]]:
    """The questions with documents made of passages, in groups that share a document.

    Args:
        questions: With ``gold`` passages, or dialogues.
        corpus: Fills the documents.
        count_tokens: The number of tokens of a text, as the model that will read it counts them.
        plan: How. With several lengths, "@" and the length stand at the end of each id.
        max_tokens: Of an answer: the document leaves room for it.
        turns: How many of the questions follow one another in one dialogue, which the document leaves room for.

    Raises:
        InvalidInputError: The passages are too few for a document, or the evidence is too long.
    """
    made = []
    for tokens in plan.tokens:
        room = _room(tokens, questions, count_tokens, max_tokens, turns)
        documents = LongDocuments(corpus, count_tokens, room, seed=plan.seed)
        for at in range(0, len(questions), plan.share):
            group = list(questions[at : at + plan.share])
            depths = None if plan.depth is None else [plan.depth] * len(group)
            if len(plan.tokens) > 1:
                group = [replace(question, id=f"{question.id}@{tokens}") for question in group]
            made.append(documents.share(group, depths))
    return made


def filler_of(questions: Sequence[Question]) -> list[Passage]:
    """What fills the documents of other questions: their passages; of a dialogue without any, what is said in it."""
    found: list[Passage] = []
    for question in questions:
        said = [line for turn in question.turns for line in (f"User: {turn.question}", f"Assistant: {turn.reply}")]
        found += question.passages or ([Passage("\n".join(said))] if said else [])
    return found


def _room(tokens: int, questions: Sequence[Question], count_tokens: CountTokens, max_tokens: int, turns: int) -> int:
    """What a document may have of ``tokens``: the rest is for the longest question and its answer.

    Raises:
        InvalidInputError: Nothing is left.
    """
    around = max(_around(question, count_tokens, max_tokens, turns) for question in questions)
    if tokens <= around:
        raise InvalidInputError(
            f"{tokens} tokens leave no room for a document beside the longest question and answer: make documents of "
            f"more than {around} tokens"
        )
    return tokens - around


def _around(question: Question, count_tokens: CountTokens, max_tokens: int, turns: int) -> int:
    """Tokens that what is asked about a document, and the answers to it, may take."""
    asked = [count_tokens(asked_text(turn)) + _TEMPLATE for turn in turns_of(question)]
    if turns == 1 and len(asked) == 1:
        return max_tokens + max(_AROUND, *asked)
    return turns * sum(max_tokens + max(_PER_TURN, tokens) for tokens in asked)
