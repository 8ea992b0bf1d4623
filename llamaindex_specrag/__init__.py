"""Speculative RAG and RAPID as LlamaIndex components.

    >>> from llamaindex_specrag import SpeculativeRAGQueryEngine
    >>> engine = SpeculativeRAGQueryEngine.from_args(index.as_retriever(similarity_top_k=10))  # doctest: +SKIP
    >>> str(engine.query("who discovered radium"))  # doctest: +SKIP

This package converts types, passes settings on and reports spans and events. All computing is done in ``specrag``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llamaindex_specrag.embeddings import SpecRAGEmbedding
from llamaindex_specrag.postprocessor import MultiPerspectivePostprocessor
from llamaindex_specrag.query_engine import SpeculativeRAGQueryEngine, SpeculativeSynthesizer

if TYPE_CHECKING:
    from llamaindex_specrag.llm import RapidLLM

__all__ = [
    "MultiPerspectivePostprocessor",
    "RapidLLM",
    "SpecRAGEmbedding",
    "SpeculativeRAGQueryEngine",
    "SpeculativeSynthesizer",
]


def __getattr__(name: str) -> Any:
    """RAPID runs in this process, so torch is loaded only when its class is asked for."""
    if name != "RapidLLM":
        raise AttributeError(f"module 'llamaindex_specrag' has no attribute {name!r}")
    return importlib.import_module("llamaindex_specrag.llm").RapidLLM
