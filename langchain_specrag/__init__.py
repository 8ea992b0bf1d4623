"""Speculative RAG and RAPID as LangChain components.

    >>> from langchain_specrag import create_speculative_rag_chain
    >>> chain = create_speculative_rag_chain(retriever, drafter=model)  # doctest: +SKIP
    >>> chain.invoke({"input": "who discovered radium"})["answer"]  # doctest: +SKIP

This package converts types, passes settings on and forwards callbacks. All computing is done in ``specrag``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from langchain_specrag.chain import SpeculativeRAGRunnable, create_speculative_rag_chain
from langchain_specrag.compressor import MultiPerspectiveCompressor
from langchain_specrag.embeddings import SpecRAGEmbeddings
from langchain_specrag.retriever import MultiPerspectiveRetriever
from langchain_specrag.tool import SpeculativeRAGTool

if TYPE_CHECKING:
    from langchain_specrag.chat import ChatRapid, RapidLLM

__all__ = [
    "ChatRapid",
    "MultiPerspectiveCompressor",
    "MultiPerspectiveRetriever",
    "RapidLLM",
    "SpecRAGEmbeddings",
    "SpeculativeRAGRunnable",
    "SpeculativeRAGTool",
    "create_speculative_rag_chain",
]


def __getattr__(name: str) -> Any:
    """RAPID runs in this process, so torch is loaded only when one of its classes is asked for."""
    if name not in ("ChatRapid", "RapidLLM"):
        raise AttributeError(f"module 'langchain_specrag' has no attribute {name!r}")
    return getattr(importlib.import_module("langchain_specrag.chat"), name)
