"""specrag: retrieval-augmented generation that drafts with something cheap and verifies with something strong."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specrag.errors import SpecRAGError
    from specrag.models.base import Sampling
    from specrag.schema import Draft, Passage, SpeculativeAnswer, Verdict
    from specrag.speculative.pipeline import SpeculativeRAG
    from specrag.speculative.prompts import Prompts
    from specrag.speculative.verification import Scoring

__version__ = "0.1.0"

# Loaded when first used, so that `import specrag` costs nothing: torch alone takes seconds.
_HOMES = {
    "SpecRAGError": "specrag.errors",
    "Sampling": "specrag.models.base",
    "SpeculativeRAG": "specrag.speculative.pipeline",
    "Prompts": "specrag.speculative.prompts",
    "Draft": "specrag.schema",
    "Passage": "specrag.schema",
    "SpeculativeAnswer": "specrag.schema",
    "Verdict": "specrag.schema",
    "Scoring": "specrag.speculative.verification",
}
__all__ = [
    "Draft",
    "Passage",
    "Prompts",
    "Sampling",
    "Scoring",
    "SpecRAGError",
    "SpeculativeAnswer",
    "SpeculativeRAG",
    "Verdict",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specrag' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
