"""The clustering of Speculative RAG alone, as a postprocessor: one node per perspective."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, SerializeAsAny, field_validator
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from llamaindex_specrag._convert import as_embedder, to_passage
from llamaindex_specrag._settings import KnownSettings
from specrag.speculative.perspectives import aselect_perspectives, select_perspectives


class MultiPerspectivePostprocessor(KnownSettings, BaseNodePostprocessor):
    """Keeps one node per perspective, the best ranked of each: a diverse context for any engine.

    Setup:
        ```bash
        pip install 'specrag[llamaindex,local]'
        specrag models fetch minilm  # the default embedder
        ```

    Instantiate:
        ```python
        from llamaindex_specrag import MultiPerspectivePostprocessor

        diverse = MultiPerspectivePostprocessor(k=4)
        ```

    Use:
        ```python
        index.as_query_engine(similarity_top_k=20, node_postprocessors=[diverse])
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    k: int = Field(default=2, ge=1, description="How many nodes to keep.")
    embedder: SerializeAsAny[Any] = Field(
        default=None,
        exclude=True,
        description="A core embedder or a LlamaIndex embedding model. By default the bundled MiniLM.",
    )
    reuse_embeddings: bool = Field(
        default=True, description="Use the nodes' own embeddings, and no embedder, when every node has one."
    )
    seed: int = Field(default=0, description="Seed of the clustering.")

    @field_validator("embedder")
    @classmethod
    def _embedder(cls, value: Any) -> Any:
        return as_embedder(value)

    @classmethod
    def class_name(cls) -> str:
        return "MultiPerspectivePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        kept = select_perspectives(*self._asked(nodes, query_bundle), **self._options())
        return [nodes[i] for i in kept]

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        kept = await aselect_perspectives(*self._asked(nodes, query_bundle), **self._options())
        return [nodes[i] for i in kept]

    def _asked(self, nodes: list[NodeWithScore], query: QueryBundle | None) -> tuple[str, list[Any], int]:
        return query.query_str if query is not None else "", [to_passage(node) for node in nodes], self.k

    def _options(self) -> dict[str, Any]:
        return {"embedder": self.embedder, "reuse_embeddings": self.reuse_embeddings, "seed": self.seed}
