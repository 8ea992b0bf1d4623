"""How every part of the package writes passages and compares answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from specrag._unicode import well_formed
from specrag.errors import InvalidInputError, a
from specrag.schema import Passage

# A full stop after an initial or a title ends no sentence.
_ABBREVIATED = (
    r"(?<!\b[A-Zc]\.)(?<!\b(?:Dr|Mr|Ms|St|Jr|Sr|No|vs|ca|Lt)\.)(?<!\b(?:Mrs|Sgt|Gen|Sen|Rep|Col)\.)(?<!\bProf\.)"
)
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_ABBREVIATED}[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
_VERDICTS = frozenset({"yes", "no", "true", "false"})
#: A rationale that is copied has at most so many words: with its title 37 tokens in the median, 68 in one of a hundred.
MAX_EVIDENCE_WORDS = 26


def passage_text(passage: Passage) -> str:
    """A passage as models and embedders read it: the title, then the text."""
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


def normalize_answer(text: str) -> str:
    """``text`` without case, punctuation, articles and extra spaces; close to SQuAD's, see ``evaluation.metrics``."""
    text = re.sub(r"[^\w\s]", " ", text.casefold())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def yes_or_no(answers: Sequence[str]) -> str | None:
    """``"Yes"`` or ``"No"`` where all ``answers`` say that and nothing else; ``None`` for any other answers."""
    said = {normalize_answer(answer) for answer in answers}
    return said.pop().capitalize() if len(said) == 1 and said <= {"yes", "no"} else None


def spelled(answers: Sequence[str]) -> list[str]:
    """Those ``answers``, in lower case, that a passage gives away by containing them.

    Yes, no, true and false are left out: nearly every passage contains such words, or words with their letters.
    """
    return [answer.casefold() for answer in answers if normalize_answer(answer) not in _VERDICTS]


def whole_words(phrase: str) -> re.Pattern[str] | None:
    """What finds ``phrase`` as whole words in any case, whatever stands between them. ``None``: it has no words."""
    pattern = r"\W+".join(re.findall(r"\w+", phrase))
    return re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE) if pattern else None


def sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of ``text`` as (first character, one past the last), in order, without white space around them."""
    bounds, start = [], 0
    for end, following in [*((m.start(), m.end()) for m in _SENTENCE_END.finditer(text)), (len(text), len(text))]:
        inside = text[start:end]
        if inside.strip():
            left = len(inside) - len(inside.lstrip())
            bounds.append((start + left, start + len(inside.rstrip())))
        start = following
    return bounds


def evidence(passage: Passage, start: int, end: int, max_words: int = MAX_EVIDENCE_WORDS) -> str:
    """The sentence of ``passage.text`` that holds the characters ``start`` to ``end``, after the passage's title.

    A sentence of more than ``max_words`` words is cut around them.
    """
    first, last = next(((a, b) for a, b in sentences(passage.text) if a <= start < b), (0, len(passage.text)))
    words = [match.span() for match in re.finditer(r"\S+", passage.text[first:last])]
    if len(words) > max_words:
        before = sum(word_end <= start - first for _, word_end in words)
        held = sum(word_start < end - first for word_start, _ in words) - before
        stop = min(len(words), before + held + 4)
        begin = max(0, min(before, stop - max_words))
        if begin == 0:
            stop = min(len(words), max(stop, max_words))
        words = words[begin:stop]
    sentence = " ".join(passage.text[first + a : first + b] for a, b in words)
    return f"{passage.title}: {sentence}" if passage.title else sentence


def question_of(value: Any) -> str:
    """A question without half characters.

    Raises:
        InvalidInputError: It is empty, or no text.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"the question must be a text, got {a(value)}")
    if not value.strip():
        raise InvalidInputError("the question is empty")
    return well_formed(value)


def check_texts(values: Any, name: str = "texts") -> None:
    """Whether ``values`` is a list of texts; a single text would be read letter by letter.

    Raises:
        InvalidInputError: It is something else.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise InvalidInputError(f"{name} must be a list of texts, got {a(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise InvalidInputError(f"{name}[{i}] must be a text, got {a(value)}")
