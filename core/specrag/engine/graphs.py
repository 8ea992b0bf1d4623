"""Steps of a few tokens on a GPU, recorded as CUDA graphs.

A step of a large model over one text runs some 700 small kernels. Launched one by one from Python they keep the GPU
waiting: on an H100, a step of an 8B model took three times as long as reading its weights (docs/results.md). A CUDA
graph launches all of them with one call. It runs with the addresses and the shapes that it was recorded with. So the
inputs are copied to where it reads them, and both the places of new keys and values and the number of keys are read on
the GPU (see ``flash_decoding``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specrag.engine.forward import CONSTANT_ROTARY, decoder_forward, is_plain_decoder
from specrag.engine.kv_cache import PreallocatedLayer, RollbackCache, head_shape
from specrag.engine.memory import out_of_memory
from specrag.engine.trees import TreeShape

#: A step over another number of tokens is filled up to the next of these, so that few graphs are recorded.
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Not float32: Triton takes minutes to compile its kernels.
_TYPES = (torch.bfloat16, torch.float16)
# Compute capability: the kernels need the shared memory of Ampere and later.
_LEAST_CAPABILITY = (8, 0)

# Attention as ``flash_decoding.attend`` computes it.
Attend = Callable[..., Tensor]
# Given a pass that has run before: what repeats it, and the logits that each repetition writes; ``None``: it cannot be.
Recorder = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor] | None"]

_log = logging.getLogger(__name__)


def supports(model: nn.Module) -> bool:
    """Whether steps of ``model`` are recorded.

    Recording is on with ``SPECRAG_CUDA_GRAPHS=1`` in the environment. It needs Triton and a Llama, Mistral, Qwen2 or
    Qwen3 with full attention, plain weights of one type (bfloat16 or float16) on one NVIDIA GPU (Ampere or later), and
    no hooks.
    """
    if os.environ.get("SPECRAG_CUDA_GRAPHS") != "1" or importlib.util.find_spec("triton") is None:
        return False
    weights = list(model.parameters())
    if len({(p.device, p.dtype) for p in weights}) != 1 or torch.version.hip is not None:
        return False
    device = weights[0].device
    if device.type != "cuda" or weights[0].dtype not in _TYPES or not is_plain_decoder(model):
        return False
    body: Any = model.model
    linears = [m for m in model.modules() if hasattr(m, "in_features")]
    if body.rotary_emb.rope_type not in CONSTANT_ROTARY or not all(isinstance(m, nn.Linear) for m in linears):
        return False
    from specrag.engine import flash_decoding

    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY and flash_decoding.supports(*_heads(model))


def _heads(model: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads, and the size of each."""
    return (model.config.num_attention_heads, *head_shape(model.config))


class StepGraphs:
    """Steps of one conversation. A step is recorded when its (filled-up) number of tokens comes for the second time.

    What was recorded is forgotten when the cache has grown, or weights have moved or were replaced. Modules that are
    replaced are not noticed.

    Args:
        model: As ``supports`` accepts it.
        cache: Of the conversation. It must hold something.
        attend: The attention, by default ``flash_decoding.attend``.
        recorder: What records a pass, by default as a CUDA graph.

    Attributes:
        most_tokens: The most tokens that one step may have.
    """

    def __init__(
        self, model: Any, cache: RollbackCache, attend: Attend | None = None, recorder: Recorder | None = None
    ) -> None:
        most = SIZES[-1]
        if attend is None:
            from specrag.engine import flash_decoding

            heads, kv_heads, _ = _heads(model)
            attend, most = flash_decoding.attend, flash_decoding.MOST_ROWS // (heads // kv_heads)
        self.most_tokens = max(size for size in SIZES if size <= most)
        self._model, self._cache, self._attend = model, cache, attend
        self._device = next(model.parameters()).device
        self._recorder = recorder
        self._steps: dict[int, _Step] = {}
        # Where modules keep their weights. Read anew for each step, as walking over the modules takes longer.
        self._kept = [kept for m in model.modules() for kept in (m._parameters, m._buffers) if kept]
        self._where: list[int] = []

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
        with torch.cuda.device(self._device) if ids.is_cuda else contextlib.nullcontext():
            if size not in self._steps:
                self._steps[size] = _Step(self._model, cache, size, self._attend, self._record)
            logits = self._steps[size](ids, cache.length, position, tree)[:count].clone()
        cache.advance(count)
        return logits

    def _forget_moved(self) -> None:
        """Forget what was recorded if the cache has grown since, or weights are at other addresses."""
        where = [layer.key_buffer.data_ptr() for layer in self._cache.layers]
        where += [layer.value_buffer.data_ptr() for layer in self._cache.layers]
        where += [tensor.data_ptr() for kept in self._kept for tensor in kept.values() if tensor is not None]
        if where != self._where:
            self._steps.clear()
            self._where, self._record = where, self._recorder or CudaRecorder(self._device)


