"""Attention of a few queries over a long cache on a GPU, in Triton.

The keys are cut into pieces, so that all multiprocessors of the GPU work on one text, and a second kernel joins the
pieces by their maxima and sums: flash-decoding, on the online softmax of FlashAttention (Dao et al., arXiv 2205.14135,
section 3.1). The tokens, and the query heads that share a key head, are the rows of one product, so each key is read
once. How many keys there are is read on the GPU: a CUDA graph that holds these kernels serves a text of any length.

Only ``graphs`` imports this module, and only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of one product: tokens times the query heads that share a key head.
MOST_ROWS = 128

_LOG2_E = 1.4426950408889634


@triton.jit
def _fold(query, keys, values, visible, outs, top, total, scale, precision: tl.constexpr):
    """Add one block of keys to a running softmax (base 2) with the maximum ``top`` and the sum ``total``."""
    scores = tl.dot(query, tl.trans(keys), input_precision=precision) * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    outs = outs * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=precision)
    return outs, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["tokens"])  # one kernel for all numbers of tokens with the same ROWS
def _pieces(
    query_at, key_at, value_at, first_at, seen_at, outs_at, tops_at, totals_at,
    scale, tokens, query_token, query_head, head_stride, key_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One key head and one piece of the keys per program. The last piece has the keys of the tokens themselves too."""
    head, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(first_at)  # keys that every token sees; the tokens' own follow them
    rows, sizes = tl.arange(0, ROWS), tl.arange(0, SIZE)
    token, real = rows % tokens, rows < tokens * GROUP
    place = token * query_token + (head * GROUP + rows // tokens) * query_head
    query = tl.load(query_at + place[:, None] + sizes[None, :], mask=real[:, None], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    outs = tl.zeros([ROWS, SIZE], tl.float32)
    key_at += head.to(tl.int64) * head_stride
    value_at += head.to(tl.int64) * head_stride
    length = tl.cdiv(tl.cdiv(first, pieces), BLOCK) * BLOCK
    begin = piece * length
    for start in range(begin, tl.minimum(begin + length, first), BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < first
        places = at.to(tl.int64)[:, None] * key_stride + sizes[None, :]
        keys = tl.load(key_at + places, mask=there[:, None], other=0.0)
        values = tl.load(value_at + places, mask=there[:, None], other=0.0)
        outs, top, total = _fold(query, keys, values, there[None, :], outs, top, total, scale, PRECISION)
    if piece == pieces - 1:
        own = tl.arange(0, OWN)
        there = own < tokens
        places = (first + own).to(tl.int64)[:, None] * key_stride + sizes[None, :]
        keys = tl.load(key_at + places, mask=there[:, None], other=0.0)
        values = tl.load(value_at + places, mask=there[:, None], other=0.0)
        seen = tl.load(seen_at + token[:, None] * tokens + own[None, :], mask=there[None, :], other=0)
        outs, top, total = _fold(query, keys, values, seen != 0, outs, top, total, scale, PRECISION)
    result = (head * pieces + piece) * ROWS + rows
    tl.store(tops_at + result, top)
    tl.store(totals_at + result, total)
    tl.store(outs_at + result[:, None] * SIZE + sizes[None, :], outs)


@triton.jit(do_not_specialize=["tokens"])
def _join(
    outs_at, tops_at, totals_at, out_at, tokens,
    PIECES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row of one key head per program. A piece without keys has the maximum -inf, and so no weight."""
    head, row = tl.program_id(0), tl.program_id(1)
    sizes = tl.arange(0, SIZE)
    place = (head * PIECES + tl.arange(0, PIECES)) * ROWS + row
    tops = tl.load(tops_at + place)
    weights = tl.exp2(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(totals_at + place) * weights, 0)
    outs = tl.load(outs_at + place[:, None] * SIZE + sizes[None, :])
    out = tl.sum(outs * weights[:, None], 0) / total
    heads = tl.num_programs(0) * GROUP
    at = ((row % tokens) * heads + head * GROUP + row // tokens) * SIZE
    tl.store(out_at + at + sizes, out.to(out_at.dtype.element_ty))


def supports(heads: int, kv_heads: int, size: int) -> bool:
    """Whether the kernels take heads of such a number and ``size``, for a single token at least."""
    return heads % kv_heads == 0 and heads // kv_heads <= MOST_ROWS and size in (16, 32, 64, 128)


def attend(
    query: Tensor,  # [1, heads, tokens, head_dim], of any strides over heads and tokens
    key: Tensor,  # [1, kv_heads, capacity, head_dim]
    value: Tensor,  # [1, kv_heads, capacity, head_dim], of the same strides
    scale: float,
    *,
    first: Tensor,  # [1], int64
    seen: Tensor,  # [tokens, tokens], uint8
) -> Tensor:  # [1, tokens, heads, head_dim]
    """Attention over the first ``first`` keys of a cache and, of the ``tokens`` keys after them, those that are seen.

    Args:
        query: At most ``MOST_ROWS`` rows: tokens times heads per key head.
        key, value: The cache's buffers. What stands after the tokens' own keys is not read.
        scale: Of the scores.
        first: How many keys every token sees. It is read on the GPU.
        seen: 1 where a token (first axis) sees the key of another (second axis). Each sees its own.
    """
    _, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    rows = max(16, triton.next_power_of_2(group * tokens))
    pieces = _pieces_for(query.device, kv_heads)
    block = 64 if query.dtype.itemsize == 2 else 32
    outs = torch.empty(kv_heads, pieces, rows, size, dtype=torch.float32, device=query.device)
    tops, totals = torch.empty(2, kv_heads, pieces, rows, dtype=torch.float32, device=query.device)
    out = torch.empty(1, tokens, heads, size, dtype=query.dtype, device=query.device)
    _pieces[(kv_heads, pieces)](
        query, key, value, first, seen, outs, tops, totals,
        scale * _LOG2_E, tokens, query.stride(2), query.stride(1), key.stride(1), key.stride(2),
        GROUP=group, ROWS=rows, SIZE=size, BLOCK=block, OWN=max(16, triton.next_power_of_2(tokens)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=8 if rows > 64 else 4, num_stages=2,
    )  # fmt: skip
    _join[(kv_heads, group * tokens)](
        outs, tops, totals, out, tokens, PIECES=pieces, GROUP=group, ROWS=rows, SIZE=size, num_warps=4
    )
    return out


def _pieces_for(device: torch.device, kv_heads: int) -> int:
    """So many pieces that each multiprocessor has about two of them; a power of 2, from 4 to 64."""
    if device.type != "cuda":  # Triton's interpreter
        return 4
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // kv_heads
    return int(min(64, max(4, triton.next_power_of_2(wanted + 1) // 2)))
