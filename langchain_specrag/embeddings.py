"""A core embedder as LangChain embeddings."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, Field

from langchain_specrag._rebuilt import KnownSettings
from specrag.models.bundled import bundled
from specrag.models.embedders import Embedder


class SpecRAGEmbeddings(KnownSettings, Embeddings):
    """Any embedder of specrag for LangChain's vector stores; by default the bundled MiniLM.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'  # without `local` for an embeddings endpoint
        specrag models fetch minilm  # the default embedder
        ```

    Key init args:
        embedder: A core embedder: ``bundled("minilm")``, ``TransformersEmbedder``, ``OpenAIEmbedder`` or your own.

    Instantiate:
        ```python
        from langchain_specrag import SpecRAGEmbeddings
        from specrag.models import OpenAIEmbedder

        embeddings = SpecRAGEmbeddings()
        embeddings = SpecRAGEmbeddings(embedder=OpenAIEmbedder("http://127.0.0.1:8000/v1", "bge-small-en"))
        ```

    Use:
        ```python
        InMemoryVectorStore(embeddings)
        embeddings.embed_query("who discovered radium")
        ```

    Async:
        ```python
        await embeddings.aembed_documents(["Radium was discovered in 1898."])
        ```

    Raises:
        MissingExtraError: The default is used, and the extra ``local`` is not installed.
        ModelNotFoundError: The default is used, and it was not fetched.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    embedder: Embedder = Field(
        default_factory=lambda: bundled("minilm"), exclude=True, description="Makes the vectors, of unit length."
    )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text, in order."""
        return self.embedder.embed(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question; the same as that of a document."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """``embed_documents``, awaited."""
        return (await self.embedder.aembed(texts)).tolist()

    async def aembed_query(self, text: str) -> list[float]:
        """``embed_query``, awaited."""
        return (await self.aembed_documents([text]))[0]