class _FixedLayer:
    """A layer of the cache that is written at places which are read on the GPU, and shown whole."""

    def __init__(self, layer: PreallocatedLayer, places: Tensor) -> None:
        self._layer, self._places = layer, places

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._layer.key_buffer.index_copy_(2, self._places, key),
            self._layer.value_buffer.index_copy_(2, self._places, value),
        )


class _Step:
    """The forward pass over a fixed number of tokens, whose inputs lie at fixed addresses."""

    def __init__(self, model: Any, cache: RollbackCache, tokens: int, attend: Attend, recorder: Recorder) -> None:
        device = next(model.parameters()).device
        self._model, self._attend, self._record = model, attend, recorder
        self._ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        self._first = torch.zeros(2, dtype=torch.long, device=device)  # place in the cache, position in the text
        self._numbers = torch.arange(tokens, device=device)
        self._depths, self._places = self._numbers.clone(), self._numbers.clone()
        self._seen = torch.ones(tokens, tokens, dtype=torch.uint8, device=device).tril()
        self._tree: TreeShape | None = None
        self.layers = [_FixedLayer(layer, self._places) for layer in cache.layers]
        self._uses = 0
        self._recorded: tuple[Callable[[], None], Tensor] | None = None

    def __call__(self, ids: Tensor, place: int, position: int, tree: TreeShape | None) -> Tensor:
        """The logits, [tokens, vocabulary], valid until the next call. The buffers then hold the keys and values."""
        self._fill(ids, place, position, tree)
        self._uses += 1
        if self._uses == 2:
            self._recorded = self._record(self._pass)
        if self._recorded is None:
            return self._pass()
        replay, logits = self._recorded
        replay()
        return logits

    def _fill(self, ids: Tensor, place: int, position: int, tree: TreeShape | None) -> None:
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

    def _pass(self) -> Tensor:
        place, position = self._first[:1], self._first[1:]
        torch.add(place, self._numbers, out=self._places)
        attend = partial(self._attend, first=place, seen=self._seen)
        cache: Any = self  # of the cache, the forward pass knows `layers` and their `update`
        return decoder_forward(self._model, self._ids, (position + self._depths)[None], cache, attend)[0]


class CudaRecorder:
    """Records passes of one conversation as CUDA graphs, which share their memory.

    A pass that cannot be recorded stays as it is. After a failure that is no lack of memory, nothing is recorded in
    this process any more: what a failed recording leaves behind in CUDA is not known.
    """

    _possible = True
    _failed: list[Any] = []  # noqa: RUF012 - kept, as to destroy them may fail too
    _lock = threading.Lock()  # one stream records one graph at a time

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor] | None:
        """Record ``run``. See ``Recorder``."""
        if self._device.type != "cuda" or not CudaRecorder._possible:
            return None
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), _stream(self._device)
        with CudaRecorder._lock:
            # cuBLAS keeps memory per stream. Without this, a graph would use that of another one, which may be gone.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # The outer block restores the stream where the inner one fails to.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(self._device)),
                    torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    logits = run()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):  # a failed end of a recording leaves the allocator in it
                    torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
                self._pool = None  # nothing else is recorded into it
                if not out_of_memory(error):
                    CudaRecorder._possible = False
                    CudaRecorder._failed.append(graph)
                causes = {str(error), str(error.__context__ or error)}
                _log.warning("a step is not recorded as a CUDA graph, and so slower: %s", "; ".join(sorted(causes)))
                return None
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, logits


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are recorded."""
    return torch.cuda.Stream(device)
