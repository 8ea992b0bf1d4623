"""Steps of a few tokens on a GPU, recorded as CUDA graphs.

A step of a large model over one text runs some 700 small kernels. Started one by one from Python they keep the GPU
waiting: on an H100, a step of an 8B model took three times as long as reading its weights (docs/results.md). A CUDA
graph holds all of them and is started at once. It runs with the addresses and the shapes that it was recorded with. So
the inputs are copied to where it reads them, and both the places of new keys and values and the number of keys are read
on the GPU (see ``flash_decoding``).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from specrag.engine.forward import decoder_forward, is_plain_decoder
from specrag.engine.kv_cache import PreallocatedLayer, RollbackCache
from specrag.engine.memory import out_of_memory
from specrag.engine.trees import TreeShape

#: A step over another number of tokens is filled up to the next of these, so that few graphs are recorded.
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Not float32: with it the tests ran for minutes on an H200, most likely in Triton's compiler.
_TYPES = (torch.bfloat16, torch.float16)
# Rotary embeddings whose angles do not depend on how long the text is.
_ROTARY = {"default", "linear", "llama3", "yarn"}

# Attention as ``flash_decoding.attend`` computes it.
Attend = Callable[..., Tensor]

_log = logging.getLogger(__name__)


def supports(model: nn.Module) -> bool:
    """Whether steps of ``model`` are recorded.

    Recording is on with ``SPECRAG_CUDA_GRAPHS=1`` in the environment. It needs Triton and a Llama, Mistral, Qwen2 or
    Qwen3 with full attention, plain weights of one type (bfloat16 or float16) on one NVIDIA GPU, and no hooks.
    """
    if os.environ.get("SPECRAG_CUDA_GRAPHS") != "1" or importlib.util.find_spec("triton") is None:
        return False
    weights = list(model.parameters())
    if len({(p.device, p.dtype) for p in weights}) != 1 or torch.version.hip is not None:
        return False
    if weights[0].device.type != "cuda" or weights[0].dtype not in _TYPES or not is_plain_decoder(model):
        return False
    body: Any = model.model
    linears = [m for m in model.modules() if hasattr(m, "in_features")]
    if body.rotary_emb.rope_type not in _ROTARY or not all(isinstance(m, nn.Linear) for m in linears):
        return False
    from specrag.engine import flash_decoding

    return flash_decoding.supports(*_heads(model))


def _heads(model: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, and the size of each."""
    config = model.config
    return config.num_attention_heads, config.num_key_value_heads, model.model.layers[0].self_attn.head_dim


class StepGraphs:
    """Steps of one conversation. Each number of tokens is recorded once, on its second use.

    Args:
        model: As ``supports`` accepts it. Weights that move are noticed; modules that are replaced are not.
        cache: Of the conversation. It must hold something.
        attend: The attention, by default ``flash_decoding.attend``.

    Attributes:
        most_tokens: So many tokens one step may have.
    """

    def __init__(self, model: Any, cache: RollbackCache, attend: Attend | None = None) -> None:
        most = SIZES[-1]
        if attend is None:
            from specrag.engine import flash_decoding

            heads, kv_heads, _ = _heads(model)
            attend, most = flash_decoding.attend, flash_decoding.MOST_ROWS // (heads // kv_heads)
        self.most_tokens = max(size for size in SIZES if size <= most)
        self._model, self._cache, self._attend = model, cache, attend
        self._weights = list(model.parameters())
        self._steps: dict[int, _Step] = {}
        self._where: list[int] = []
        self._pool: Any = None

    def __call__(self, ids: Tensor, position: int, tree: TreeShape | None = None) -> Tensor:
        """The logits after each of the next tokens. The cache then holds them.

        Args:
            ids: [1, tokens], at most ``most_tokens``.
            position: Of the first of them.
            tree: The tokens are its rows; by default they stand one after the other.

        Returns:
            [tokens, vocabulary].

        Raises:
            RuntimeError: The GPU has no memory for it. The cache holds what it held.
        """
        cache, count = self._cache, ids.shape[1]
        cache.reserve(count)
        self._forget_moved()
        size = next(size for size in SIZES if size >= count)
        if cache.length + size > cache.capacity:
            size = count  # what only fills up must not make the cache grow
        if size not in self._steps:
            self._steps[size] = _Step(self._model, cache, size, self._attend)
        step = self._steps[size]
        step.fill(ids, cache.length, position, tree)
        if step.uses == 1 and ids.is_cuda:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            step.record(self._pool)
        logits = step()[:count].clone()
        cache.advance(count)
        return logits

    def _forget_moved(self) -> None:
        """Forget what was recorded if the cache has grown since, or the weights have moved."""
        buffers = ((layer.key_buffer, layer.value_buffer) for layer in self._cache.layers)
        where = [tensor.data_ptr() for tensor in chain(self._weights, *buffers)]
        if where != self._where:
            self._steps.clear()
            self._where, self._pool = where, None


