"""The clustering of Speculative RAG alone, as a retriever: one document per perspective."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable
from pydantic import ConfigDict, Field, field_validator

from langchain_specrag._convert import as_embedder, to_passages
from langchain_specrag._rebuilt import KnownSettings
from langchain_specrag._runnables import store_of
from specrag.errors import InvalidInputError, kind_of
from specrag.speculative.perspectives import aselect_perspectives, select_perspectives


class MultiPerspectiveRetriever(KnownSettings, BaseRetriever):
    """Keeps one document per perspective of what another retriever finds: a diverse context for any chain.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'
        specrag models fetch minilm  # the default embedder
        ```

    Key init args:
        retriever: Finds the candidates, best first: a retriever, also behind ``bind``, ``with_retry`` or
            ``with_fallbacks``, or any Runnable from a question to documents.
        k: How many documents to keep, at least 1.
        embedder: A core embedder or LangChain ``Embeddings``; by default the bundled MiniLM.
        vector_store: Where the documents come from. Its vectors replace the embedder's. By default the store of a
            vector store's retriever.
        reuse_embeddings: Use vectors that the documents or the store have.
        seed: Of the clustering.

    Instantiate:
        ```python
        from langchain_specrag import MultiPerspectiveRetriever

        diverse = MultiPerspectiveRetriever(retriever=store.as_retriever(search_kwargs={"k": 20}), k=4)
        ```

    Invoke:
        ```python
        diverse.invoke("effects of coffee")
        diverse.invoke("effects of coffee", k=2)  # for this call
        ```

    Async:
        ```python
        await diverse.ainvoke("effects of coffee")
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    retriever: Any
    k: int = Field(default=2, ge=1)
    embedder: Any = None
    vector_store: Any = None
    reuse_embeddings: bool = True
    seed: int = 0

    @field_validator("embedder")
    @classmethod
    def _embedder(cls, value: Any) -> Any:
        return as_embedder(value)

    @field_validator("retriever")
    @classmethod
    def _retriever(cls, value: Any) -> Any:
        if not isinstance(value, Runnable):
            raise InvalidInputError(f"retriever must be a LangChain retriever, got {kind_of(value)}")
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Find the store."""
        if self.vector_store is None:
            self.vector_store = store_of(self.retriever)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self.retriever.invoke(query, {"callbacks": run_manager.get_child()})
        passages = to_passages(found, self.vector_store)
        return [found[i] for i in select_perspectives(query, passages, self._count(k), **self._options())]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = await self.retriever.ainvoke(query, {"callbacks": run_manager.get_child()})
        passages = to_passages(found, self.vector_store)
        return [found[i] for i in await aselect_perspectives(query, passages, self._count(k), **self._options())]

    def _count(self, k: int | None) -> int:
        return self.k if k is None else k

    def _options(self) -> dict[str, Any]:
        return {"embedder": self.embedder, "reuse_embeddings": self.reuse_embeddings, "seed": self.seed}
