"""What drafters, verifiers and embedders run on.

Backends load when they are first used: a client of a server needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Reader,
    Sampling,
    Score,
    Segment,
    Stage,
    Turn,
)

# Not lazy: the function has its module's name, and a later import of the module would take its place.
from specrag.models.bundled import bundled, load_reader

if TYPE_CHECKING:
    from specrag.models.embedders import Embedder, OpenAIEmbedder, TransformersEmbedder
    from specrag.models.openai import OpenAILM
    from specrag.models.reader import SpanReader
    from specrag.models.transformers import TransformersLM

_HOMES = {
    "Embedder": "specrag.models.embedders",
    "OpenAIEmbedder": "specrag.models.embedders",
    "OpenAILM": "specrag.models.openai",
    "SpanReader": "specrag.models.reader",
    "TransformersEmbedder": "specrag.models.embedders",
    "TransformersLM": "specrag.models.transformers",
}
__all__ = [
    "Capabilities",
    "Completion",
    "Embedder",
    "GeneratedText",
    "GenerationRequest",
    "LanguageModel",
    "OpenAIEmbedder",
    "OpenAILM",
    "Reader",
    "Sampling",
    "Score",
    "Segment",
    "SpanReader",
    "Stage",
    "TransformersEmbedder",
    "TransformersLM",
    "Turn",
    "bundled",
    "load_reader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specrag.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
