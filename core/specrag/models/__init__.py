"""What a drafter or a verifier runs on. Backends load when first used: a client of a server needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Sampling,
    Score,
    Segment,
    Stage,
    Turn,
)

# Not lazy: the function shares its module's name, and importing the module later would put it in the way.
from specrag.models.bundled import bundled

if TYPE_CHECKING:
    from specrag.models.openai import OpenAILM
    from specrag.models.transformers import TransformersLM

_HOMES = {
    "TransformersLM": "specrag.models.transformers",
    "OpenAILM": "specrag.models.openai",
}
__all__ = [
    "Capabilities",
    "Completion",
    "GeneratedText",
    "GenerationRequest",
    "LanguageModel",
    "OpenAILM",
    "Sampling",
    "Score",
    "Segment",
    "Stage",
    "TransformersLM",
    "Turn",
    "bundled",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specrag.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
