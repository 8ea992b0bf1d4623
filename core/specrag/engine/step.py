"""The forward pass of Llama-like decoders in one call of the native library, for models whose weights lie in blocks.

The tokens of a pass may belong to several conversations. The logits after a token depend on the tokens before it alone:
not on the tokens beside it in the pass, not on how the text was cut into passes, not on the number of threads. So
verification of ten candidates has the bits of ten single steps.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specrag.engine.blocks import BlockEmbedding, BlockLinear, check_ids, native
from specrag.engine.forward import CONSTANT_ROTARY, is_plain_decoder
from specrag.engine.kv_cache import RollbackCache
from specrag.engine.native import Decoder, Heads, Layer, Pass
from specrag.engine.trees import TreeShape

_MOST_HEAD_SIZE = 256


def knows(model: nn.Module) -> bool:
    """Whether ``NativeDecoder`` computes what ``model`` does, once its weights lie in blocks.

    A Llama, Mistral, Qwen2 or Qwen3 with full attention, heads of a multiple of 32, and no hooks.
    """
    if not is_plain_decoder(model):
        return False
    config: Any = model.config
    body: Any = model.model
    size = body.layers[0].self_attn.head_dim
    if size % 32 or size > _MOST_HEAD_SIZE or config.hidden_size % 32 or config.intermediate_size % 32:
        return False
    if body.rotary_emb.rope_type not in CONSTANT_ROTARY:
        return False
    return all(layer.mlp.gate_proj.bias is None and layer.mlp.down_proj.bias is None for layer in body.layers)


def supports(model: nn.Module) -> bool:
    """Whether ``NativeDecoder`` runs ``model`` as it is: it ``knows`` it, and all weights lie in blocks."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | BlockLinear | BlockEmbedding)]
    return bool(linears) and all(isinstance(m, BlockLinear | BlockEmbedding) for m in linears) and knows(model)


class Conversation(NamedTuple):
    """What one conversation takes part in a pass with."""

    place: int  # its row of the cache
    held: int  # tokens that this row holds
    tokens: int  # tokens of the pass that are its own


