"""What the tests of the LangChain adapter share."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.tracers.base import BaseTracer

from langchain_specrag import create_speculative_rag_chain
from tests.fakes import HashEmbedder, first_passage_lm

QUESTION = {"input": "who discovered radium"}


class FixedRetriever(BaseRetriever):
    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def documents(count: int = 6) -> list[Document]:
    return [Document(f"passage {i}", id=str(i), metadata={"title": f"T{i}", "score": 1 - i / 10}) for i in range(count)]


def chain_of(drafter=None, **settings: Any):
    settings.setdefault("embedder", HashEmbedder())
    return create_speculative_rag_chain(
        FixedRetriever(documents=documents()), drafter or first_passage_lm(), **settings
    )


class CollectingTracer(BaseTracer):
    def __init__(self):
        super().__init__()
        self.roots = []

    def _persist_run(self, run):
        self.roots.append(run)
