"""A passage's fields out of what callers have: mappings, rows of tables, documents of frameworks.

What a caller gives as a field is checked. What merely stands in the metadata under a name that we know is taken when it
is of use, and otherwise left there. What tables write where there is nothing (``None``, NaN, pandas' NA) is missing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from inspect import get_annotations
from numbers import Real
from typing import Any

import numpy as np

from specrag.errors import InvalidInputError, a

#: The keys under which retrievers leave a similarity in a document's metadata; the first number counts.
_SCORE_KEYS = ("score", "similarity", "similarity_score", "relevance_score")
_PASSAGE_KEYS = ("text", "page_content", "title", "id", "score", "embedding", "metadata")


def missing(value: Any) -> bool:
    """Whether ``value`` stands for nothing: ``None``, NaN, or pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and math.isnan(value)


def json_kind(value: Any) -> str:
    """What a value is called that was read from JSON: "null", "a number", "an object", ..."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def text_of(value: Any, name: str) -> str | None:
    """A short text such as a title or an id: a string, or a number as one; ``None`` when it is missing or blank.

    Raises:
        InvalidInputError: It is something else.
    """
    if missing(value):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Real) and not isinstance(value, bool | np.bool_):
        return str(value)
    if type(value).__name__ == "UUID":
        return str(value)
    raise InvalidInputError(f"{name} must be a text, got {a(value)}")


def number_of(value: Any, name: str) -> float | None:
    """A number, or ``None`` when it is missing.

    Raises:
        InvalidInputError: It is something else.
    """
    if missing(value):
        return None
    if isinstance(value, Real) and not isinstance(value, bool | np.bool_):
        return float(value)
    raise InvalidInputError(f"{name} must be a number, got {a(value)}")


def check_settings(component: Any, given: Iterable[Any], package: str) -> None:
    """Whether a framework's component has each of the ``given`` settings.

    Args:
        component: A class with pydantic's ``model_fields``.
        package: Its fields that are declared in this package are listed, those of the framework are not.

    Raises:
        InvalidInputError: One is unknown. The message lists the known ones, and names the one that is most like it.
    """
    known = {*component.model_fields, *(field.alias for field in component.model_fields.values() if field.alias)}
    if not (unknown := [name for name in map(str, given) if name not in known]):
        return
    own = {name for part in component.__mro__ if part.__module__.startswith(package) for name in get_annotations(part)}
    near = [likely[0] for name in unknown if (likely := difflib.get_close_matches(name, known, n=1))]
    meant = f"; did you mean {', '.join(near)}?" if near else ""
    listed = ", ".join(name for name in component.model_fields if name in own)
    raise InvalidInputError(f"unknown settings {', '.join(unknown)}: {component.__name__} has {listed}{meant}")


def check_numbers(**values: Any) -> None:
    """Whether each value is a number or ``None``; a text that spells one is none.

    Raises:
        InvalidInputError: One is something else. The message names it.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, Real) or isinstance(value, bool | np.bool_)):
            raise InvalidInputError(f"{name} must be a number, got {value!r}")


def check_whole_numbers(least: int | None = None, **values: Any) -> None:
    """Whether each value is a whole number, of at least ``least``; ``True`` is none.

    Raises:
        InvalidInputError: One is something else. The message names it.
    """
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise InvalidInputError(f"{name} must be a whole number, got {value!r}")
        if least is not None and value < least:
            raise InvalidInputError(f"{name} must be at least {least}, got {value}")


def vector_of(value: Any, name: str) -> np.ndarray | None:  # [dim], float32
    """A vector, or ``None`` when it is missing. Who uses it sees whether all of it are numbers.

    Raises:
        InvalidInputError: It is something else.
    """
    if missing(value):
        return None
    try:
        vector = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} must be a vector of numbers: {error}") from error
    if isinstance(value, str | bytes) or vector.ndim != 1:
        raise InvalidInputError(f"{name} must have one dimension, got shape {vector.shape}")
    return vector


def mapping_of(value: Any) -> Mapping[Any, Any]:
    """Metadata: a mapping; an empty one when it is missing.

    Raises:
        InvalidInputError: It is something else.
    """
    if missing(value):
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"metadata must be a mapping, got {a(value)}")
    return value


def passage_fields(given: dict[str, Any]) -> dict[str, Any]:
    """``Passage``'s fields out of a mapping's items.

    Raises:
        InvalidInputError: It has no text, another key, or a field of another type.
    """
    if "page_content" in given:
        given.setdefault("text", given.pop("page_content"))
        given.pop("type", None)  # of a Document that was written as a mapping
    if unknown := [str(key) for key in given if key not in _PASSAGE_KEYS]:
        raise InvalidInputError(
            f"unknown key {', '.join(unknown)}: a passage has {', '.join(_PASSAGE_KEYS)}; "
            "what else the citations shall carry goes into 'metadata'"
        )
    if "text" not in given:
        raise InvalidInputError(f"no 'text' in a mapping with {', '.join(map(str, given)) or 'no keys'}")
    metadata = mapping_of(given.get("metadata"))
    title = text_of(given.get("title"), "title")
    score = number_of(given.get("score"), "score")
    embedding = given.get("embedding")
    if title is None:
        title = title_in(metadata)
    if score is None:
        score = next(
            (found for name in _SCORE_KEYS if (found := _if_of_use(number_of, metadata, name)) is not None), None
        )
    if missing(embedding):
        embedding = embedding_in(metadata)
    return {
        "text": given["text"],
        "title": title,
        "id": text_of(given.get("id"), "id"),
        "score": score,
        "embedding": embedding,
        "metadata": metadata,
    }


def title_in(metadata: Mapping[Any, Any]) -> str | None:
    """The title that stands in ``metadata``: a text."""
    title = metadata.get("title")
    return text_of(title, "title") if isinstance(title, str) else None


def embedding_in(metadata: Mapping[Any, Any]) -> np.ndarray | None:
    """The embedding that stands in ``metadata``: a vector of finite numbers."""
    found: np.ndarray | None = _if_of_use(vector_of, metadata, "embedding")
    return found if found is not None and len(found) and np.isfinite(found).all() else None


def _if_of_use(read: Any, metadata: Mapping[Any, Any], name: str) -> Any:
    try:
        return read(metadata.get(name), name)
    except InvalidInputError:
        return None
