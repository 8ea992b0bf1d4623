"""The settings of a component: unknown ones are named, and a copy with other settings is built anew.

What a component made from its settings is not what the copy needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, model_validator
from typing_extensions import Self

from specrag._fields import check_settings


class KnownSettings(BaseModel):
    """A model that lists its settings where it is given one that it does not have."""

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            check_settings(cls, given, "langchain_specrag")
        return given


class Rebuilt(KnownSettings):
    """A model whose ``model_copy(update=...)`` checks the new settings and makes all that depends on them."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; with ``update``, one that is built with the changed settings."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | dict(update))
