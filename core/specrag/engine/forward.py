"""The forward pass of Llama-like decoders, for steps of a few tokens: on the CPU, and in CUDA graphs.

transformers' forward pass serves every use of a model, and costs much Python and many small operations per token
(``benchmarks/decoder.py``). This one does the same arithmetic in few operations: activations, gates and residual sums
are part of oneDNN's products. It reads the model's own modules anew in every pass, so changes to them take effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from specrag.engine.kv_cache import RollbackCache
from specrag.engine.onednn import multiplies, product
from specrag.engine.trees import TreeShape

#: With more tokens at once nearly all time goes into the products, where nothing can be saved.
MAX_TOKENS = 64

#: Rotary embeddings whose angles are the position times constants, however long the text.
CONSTANT_ROTARY = {"default", "linear", "llama3", "yarn"}

_KINDS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)

# (query [batch, heads, tokens, head_dim], key, value [batch, kv_heads, length, head_dim], scale)
# -> [batch, tokens, heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def supports(model: nn.Module) -> bool:
    """Whether ``decoder_forward`` computes what ``model`` does.

    The model must be of a known class, with full attention, without hooks, on the CPU, and in one dtype: float32, or
    bfloat16 where the CPU multiplies it natively.
    """
    if not is_plain_decoder(model):
        return False
    parameters = list(model.parameters())
    return len({p.dtype for p in parameters}) == 1 and all(multiplies(p) for p in parameters)


def is_plain_decoder(model: nn.Module) -> bool:
    """Whether it is a Llama, Mistral, Qwen2 or Qwen3 with SiLU, full attention in every layer, and no hooks."""
    if type(model) not in _KINDS:
        return False
    config: Any = model.config
    if config.hidden_act != "silu" or getattr(config, "sliding_window", None) is not None:
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def decoder_forward(model: Any, ids: Tensor, positions: Tensor, cache: RollbackCache, attend: Attend) -> Tensor:
    """The logits after each of ``ids``. The cache then holds them.

    Args:
        ids, positions: [batch, tokens].
        attend: Causal attention of the tokens over everything that the cache holds, the tokens included.

    Returns:
        [batch, tokens, vocabulary].
    """
    body = model.model
    x = body.embed_tokens(ids)  # [batch, tokens, hidden]
    rotation = _rotation(body, x, positions)
    for layer, held in zip(body.layers, cache.layers, strict=True):
        query, key, value = _heads(layer, x, rotation)
        keys, values = held.update(key, value)
        x = product(layer.self_attn.o_proj, attend(query, keys, values, layer.self_attn.scaling).flatten(2), add=x)
        h = _normed(layer.post_attention_layernorm, x)
        gate = product(layer.mlp.gate_proj, h, silu=True)
        x = product(layer.mlp.down_proj, product(layer.mlp.up_proj, h, times=gate), add=x)
    return product(model.lm_head, _normed(body.norm, x))


def decoder_forward_by_rows(
    model: Any, ids: Tensor, positions: Tensor, cache: RollbackCache, attend: Attend, shape: TreeShape
) -> Tensor:
    """``decoder_forward`` over the rows of a tree, with the bits of steps over a single token.

    Every operation runs row by row, as in a step over that row's token after its path. A matrix is read for all rows
    before the next one is, from the processor's cache where it fits in.

    Args:
        ids, positions: [1, rows].
        attend: Of one token.
        shape: Which row follows which.

    Returns:
        [1, rows, vocabulary].
    """
    body, rows = model.model, range(ids.shape[1])
    xs = [body.embed_tokens(ids[:, row : row + 1]) for row in rows]
    rotations = [_rotation(body, xs[row], positions[:, row : row + 1]) for row in rows]
    for layer, held in zip(body.layers, cache.layers, strict=True):
        own, mlp = layer.self_attn, layer.mlp
        heads = [_heads(layer, x, rotation) for x, rotation in zip(xs, rotations, strict=True)]
        attended = _attended_by_rows(heads, held, attend, own.scaling, shape)
        xs = [product(own.o_proj, attended[row], add=xs[row]) for row in rows]
        hs = [_normed(layer.post_attention_layernorm, x) for x in xs]
        gates = [product(mlp.gate_proj, h, silu=True) for h in hs]
        gated = [product(mlp.up_proj, hs[row], times=gates[row]) for row in rows]
        xs = [product(mlp.down_proj, gated[row], add=xs[row]) for row in rows]
    return torch.cat([product(model.lm_head, _normed(body.norm, x)) for x in xs], dim=1)


def _attended_by_rows(
    heads: Sequence[tuple[Tensor, Tensor, Tensor]], held: Any, attend: Attend, scale: float, shape: TreeShape
) -> list[Tensor]:
    """Attention of each row over its path, which is brought into its place for that. Then the cache holds all rows."""
    written: list[int] = []
    first, found = held.length, []
    held.reserve(len(heads))
    for row, (query, _, _) in enumerate(heads):
        path = shape.path(row)
        shared = next((i for i, (a, b) in enumerate(zip(written, path, strict=False)) if a != b), len(written))
        held.length = first + shared
        for node in path[shared:]:
            keys, values = held.update(*heads[node][1:])
        written = path
        found.append(attend(query, keys, values, scale).flatten(2))
    held.length = first
    for _, key, value in heads:
        held.update(key, value)
    return found


def _rotation(body: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # each [batch, 1, tokens, head_dim]
    """Cosines and signed sines of the rotary embedding."""
    cos, sin = (table[:, None] for table in body.rotary_emb(x, positions))
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _heads(layer: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [batch, heads, tokens, head_dim]."""
    own, (cos, sin) = layer.self_attn, rotation
    h = _normed(layer.input_layernorm, x)
    shape, half = (*h.shape[:-1], -1, own.head_dim), cos.shape[-1] // 2
    query, key, value = (product(p, h).view(shape).transpose(1, 2) for p in (own.q_proj, own.k_proj, own.v_proj))
    if hasattr(own, "q_norm"):
        query, key = _normed(own.q_norm, query), _normed(own.k_norm, key)
    query, key = (torch.addcmul(t * cos, t.roll(half, -1), sin) for t in (query, key))
    return query, key, value


def _normed(norm: Any, x: Tensor) -> Tensor:
    weight = norm.weight
    return functional.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


def one_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Attention of one token per row. The query heads of a group are the rows of one product.

    Args:
        query: [batch, heads, 1, head_dim]; key and value: [batch, kv_heads, length, head_dim].
        hidden: 0 where a row may look and -inf where not, [batch, 1, 1, length]; ``None``: everywhere.

    Returns:
        [batch, 1, heads, head_dim].
    """
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, key.shape[1], -1, size)
    if query.dtype == torch.float32:
        scores = torch.matmul(rows * scale, key.transpose(-1, -2))
        if hidden is not None:
            scores += hidden
        out = torch.matmul(scores.softmax(-1), value)
    else:  # products of a few rows in bfloat16 cost more than SDPA's tiles
        mask = None if hidden is None else hidden.to(query.dtype)
        out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, size)
