"""Models and calibrations as users give them to an adapter: as objects, names and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel, Reader
from specrag.models.bundled import DRAFTING, drafting_model
from specrag.speculative.confidence import Calibration


def model_of(
    given: Any, role: str, wrapped: Callable[[Any], LanguageModel | None], wrappable: str
) -> LanguageModel | Reader:
    """A core model as it is; a framework's model, wrapped; a bundled name or the folder of a trained reader, loaded.

    Args:
        given: What the user gave.
        role: What the model is for: ``"drafter"``.
        wrapped: Wraps a model of the adapter's framework; ``None`` for anything else.
        wrappable: What ``wrapped`` takes: ``"a LlamaIndex LLM"``.

    Raises:
        InvalidInputError: It is none of these.
        ModelNotFoundError: It is a name, and the model is not on this machine.
    """
    if isinstance(given, LanguageModel | Reader):
        return given
    if (model := wrapped(given)) is not None:
        return model
    named = isinstance(given, str | Path)
    if named and (loaded := drafting_model(given)) is not None:
        return loaded
    raise InvalidInputError(
        f"{role} must be a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...)), a SpanReader, the name of a "
        f"bundled model ({', '.join(DRAFTING)}), the folder of a trained reader, or {wrappable}; "
        f"got {repr(given) if named else kind_of(given)}"
    )


def drafters_of(
    given: Any, convert: Callable[[Any, str], LanguageModel | Reader]
) -> LanguageModel | Reader | tuple[LanguageModel | Reader, ...]:
    """One drafter or a list of them, each made by ``convert(one, its role)``."""
    if isinstance(given, list | tuple):
        return tuple(convert(one, f"drafter[{i}]") for i, one in enumerate(given))
    return convert(given, "drafter")


def calibration_of(given: Any) -> Any:
    """A calibration from its file; anything else as it is, to be checked by the core."""
    if isinstance(given, Path) or (isinstance(given, str) and given != "auto"):
        return Calibration.load(given)
    return given
