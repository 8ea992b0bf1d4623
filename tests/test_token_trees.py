"""Several continuations in one forward pass: every node has the logits that its own path has alone."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.engine.attention import MAX_PACKED_QUERIES
from specrag.engine.trees import MAX_ROWS, TreeShape, chain, with_root
from specrag.errors import InvalidInputError, ModelError
from specrag.models import TransformersLM, bundled
from specrag.rapid.cached_model import CachedModel
from tests import test_cache_and_attention as stock
from tests import test_native_step as native_step
from tests.conftest import tiny_llama
from tests.native import needs_native

way = stock.way  # each way of attending in torch


@cache
def lm_of(name: str) -> TransformersLM:
    return TransformersLM(copy.deepcopy(stock.model_of(name)), bundled("smollm2").tokenizer)


@st.composite
def shapes(draw, most: int = 12) -> TreeShape:
    rows = draw(st.integers(2, most))
    return TreeShape((-1, *(draw(st.integers(0, row - 1)) for row in range(1, rows))))


def test_a_shape_knows_paths_depths_and_what_is_hidden():
    shape = with_root([-1, 0, 0, -1])  # two children of the root, two of the first of them
    assert shape.parents == (-1, 0, 1, 1, 0) and shape.depths == (0, 1, 2, 2, 1)
    assert shape.path(3) == [0, 1, 3] and shape.path(0) == [0]
    assert (~shape.hidden()).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1],
    ]  # fmt: skip
    assert chain(4).is_chain and not shape.is_chain
    assert MAX_ROWS <= MAX_PACKED_QUERIES


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 0, 3)])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(InvalidInputError, match="follows an earlier one"):
        TreeShape(parents)
    with pytest.raises(InvalidInputError, match=r"a tree of 65 rows is wider than the cache's room for one, 64 rows"):
        chain(MAX_ROWS + 1)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
@settings(max_examples=8, deadline=None, suppress_health_check=[stock.HealthCheck.function_scoped_fixture])
@given(shape=shapes(), before=st.integers(1, 40), seed=st.integers(0, 999))
def test_each_node_has_the_logits_of_its_path_alone(way, name, shape, before, seed):
    model, lm = stock.model_of(name), lm_of(name)
    draws = torch.randint(97, (before + len(shape.parents),), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt, tokens = draws[:before], draws[before:]
    cached = CachedModel(lm, 64, 97)
    cached.prefill(prompt)
    made = cached.feed_tree(tokens, shape)
    for row in range(len(tokens)):
        alone = stock.stock(model, prompt + [tokens[i] for i in shape.path(row)])[-1]
        assert torch.allclose(made[row], alone, atol=1e-3), (row, (made[row] - alone).abs().max())
    path = shape.path(len(tokens) - 1)
    cached.keep_path(before, path)
    assert cached.length == before + len(path)
    after = cached.feed([5, 6])
    expected = stock.stock(model, [*prompt, *(tokens[i] for i in path), 5, 6])[-2:]
    assert torch.allclose(after, expected, atol=1e-3)


@needs_native
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@settings(max_examples=15, deadline=None)
@given(shape=shapes(24), before=st.sampled_from([1, 7, 240, 250, 255, 256, 257, 500]), seed=st.integers(0, 999))
def test_in_the_native_engine_each_node_has_the_bits_of_its_path_alone(name, shape, before, seed):
    _, decoder = native_step.model_of(name, native_step.Kind.Q8_0)
    draws = torch.randint(97, (before + len(shape.parents),), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt, tokens = draws[:before], draws[before:]
    held = decoder.cache(before + 4)
    native_step.feed(decoder, held, prompt)
    at = before + torch.tensor(shape.depths)
    made = decoder(torch.tensor(tokens), at, held, tree=shape)
    for row in range(len(tokens)):
        alone = [*prompt, *(tokens[i] for i in shape.path(row))]
        assert torch.equal(made[row], native_step.feed(decoder, decoder.cache(len(alone)), alone)[-1])
    path = shape.path(len(tokens) - 1)
    held.keep_places(before, [before + row for row in path])
    alone = [*prompt, *(tokens[i] for i in path), 5, 6]
    assert torch.equal(
        native_step.feed(decoder, held, [5, 6]), native_step.feed(decoder, decoder.cache(len(alone)), alone)[-2:]
    )


def test_places_that_do_not_ascend_are_refused(tiny):
    cached = CachedModel(tiny, 64, 1000)
    cached.prefill(list(range(10)))
    for places in ([8, 7], [4, 6], [9, 10]):
        with pytest.raises(InvalidInputError, match="places must ascend from 5 to 9"):
            cached.cache.keep_places(5, places)
    cached.cache.keep_places(5, [])
    assert cached.length == 5


def test_a_tree_that_memory_has_no_room_for_leaves_the_cache_as_it_was(smollm2_tokenizer, monkeypatch):
    lm = TransformersLM(tiny_llama(1000), smollm2_tokenizer)
    cached = CachedModel(lm, 12, 1000)
    cached.prefill(list(range(10)))
    expected = cached.feed([5])
    cached.rollback_to(10)
    last = cached.cache.layers[-1]

    def full(capacity):
        raise MemoryError

    monkeypatch.setattr(last, "_grow", full)
    with pytest.raises(ModelError, match="out of memory for a tree of 4 tokens after 10: lower candidates or tree_w"):
        cached.feed_tree([1, 2, 3, 4], with_root([-1, -1, -1]))
    monkeypatch.undo()
    assert cached.length == last.length == 10
    assert torch.allclose(cached.feed([5]), expected, atol=1e-5)
    with pytest.raises(InvalidInputError, match="a tree of 4 rows got 2 tokens"):
        cached.feed_tree([1, 2], with_root([-1, -1, -1]))
