"""Steps that are recorded and replayed, against the ordinary forward pass.

Here a recorder on the CPU stands for CUDA graphs: it repeats the operations of a pass on the very tensors that it saw.
On a GPU: test_cuda_graphs.py.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specrag.engine import graphs
from specrag.engine.kv_cache import rollback_cache
from specrag.engine.trees import TreeShape
from specrag.rapid.cached_model import CachedModel
from tests.test_cuda import SHAPE

ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
TREE = TreeShape((-1, 0, 0, 1, 2))
# Appended tokens or trees, and how many tokens are forgotten after them.
STEPS = [(1, 0), (7, 5), (6, 0), (TREE, 2), (6, 6), (1, 1), (TreeShape((-1, 0, 1, 0)), 2), (3, 0), (16, 15), (1, 0)]


def attended(query, key, value, scale, *, first, seen):
    """What ``flash_decoding.attend`` computes, slowly, in float64. It reads nothing from the tensors into Python."""
    tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    own = torch.arange(key.shape[2], device=key.device) - first  # of each key: its token, from 0; text before it: < 0
    visible = (own < 0) | ((own < tokens) & seen.bool()[:, own.clamp(0, tokens - 1)])
    used = visible.any(0)[:, None]
    keys, values = (torch.where(used, t, 0).double().repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query.double() @ keys.mT * scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ values).to(query.dtype).transpose(1, 2)


class Recorded(TorchDispatchMode):
    """Records the operations of a pass. ``replay`` repeats them at the addresses that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __call__(self, run):
        self.operations = []
        with self:
            logits = run()
        assert not any(
            "_local_scalar_dense" in str(function) for function, *_ in self.operations
        )  # no read into Python
        return partial(self.replay, self.operations), logits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self, operations):
        self.replays += 1
        for function, args, kwargs, out in operations:
            read, written = (tensors(value) for value in ((args, kwargs), out))
            places = {tensor.untyped_storage().data_ptr() for tensor in read}
            if all(tensor.untyped_storage().data_ptr() in places for tensor in written):
                if function._schema.is_mutable:
                    function(*args, **kwargs)  # a view stays what it is
                continue
            for old, new in zip(written, tensors(function(*args, **kwargs)), strict=True):
                old.copy_(new)


def tensors(value):
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_have_the_logits_and_the_cache_of_the_ordinary_forward_pass(name):
    torch.manual_seed(0)
    recorded = Recorded()
    with torch.inference_mode():
        check_steps(ARCHITECTURES[name]().eval(), attended, recorded)
    assert recorded.replays > 30


