"""The LlamaIndex postprocessor: one node of each perspective."""

from __future__ import annotations

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llamaindex_specrag import MultiPerspectivePostprocessor
from tests.fakes import HashEmbedder


async def test_one_node_of_each_perspective_stays():
    vectors = [[1.0, 0.0], [0.0, 1.0]]
    found = [NodeWithScore(node=TextNode(text=f"t{i}", id_=str(i), embedding=vectors[i % 2])) for i in range(6)]
    diverse = MultiPerspectivePostprocessor(k=2)
    assert [n.node_id for n in diverse.postprocess_nodes(found, query_str="q")] == ["0", "1"]
    assert [n.node_id for n in await diverse.apostprocess_nodes(found, QueryBundle("q"))] == ["0", "1"]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MultiPerspectivePostprocessor(k=0)


def test_settings_that_are_changed_are_checked_and_hold():
    found = [NodeWithScore(node=TextNode(text=f"t{i}", id_=str(i))) for i in range(6)]
    diverse = MultiPerspectivePostprocessor(embedder=HashEmbedder())
    diverse.k, diverse.embedder = 3, MockEmbedding(4)  # LlamaIndex's, wrapped as at construction
    assert len(diverse.postprocess_nodes(found, query_str="q")) == 3
    for name, value in (("k", 0), ("embedder", "minilm")):
        with pytest.raises(ValueError, match=name):
            setattr(diverse, name, value)


def test_it_is_written_and_read():
    postprocessor = MultiPerspectivePostprocessor(k=3, embedder=HashEmbedder(), seed=4)
    written = postprocessor.to_dict()
    assert "embedder" not in written and MultiPerspectivePostprocessor.from_dict(written).k == 3


def test_class_hierarchy():
    kind = MultiPerspectivePostprocessor
    assert BaseNodePostprocessor.__name__ in [parent.__name__ for parent in kind.__mro__]
    assert kind.class_name() == "MultiPerspectivePostprocessor"
