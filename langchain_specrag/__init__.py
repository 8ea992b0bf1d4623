"""Speculative RAG and RAPID as LangChain components.

    >>> from langchain_specrag import create_speculative_rag_chain
    >>> chain = create_speculative_rag_chain(retriever, drafter=model)  # doctest: +SKIP
    >>> chain.invoke({"input": "who discovered radium"})["answer"]  # doctest: +SKIP

Conversion, configuration and callbacks: what is computed is computed in ``specrag``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from langchain_specrag.chain import MultiPerspectiveRetriever, SpeculativeRAG, create_speculative_rag_chain
from langchain_specrag.tool import SpeculativeRAGTool

if TYPE_CHECKING:
    from langchain_specrag.chat import ChatRapid, RapidLLM

__all__ = [
    "ChatRapid",
    "MultiPerspectiveRetriever",
    "RapidLLM",
    "SpeculativeRAG",
    "SpeculativeRAGTool",
    "create_speculative_rag_chain",
]


def __getattr__(name: str) -> Any:
    """RAPID runs in this process: torch is loaded when it is asked for."""
    if name not in ("ChatRapid", "RapidLLM"):
        raise AttributeError(f"module 'langchain_specrag' has no attribute {name!r}")
    return getattr(importlib.import_module("langchain_specrag.chat"), name)
