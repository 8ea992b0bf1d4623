"""Attention for a few queries over a long, grouped-query cache.

transformers' attention expands every key/value head to the number of query heads, and copies the whole context for
it. Here the query heads of a group and the candidate tokens are packed into the rows of one matrix product, which
reads the cache once and without a copy. Over a long cache the same rows go through SDPA's CPU kernel piece by piece.
The keys that every query sees need no mask, several pieces keep all cores busy, and the results of the pieces are
joined by their log-sum-exps (flash-decoding; Dao et al., arXiv 2205.14135, section 3.1). Prefill chunks take the same
path.

The function is registered under one name in transformers' two registries. ``packed_attention`` switches it on for one
forward pass, so other users of the same model object never meet it. A call whose shape is not RAPID's goes to SDPA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specrag.engine.trees import TreeShape
from specrag.errors import InvalidInputError

NAME = "specrag_packed"

# In float32, one matrix product beats SDPA's tiles for at most this many queries over fewer than this many keys.
MAX_PACKED_QUERIES = 64
MIN_TILED_LENGTH = 4096

# What SDPA runs on a CPU. It also returns the log-sum-exps. It is private to torch; without it SDPA itself serves.
FLASH_KERNEL: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

# The shape of the tokens of the forward pass that transformers runs now; ``None``: one after the other.
_tree: ContextVar[TreeShape | None] = ContextVar("specrag_tree", default=None)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, heads, queries, head_dim]
    key: Tensor,  # [1, kv_heads, length, head_dim]; the last `queries` of them are the queries' own
    value: Tensor,  # [1, kv_heads, length, head_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, queries, heads, head_dim]
    """Causal attention of the last ``queries`` tokens over all ``length``, or that of a tree of them."""
    queries, length = query.shape[2], key.shape[2]
    ours = attention_mask is None and query.shape[0] == 1 and (length > queries or queries == 1)
    if not ours:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, scale, sliding_window, _tree.get()), None


def attend(
    query: Tensor,  # [1, heads, queries, head_dim]
    key: Tensor,  # [1, kv_heads, length, head_dim]; the last `queries` of them are the queries' own
    value: Tensor,  # [1, kv_heads, length, head_dim]
    scale: float,
    sliding_window: int | None = None,
    tree: TreeShape | None = None,
) -> Tensor:  # [1, queries, heads, head_dim]
    """Causal attention of the last ``queries`` tokens over all ``length``, or over a window of them.

    With ``tree``, the last tokens are its rows, and each sees its ancestors of them.
    """
    queries, length = query.shape[2], key.shape[2]
    if sliding_window is not None and length > sliding_window + queries - 1:
        first = length - (sliding_window + queries - 1)  # what no query sees is not read
        key, value, length = key[:, :, first:], value[:, :, first:], length - first
    if tree is None:
        hidden = _hidden(queries, length, sliding_window, query.device)
    else:
        hidden = _hidden_in_tree(tree, length, sliding_window, query.device)
    if query.device.type == "cuda":
        out = _sdpa_cuda(query, key, value, hidden, scale, causal=tree is None)
    elif queries <= MAX_PACKED_QUERIES and (
        FLASH_KERNEL is None or (length < MIN_TILED_LENGTH and query.dtype == torch.float32)
    ):
        out = _packed(query, key, value, hidden, scale)
    elif FLASH_KERNEL is not None and key.shape[-1] == value.shape[-1]:
        out = _tiled(query, key, value, hidden, scale)
    else:
        out = _sdpa_grouped(query, key, value, hidden, scale)
    return out.transpose(1, 2).contiguous()


def _hidden(queries: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """What each query must not see, [queries, columns], of the last ``columns`` keys; ``None``: nothing.

    Without a window only the last ``queries`` columns hold hidden (future) tokens; with one, the first columns do too.
    """
    if window is None or length <= window:
        return None if queries == 1 else torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)
    if queries == 1:
        return None  # the keys were cut to the window
    position = torch.arange(length - queries, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None, :]
    return (keys > position) | (keys <= position - window)


def _hidden_in_tree(tree: TreeShape, length: int, window: int | None, device: torch.device) -> Tensor:
    """``_hidden`` for the rows of a tree, which are the last keys."""
    hidden, rows = tree.hidden(device), len(tree.parents)
    if window is None or length <= window:
        return hidden
    before = length - rows
    own = before + torch.tensor(tree.depths, device=device)  # positions of the rows, the first key being at 0
    keys = torch.cat([torch.arange(before, device=device), own])
    unrelated = torch.cat([hidden.new_zeros(rows, before), hidden], dim=1)
    return unrelated | (keys <= own[:, None] - window)


def _packed(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """One product [group · queries, head_dim] x [head_dim, length] per key/value head."""
    _, heads, queries, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    rows = query.reshape(1, kv_heads, (heads // kv_heads) * queries, size) * scale
    scores = torch.matmul(rows, key.transpose(-1, -2))
    if hidden is not None:
        by_query = scores.view(1, kv_heads, heads // kv_heads, queries, length)
        by_query[..., length - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(1, heads, queries, size)


def _tiled(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """The packed rows over the keys that all of them see, in pieces, and over the rest with a mask; then joined."""
    _, heads, queries, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = query.reshape(1, kv_heads, group * queries, size)
    free = length - (0 if hidden is None else hidden.shape[1])
    # A prefill chunk has enough rows for every core; a few queries have one tile per head.
    pieces = 1 if queries > MAX_PACKED_QUERIES else max(1, -(-2 * torch.get_num_threads() // kv_heads))
    piece = free // pieces
    begin = piece * pieces
    found: list[tuple[Tensor, Tensor]] = []
    if piece:
        shape = (kv_heads, pieces, piece)
        found.append(
            FLASH_KERNEL(
                rows.expand(pieces, -1, -1, -1),
                key[0, :, :begin].unflatten(1, shape[1:]).transpose(0, 1),
                value[0, :, :begin].unflatten(1, shape[1:]).transpose(0, 1),
                scale=scale,
            )
        )
    if begin < length:
        mask = None
        if hidden is not None:
            mask = torch.zeros(queries, length - begin, dtype=query.dtype)
            mask[:, free - begin :].masked_fill_(hidden, float("-inf"))
            mask = mask.repeat(group, 1)
        found.append(FLASH_KERNEL(rows, key[:, :, begin:], value[:, :, begin:], attn_mask=mask, scale=scale))
    outs, sums = (torch.cat(parts) for parts in zip(*found, strict=True))  # [pieces, kv_heads, rows, (size)]
    out = (outs * sums.softmax(0).to(outs.dtype)[..., None]).sum(0) if len(outs) > 1 else outs[0]
    return out.reshape(1, heads, queries, size)


def _sdpa_grouped(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """SDPA with the key/value heads as its batch; the heads of a group are a view of stride 0."""
    _, heads, queries, size = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    mask = torch.zeros(queries, length, dtype=query.dtype, device=query.device)
    if hidden is not None:
        mask[:, length - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    out = functional.scaled_dot_product_attention(
        query.reshape(kv_heads, group, queries, size),
        key[0][:, None].expand(kv_heads, group, length, size),
        value[0][:, None].expand(kv_heads, group, length, value.shape[-1]),
        attn_mask=mask,
        scale=scale,
    )
    return out.reshape(1, heads, queries, size)


def _sdpa_cuda(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    """SDPA's own grouped queries. A causal mask that is aligned to the last key runs on its flash kernel."""
    from torch.nn.attention.bias import causal_lower_right

    queries, length = query.shape[2], key.shape[2]
    mask: Any = None
    if hidden is not None and causal and hidden.shape[1] == queries:
        mask = causal_lower_right(queries, length)
    elif hidden is not None:
        mask = functional.pad(~hidden, (length - hidden.shape[1], 0), value=True)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *args: Any,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """No mask for RAPID's calls, whose attention is causal by itself; SDPA's mask for any other."""
    if attention_mask is None and batch_size == 1 and q_offset:
        return None
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size, q_length, kv_length, q_offset, kv_offset, *args, attention_mask=attention_mask, **kwargs
    )


