"""The settings of a component: unknown ones are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, model_validator

from specrag._fields import check_settings


class KnownSettings(BaseModel):
    """A model that lists its settings where it is given one that it does not have."""

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            check_settings(cls, given, "llamaindex_specrag")
        return given