class _FixedLayer:
    """A layer of the cache that is written at places which are read on the GPU, and shown whole."""

    def __init__(self, layer: PreallocatedLayer, places: Callable[[], Tensor]) -> None:
        self._layer, self._places = layer, places

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        places = self._places()
        return (
            self._layer.key_buffer.index_copy_(2, places, key),
            self._layer.value_buffer.index_copy_(2, places, value),
        )


class _Step:
    """The forward pass over a fixed number of tokens, whose inputs lie at fixed addresses."""

    def __init__(self, model: Any, cache: RollbackCache, tokens: int, attend: Attend) -> None:
        device = next(model.parameters()).device
        self._model, self._attend = model, attend
        self._ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self._first = torch.zeros(2, dtype=torch.long, device=device)  # place in the cache, position in the text
        self._numbers = torch.arange(tokens, device=device)
        self._depths = self._numbers.clone()
        self._seen = torch.ones(tokens, tokens, dtype=torch.uint8, device=device).tril()
        self._tree: TreeShape | None = None
        self._places = self._numbers
        self.layers = [_FixedLayer(layer, lambda: self._places) for layer in cache.layers]
        self.uses = 0
        self._graph: Any = None
        self._logits: Any = None  # where the graph writes them

    def fill(self, ids: Tensor, place: int, position: int, tree: TreeShape | None) -> None:
        """Write the inputs. Tokens that only fill up stand after them, where none of them sees any."""
        self._ids[:, : ids.shape[1]].copy_(ids)
        self._first.copy_(torch.tensor([place, position]))
        if tree != self._tree:
            tokens = len(self._numbers)
            depths, seen = torch.arange(tokens), torch.ones(tokens, tokens, dtype=torch.uint8).tril()
            if tree is not None:
                rows = len(tree.parents)
                depths[:rows] = torch.tensor(tree.depths)
                seen[:rows, :rows] = (~tree.hidden()).to(torch.uint8)
            self._depths.copy_(depths)
            self._seen.copy_(seen)
            self._tree = tree

    def __call__(self) -> Tensor:  # [tokens, vocabulary]
        """The logits of the inputs, valid until the next call. The buffers then hold their keys and values."""
        self.uses += 1
        if self._graph is None:
            return self._pass()
        self._graph.replay()
        return self._logits

    def _pass(self) -> Tensor:
        place, position = self._first[:1], self._first[1:]
        self._places = place + self._numbers
        attend = partial(self._attend, first=place, seen=self._seen)
        cache: Any = self  # of the cache, the forward pass knows `layers` and their `update`
        return decoder_forward(self._model, self._ids, (position + self._depths)[None], cache, attend)[0]

    def record(self, pool: Any) -> None:
        """Record the pass, which must have run before: nothing is computed. Where that is impossible it stays as it is.

        Raises:
            RuntimeError: The GPU has no memory for it.
        """
        device = self._ids.device
        graph = torch.cuda.CUDAGraph()
        with _recording:
            stream = _stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(stream):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        logits = self._pass()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                _log.warning("CUDA graphs are not possible here, so steps are slower: %s", error)
                return
            torch.cuda.current_stream(device).wait_stream(stream)
        self._graph, self._logits = graph, logits


_recording = threading.Lock()  # one stream records one graph at a time


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded. It is always the same stream: cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(device)
