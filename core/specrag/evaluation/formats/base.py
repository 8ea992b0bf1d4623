"""What a format is: a name, the rows that it expects, and a reader of one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question


@dataclass(frozen=True)
class Format:
    """A published format of questions.

    Attributes:
        name: What a caller names it.
        expects: The rows that it expects, in words, for messages.
        recognises: Whether the fields of a row are this format's.
        read: Makes the questions of one row: most often one, for SQuAD all those of an article.
    """

    name: str
    expects: str
    recognises: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Row], Iterable[Question]]


def has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row has all of these fields."""
    return lambda row: all(key in row for key in keys)
