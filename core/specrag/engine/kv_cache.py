"""A key/value cache that is written in place and rolls back by moving an index.

transformers' cache concatenates: every step copies every key and value of the context. Here ``update`` writes after
the last token of a buffer and returns a view, and ``rollback`` forgets tokens without touching memory. It takes any
batch size and works through transformers' ``Cache(layers=...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specrag.engine.pages import huge_empty
from specrag.errors import InvalidInputError


class PreallocatedLayer(CacheLayerMixin):
    """The buffers of one layer, [batch, kv_heads, capacity, head_dim]. Their first ``length`` tokens are valid.

    Sliding-window layers keep everything too: the mask or the attention decides what is seen.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers in the shape, dtype and device of the first keys and values."""
        batch, heads, _, size = key_states.shape
        self.key_buffer = _empty(key_states, (batch, heads, self.capacity, size))
        self.value_buffer = _empty(value_states, (batch, heads, self.capacity, value_states.shape[-1]))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self,
        key_states: Tensor,  # [batch, kv_heads, new, head_dim]
        value_states: Tensor,  # [batch, kv_heads, new, head_dim]
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # each [batch, kv_heads, length, head_dim], views
        """Append in place. A full buffer grows by half."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[2])
        end = self.length + key_states.shape[2]
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens. A full buffer grows by half."""
        if self.length + tokens > self.capacity:
            self._grow(max(self.length + tokens, self.capacity + self.capacity // 2))

    def _grow(self, capacity: int) -> None:
        for name in ("key_buffer", "value_buffer"):
            old = getattr(self, name)
            new = _empty(old, (*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)
        self.capacity = capacity

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (transformers' sign)."""
        if tokens_to_remove > 0:
            raise InvalidInputError(f"crop takes a negative count of tokens to forget, got {tokens_to_remove}")
        self.rollback(-tokens_to_remove)

    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens. Nothing is copied."""
        if not 0 <= tokens <= self.length:
            raise InvalidInputError(f"cannot forget {tokens} of {self.length} cached tokens")
        self.length -= tokens

    def move(self, first: int, places: Tensor) -> None:
        """Keep the tokens at ``places``, which stand at ``first`` or later, as those from ``first`` on, and no more."""
        end = first + len(places)
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[:, :, first:end] = buffer[:, :, places.to(buffer.device)]  # indexing makes a copy first
        self.length = end

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.is_initialized:
            self.key_buffer = self.key_buffer.repeat_interleave(repeats, dim=0)
            self.value_buffer = self.value_buffer.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.is_initialized:
            self.key_buffer = self.key_buffer[indices]
            self.value_buffer = self.value_buffer[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return huge_empty(shape, like.dtype) if like.is_cpu else like.new_empty(shape)


class RollbackCache(Cache):
    """A cache with a ``PreallocatedLayer`` for every layer of a model.

    Args:
        layers: How many layers the model has (``config.num_hidden_layers``).
        capacity: Tokens to make room for.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        if layers < 1 or capacity < 1:
            raise InvalidInputError(f"layers and capacity must be at least 1, got {layers} and {capacity}")
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(layers)])

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return int(self.layers[0].length)

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return int(self.layers[0].capacity)

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Allocate all buffers now, on the CPU.

        Args:
            shape: Batch, key/value heads, size of a head.
            dtype: Of the keys and values.
        """
        like = torch.empty(shape[0], shape[1], 0, shape[2], dtype=dtype)
        for layer in self.layers:
            layer.lazy_initialization(like, like)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens in every layer."""
        most = self.capacity
        for layer in self.layers:
            if layer.capacity < most:  # memory ran out when the layers before it had grown
                layer._grow(most)
            layer.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more tokens, which the caller has written into the buffers."""
        for layer in self.layers:
            layer.length += tokens

    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens in every layer. Nothing is copied."""
        for layer in self.layers:
            layer.rollback(tokens)

    def rollback_to(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        self.rollback(self.length - length)

    def keep_places(self, first: int, places: Sequence[int]) -> None:
        """Forget the tokens from ``first`` on, but for those at ``places``, which then stand there in this order.

        Args:
            first: What stands before it stays.
            places: Ascending, from ``first`` to the last token.
        """
        ascending = all(a < b for a, b in pairwise(places))
        if not ascending or (places and not first <= places[0] <= places[-1] < self.length):
            raise InvalidInputError(f"places must ascend from {first} to {self.length - 1}, got {list(places)}")
        moved = next((i for i, place in enumerate(places) if place != first + i), len(places))
        rest = torch.tensor(places[moved:], dtype=torch.long)
        with torch.inference_mode():  # the buffers are tensors of that mode
            for layer in self.layers:
                layer.move(first + moved, rest)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated buffers."""
        return sum(
            b.nbytes for layer in self.layers if layer.is_initialized for b in (layer.key_buffer, layer.value_buffer)
        )


def head_shape(config: Any) -> tuple[int, int]:
    """Of a model with ``config``: the heads of keys and values, and the size of each."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads), int(size)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take in all layers of a model with ``config``."""
    heads, size = head_shape(config)
    return 2 * int(config.get_text_config().num_hidden_layers) * heads * size * dtype.itemsize


def rollback_cache(config: Any, capacity: int) -> RollbackCache:
    """A cache for a model with ``config``.

    Raises:
        InvalidInputError: The architecture keeps a state that cannot be rolled back (linear attention).
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InvalidInputError(f"layers of kind {', '.join(sorted(kinds))} keep a state that cannot be rolled back")
    return RollbackCache(text.num_hidden_layers, capacity)