def check_steps(model, attend=None, recorder=None, tolerance=1e-4):
    """Appends, trees, rollbacks and a growing cache, beside the model's own forward pass over the whole text."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(1)
    cache = rollback_cache(model.config, 40)
    held = torch.randint(97, (20,), generator=random)
    model(held[None].to(device), past_key_values=cache)
    step = graphs.StepGraphs(model, cache, attend, recorder)
    for _ in range(6):
        for shape, undone in STEPS:
            tree = shape if isinstance(shape, TreeShape) else None
            count = shape if tree is None else len(tree.parents)
            new = torch.randint(97, (count,), generator=random)
            got = step(new[None].to(device), len(held), tree).float().cpu()
            paths = [range(row + 1) for row in range(count)] if tree is None else map(tree.path, range(count))
            wanted = [
                model(torch.cat([held, new[list(path)]])[None].to(device), use_cache=False).logits[0, -1].float().cpu()
                for path in paths
            ]
            assert (got - torch.stack(wanted)).abs().max() < tolerance
            if tree is not None:
                cache.keep_places(len(held), [len(held) + row for row in tree.path(count - 1)])
                new, undone = new[tree.path(count - 1)], 0
            cache.rollback(undone)
            held = torch.cat([held, new[: len(new) - undone]])
            assert cache.length == len(held)


def conversation(model, capacity=60, recorder=None):
    """The steps of a conversation that holds 20 tokens, and its cache."""
    cache = rollback_cache(model.config, capacity)
    model(torch.arange(20)[None], past_key_values=cache)
    return graphs.StepGraphs(model, cache, attended, recorder or Recorded()), cache


@torch.inference_mode()
def test_what_only_fills_up_does_not_make_the_cache_grow():
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    step, cache = conversation(model, capacity=23)
    logits = step(torch.tensor([[5, 6, 7]]), 20)
    assert cache.capacity == 23
    wanted = model(torch.tensor([[*range(20), 5, 6, 7]])).logits[0, 20:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["moved", "replaced"])
@torch.inference_mode()
def test_weights_that_change_their_place_are_noticed(how):
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    recorded = Recorded()
    step, cache = conversation(model, recorder=recorded)
    for turn in range(6):
        if turn == 3:
            other = {name: value * 1.1 for name, value in model.state_dict().items()}
            if how == "replaced":
                model.load_state_dict(other, assign=True)
            else:
                for name, parameter in model.named_parameters():
                    parameter.data = other[name]
            model(torch.arange(20)[None], past_key_values=(fresh := rollback_cache(model.config, 60)))
            for old, new in zip(cache.layers, fresh.layers, strict=True):
                old.key_buffer.copy_(new.key_buffer)
                old.value_buffer.copy_(new.value_buffer)
        logits = step(torch.tensor([[5, 6]]), 20)
        cache.rollback(2)
        wanted = model(torch.tensor([[*range(20), 5, 6]])).logits[0, 20:]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert recorded.replays == 4  # the second and the third step before the change, and after it


@torch.inference_mode()
def test_logits_stay_as_they_are_when_the_next_step_runs():
    torch.manual_seed(0)
    step, _ = conversation(ARCHITECTURES["llama"]().eval())
    before = [step(torch.tensor([[token]]), 20 + token) for token in range(3)]
    copies = [logits.clone() for logits in before]
    step(torch.tensor([[9]]), 23)
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))


@torch.inference_mode()
def test_the_cache_of_a_conversation_goes_with_it():
    """Without the garbage collector: at 120,000 tokens of a large model it is 16 GB."""
    model = ARCHITECTURES["llama"]().eval()
    step, cache = conversation(model)
    for token in range(3):
        step(torch.tensor([[token]]), 20 + token)
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del step, cache
        assert layer() is None
    finally:
        gc.enable()


def test_a_drafter_that_sees_a_part_of_the_text_keeps_its_positions(tiny):
    whole, usual, stepping = (CachedModel(tiny, 64, 300) for _ in range(3))
    whole.prefill(list(range(1, 41)))
    for model in (usual, stepping):
        model.keep(whole, [0, 1, 2, 30, 31, 32, 33], 40)
    recorded = Recorded()
    stepping.graphs = graphs.StepGraphs(tiny.model, stepping.cache, attended, recorded)
    for _ in range(3):
        for tokens in ([7, 8], [9], [1, 2, 3]):
            torch.testing.assert_close(stepping.feed(tokens), usual.feed(tokens), rtol=1e-4, atol=1e-4)
        length, tokens = usual.length, [4, 5, 6, 7, 8]
        got, wanted = (model.feed_tree(tokens, TREE) for model in (stepping, usual))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        for model in (stepping, usual):
            model.keep_path(length, [0, 2, 4])
    stepping.graphs.most_tokens, replays = 2, recorded.replays
    torch.testing.assert_close(stepping.feed([1, 2, 3]), usual.feed([1, 2, 3]), rtol=1e-4, atol=1e-4)
    assert recorded.replays == replays > 0


def test_models_on_the_cpu_are_not_recorded(monkeypatch):
    monkeypatch.setenv("SPECRAG_CUDA_GRAPHS", "1")
    assert not graphs.supports(ARCHITECTURES["llama"]())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_attend_as_the_slow_reference_does():
    """Triton's interpreter runs the kernels on the CPU, in a process of its own: it is chosen at import."""
    script = "from tests.test_graphs import check_kernels; check_kernels('cpu', 'float32')"
    made = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def check_kernels(device, dtype):
    """Groups, numbers of tokens, hidden tokens and lengths, short ones among them. Behind the keys stands NaN."""
    from specrag.engine import flash_decoding

    torch.manual_seed(0)
    shapes = [(4, 2, 1, 16, 70), (9, 3, 6, 64, 300), (8, 8, 3, 32, 0), (8, 1, 16, 16, 517), (4, 2, 5, 16, 3)]
    if device == "cuda" and dtype != "float32":  # Triton takes minutes to compile those
        shapes += [(32, 8, 1, 128, 5000), (32, 8, 12, 128, 33333), (28, 4, 8, 128, 4097)]
    for heads, kv_heads, tokens, size, first in shapes:
        query = 3 * torch.randn(1, tokens, heads, size).to(device, getattr(torch, dtype)).transpose(1, 2)
        key, value = torch.randn(2, 1, kv_heads, first + tokens + 9, size + 16).to(device, query.dtype)[..., :size]
        key[:, :, first + tokens :] = value[:, :, first + tokens :] = float("nan")
        seen = torch.ones(tokens, tokens, dtype=torch.uint8, device=device).tril()
        seen[2:, 1:2] = torch.eye(tokens, dtype=torch.uint8, device=device)[2:, 1:2]
        places = {"first": torch.tensor([first], device=device), "seen": seen}
        got = flash_decoding.attend(query, key, value, size**-0.5, **places)
        wanted = attended(query.double(), key.double(), value.double(), size**-0.5, **places)
        bound = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
        assert (got.double() - wanted).abs().max() < bound, (heads, kv_heads, tokens, size, first)