class NativeDecoder:
    """Runs a model that ``supports`` accepts. It reads the model's modules once: later changes do not count.

    Not for several threads at once: the caller holds the model's lock.
    """

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        self.model = model
        self._engine = native()
        self._kept: list[Any] = []  # what the addresses below point to
        own = body.layers[0].self_attn
        self.layers, self.vocabulary = len(body.layers), model.lm_head.out_features
        self.kv_heads, self.head_size = config.num_key_value_heads, own.head_dim
        heads = Heads(
            config.num_attention_heads, self.kv_heads, own.head_dim, config.num_attention_heads * own.head_dim
        )
        layers = (Layer * self.layers)(*(self._layer(layer) for layer in body.layers))
        rotary = body.rotary_emb
        self._decoder = Decoder(
            layers=self.layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=heads,
            epsilon=body.norm.variance_epsilon,
            attention_scale=own.scaling,
            rotary_scale=rotary.attention_scaling,
            frequencies=self._floats(rotary.inv_freq),
            norm=self._floats(body.norm.weight),
            embeddings=self._matrix(body.embed_tokens),
            logits=self._matrix(model.lm_head),
            layer=layers,
        )
        self._kept.append(layers)
        self._workspace = self._engine.workspace()
        weakref.finalize(self, self._engine.free_workspace, self._workspace)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: RollbackCache,
        *,
        wanted: Sequence[int] | None = None,
        tree: TreeShape | None = None,
    ) -> Tensor:
        """One conversation's next tokens: the logits after some of them. The cache then holds all of them.

        Args:
            tokens, positions: [rows], int64.
            cache: As ``cache`` makes it.
            wanted: Rows whose logits to compute; by default all.
            tree: The rows are those of a tree, each of which sees its ancestors of them. By default each sees all
                before it.

        Returns:
            [len(wanted), vocabulary], float32.

        Raises:
            InvalidInputError: A token is not in the vocabulary.
            MemoryError: There is too little of it; the cache is as it was.
        """
        rows = tokens.numel()
        cache.reserve(rows)
        logits = self.run(tokens, positions, cache, [Conversation(0, cache.length, rows)], wanted, tree)
        cache.advance(rows)
        return logits

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: RollbackCache,
        conversations: Sequence[Conversation],
        wanted: Sequence[int] | None = None,
        tree: TreeShape | None = None,
    ) -> Tensor:
        """The same for several conversations. The caller counts what each row of ``cache`` holds.

        Args:
            tokens, positions: [rows], int64, grouped by conversation.
            cache: With room for them; its own count of tokens is not used.
            conversations: In the order of their tokens.
            wanted: See ``__call__``.
            tree: See ``__call__``; of a single conversation.

        Raises:
            InvalidInputError: A token is not in the vocabulary.
            MemoryError: There is too little of it.
        """
        check_ids(tokens, self._decoder.embeddings.rows)
        chosen = torch.arange(len(tokens)) if wanted is None else torch.tensor(wanted, dtype=torch.long)
        tokens, positions = tokens.contiguous(), positions.contiguous()
        places, held, counts = torch.tensor(conversations).unbind(1)
        held, counts, places = held.contiguous(), counts.contiguous(), places.contiguous()
        parents = None if tree is None else torch.tensor(tree.parents, dtype=torch.long)
        logits = torch.empty(len(chosen), self.vocabulary)
        keys, values = (
            (ctypes.c_void_p * self.layers)(*(getattr(layer, name).data_ptr() for layer in cache.layers))
            for name in ("key_buffer", "value_buffer")
        )
        step = Pass(
            rows=len(tokens),
            conversations=len(conversations),
            wanted=len(chosen),
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            counts=counts.data_ptr(),
            held=held.data_ptr(),
            places=places.data_ptr(),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            capacity=cache.capacity,
            parents=None if parents is None else parents.data_ptr(),
            wanted_rows=chosen.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._engine.use_torch_threads()
        if not self._engine.decode(ctypes.byref(self._decoder), ctypes.byref(step), self._workspace):
            raise MemoryError(f"no memory for a pass of {len(tokens)} tokens")
        return logits

    def cache(self, capacity: int, conversations: int = 1) -> RollbackCache:
        """An empty cache with room for ``capacity`` tokens of each conversation."""
        made = RollbackCache(self.layers, capacity)
        made.allocate((conversations, self.kv_heads, self.head_size), torch.bfloat16)
        return made

    def _floats(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy, kept."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().float().contiguous().clone())
        return int(self._kept[-1].data_ptr())

    def _matrix(self, module: Any) -> Any:
        self._kept.append(module.matrix)
        return module.matrix.struct

    def _layer(self, layer: Any) -> Layer:
        own, mlp = layer.self_attn, layer.mlp
        query_norm, key_norm = (getattr(own, name, None) for name in ("q_norm", "k_norm"))
        return Layer(
            attention_norm=self._floats(layer.input_layernorm.weight),
            mlp_norm=self._floats(layer.post_attention_layernorm.weight),
            query_norm=self._floats(None if query_norm is None else query_norm.weight),
            key_norm=self._floats(None if key_norm is None else key_norm.weight),
            query_bias=self._floats(own.q_proj.bias),
            key_bias=self._floats(own.k_proj.bias),
            value_bias=self._floats(own.v_proj.bias),
            attended_bias=self._floats(own.o_proj.bias),
            query=self._matrix(own.q_proj),
            key=self._matrix(own.k_proj),
            value=self._matrix(own.v_proj),
            attended=self._matrix(own.o_proj),
            gate=self._matrix(mlp.gate_proj),
            up=self._matrix(mlp.up_proj),
            down=self._matrix(mlp.down_proj),
        )
