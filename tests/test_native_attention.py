"""Attention of the native engine against softmax in float64."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.engine.native import Heads, Sequence, library
from tests.native import needs_native

pytestmark = needs_native

LOG2_E = 1.4426950408889634


def attend(queries, keys, values, before):
    """queries: [rows, heads, size], scaled; keys and values: [kv_heads, capacity, size], bfloat16."""
    rows, heads, size = queries.shape
    out = torch.empty_like(queries)
    scaled = queries * LOG2_E
    shape = Heads(heads, len(keys), size, heads * size)
    sequence = Sequence(0, rows, before, keys.data_ptr(), values.data_ptr(), keys.shape[1])
    assert library().attend(ctypes.byref(shape), ctypes.byref(sequence), scaled.data_ptr(), out.data_ptr())
    return out


def reference(queries, keys, values, before):
    rows, heads, _ = queries.shape
    group, length = heads // len(keys), before + rows
    keys, values = (t[:, :length].double().repeat_interleave(group, 0) for t in (keys, values))
    scores = torch.einsum("rhd,hkd->hrk", queries.double(), keys)
    hidden = torch.arange(length) > (before + torch.arange(rows))[:, None]
    return torch.einsum("hrk,hkd->rhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


def made(heads, kv_heads, size, length, capacity, seed=0):
    """Queries for every position, keys and values; what lies behind the length is not to be read."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(kv_heads, capacity, size, generator=generator).bfloat16() for _ in range(2))
    keys[:, length:] = values[:, length:] = float("nan")
    return torch.randn(length, heads, size, generator=generator) * size**-0.5, keys, values


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(9, 3, 64), (12, 2, 128), (4, 4, 32), (8, 1, 96), (3, 1, 256), (2, 2, 160)]),
    before=st.one_of(st.integers(0, 40), st.integers(230, 280), st.integers(500, 800)),
    rows=st.one_of(st.integers(1, 20), st.integers(60, 90)),
    spare=st.integers(0, 50),
    seed=st.integers(0, 999),
)
def test_attention_equals_softmax(shape, before, rows, spare, seed):
    queries, keys, values = made(*shape, before + rows, before + rows + spare, seed)
    out = attend(queries[before:].contiguous(), keys, values, before)
    exact = reference(queries[before:], keys, values, before)
    # Queries and weights are rounded to bfloat16: relative errors of 0.004 that average out.
    assert (out - exact).abs().max() < 0.03
    assert (out - exact).abs().mean() < 0.002


@pytest.mark.parametrize("shape", [(9, 3, 64), (12, 2, 128), (8, 1, 32)])
def test_a_query_has_the_same_bits_whatever_stands_beside_it(shape):
    queries, keys, values = made(*shape, 700, 720)
    together = attend(queries, keys, values, 0)
    for first, count in ((0, 1), (0, 5), (255, 1), (255, 2), (250, 11), (511, 16), (600, 64), (600, 65), (699, 1)):
        alone = attend(queries[first : first + count].contiguous(), keys, values, first)
        assert torch.equal(alone, together[first : first + count])


def test_one_overwhelming_key_takes_all_the_weight():
    queries, keys, values = made(2, 1, 64, 400, 400)
    keys[0, 137] = queries[399, 0].bfloat16() * 3000
    out = attend(queries[399:].contiguous(), keys, values, 399)
    assert torch.allclose(out[0, 0], values[0, 137].float())
