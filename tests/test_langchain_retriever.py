"""The LangChain retriever: one document of each perspective."""

from __future__ import annotations

import pytest

from langchain_specrag import MultiPerspectiveRetriever
from specrag.errors import InvalidInputError
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
