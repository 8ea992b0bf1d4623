"""The LangChain retriever and the document compressor: one document of each perspective."""

from __future__ import annotations

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding

from langchain_specrag import MultiPerspectiveCompressor, MultiPerspectiveRetriever
from specrag.errors import InvalidInputError
from tests.fakes import HashEmbedder
from tests.langchain_parts import FixedRetriever, documents


async def test_the_retriever_keeps_one_document_per_perspective():
    vectors = {str(i): [1.0, 0.0] if i % 2 == 0 else [0.0, 1.0] for i in range(6)}
    retriever = MultiPerspectiveRetriever(
        retriever=FixedRetriever(documents=documents()), k=2, vector_store=lambda found: [vectors[d.id] for d in found]
    )
    assert [d.id for d in retriever.invoke("q")] == ["0", "1"]
    assert [d.id for d in await retriever.ainvoke("q", k=1)] == ["0"]
    assert len(retriever.invoke("q", k=9)) == 6
    with pytest.raises(InvalidInputError, match="at least 1"):
        retriever.invoke("q", k=0)


async def test_a_contextual_compression_retriever_takes_the_compressor():
    retrievers = pytest.importorskip("langchain_classic.retrievers")
    vectors = {str(i): [1.0, 0.0] if i % 2 == 0 else [0.0, 1.0] for i in range(6)}
    compressor = MultiPerspectiveCompressor(k=2, vector_store=lambda found: [vectors[d.id] for d in found])
    retriever = retrievers.ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=FixedRetriever(documents=documents())
    )
    assert [d.id for d in retriever.invoke("q")] == ["0", "1"]
    assert [d.id for d in await retriever.ainvoke("q")] == ["0", "1"]


@pytest.mark.parametrize("kind", [MultiPerspectiveRetriever, MultiPerspectiveCompressor])
def test_settings_that_are_changed_are_checked_and_hold(kind):
    fields = {"retriever": FixedRetriever(documents=documents())} if kind is MultiPerspectiveRetriever else {}
    diverse = kind(**fields, embedder=HashEmbedder())

    def kept():
        return diverse.compress_documents(documents(), "q") if not fields else diverse.invoke("q")

    diverse.k = 3
    assert len(kept()) == 3
    diverse.embedder = DeterministicFakeEmbedding(size=4)  # LangChain's, wrapped as at construction
    assert len(kept()) == 3
    for name, value in (("k", 0), ("embedder", "minilm")):
        with pytest.raises(ValueError, match=name):
            setattr(diverse, name, value)