# Always both: for a name that the second registry does not know, the model drops every mask without an error.
AttentionInterface.register(NAME, packed_attention_forward)
AttentionMaskInterface.register(NAME, packed_mask)


@contextlib.contextmanager
def packed_attention(model: nn.Module, tree: TreeShape | None = None) -> Iterator[None]:
    """Use the packed attention in ``model`` inside the ``with`` block. The caller holds the model's lock.

    Args:
        tree: The shape of the tokens of the passes in the block; ``None``: one after the other.
    """
    config: Any = model.config
    text = config.get_text_config()
    before = attention_name(model)
    text._attn_implementation, shape = NAME, _tree.set(tree)
    try:
        yield
    finally:
        text._attn_implementation = before
        _tree.reset(shape)


def attention_name(model: Any) -> str:
    """The name of the attention that ``model`` uses now."""
    return str(model.config.get_text_config()._attn_implementation)


def check_supported(config: Any) -> None:
    """Refuse an architecture whose attention this module does not compute.

    Raises:
        InvalidInputError: Soft-capped logits, or layers that are neither full nor sliding-window attention.
    """
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise InvalidInputError(f"{text.model_type} caps its attention logits, which RAPID does not support")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InvalidInputError(
            f"{text.model_type} has layers of kind {', '.join(sorted(kinds))}; RAPID needs attention"
        )
