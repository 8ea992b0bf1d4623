"""What the baselines check at construction."""

from __future__ import annotations

from typing import Any

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError
from specrag.models.base import LanguageModel
from specrag.speculative._roles import check_types
from specrag.speculative.prompts import Prompts


def checked_model(model: Any, prompts: Any, max_answer_tokens: Any) -> None:
    """Check what every system with a writing model has.

    Raises:
        InvalidInputError: One of the three is not what it should be.
    """
    check_types(
        model=(model, LanguageModel, "a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...))"),
        prompts=(prompts, Prompts | None, "a Prompts"),
    )
    check_count(max_answer_tokens=max_answer_tokens)


def check_count(**values: Any) -> None:
    """Check that each value is a whole number of at least 1.

    Raises:
        InvalidInputError: One is not.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_shares(**values: Any) -> None:
    """Check that each value is a number in [0, 1], or ``None``.

    Raises:
        InvalidInputError: One is not.
    """
    check_numbers(**values)
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise InvalidInputError(f"{name} must be in [0, 1], got {value}")


def texts_for(lm: LanguageModel, prompts: Prompts | None) -> Prompts:
    """``prompts``, or what ``lm`` was trained with, or the default."""
    return prompts or Prompts.trained_with(lm) or Prompts()
