"""Copies with other settings are built anew: what a component made from its settings is not what the copy needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from typing_extensions import Self


class Rebuilt(BaseModel):
    """A model whose ``model_copy(update=...)`` checks the new settings and makes all that depends on them."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy; with ``update``, one that is built with the changed settings."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | dict(update))
