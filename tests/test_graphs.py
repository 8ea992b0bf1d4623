"""Steps at fixed addresses, as CUDA graphs record them, against the ordinary forward pass. On a GPU: test_cuda.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specrag.engine import graphs
from specrag.engine.kv_cache import rollback_cache
from specrag.engine.trees import TreeShape
from specrag.rapid.cached_model import CachedModel

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
# Appended tokens or trees, and how many tokens are forgotten after them.
STEPS = [(1, 0), (7, 5), (6, 0), (1, 1), (TreeShape((-1, 0, 0, 1, 2)), 2), (3, 0), (16, 10), (1, 0), (64, 64), (5, 0)]


def attended(query, key, value, scale, *, first, seen):
    """What ``flash_decoding.attend`` computes, slowly, in float64."""
    tokens, count = query.shape[2], int(first) + query.shape[2]
    group = query.shape[1] // key.shape[1]
    keys, values = (t[:, :, :count].double().repeat_interleave(group, dim=1) for t in (key, value))
    visible = torch.cat([torch.ones(tokens, int(first)), seen.cpu().float()], dim=1).bool().to(query.device)
    scores = (query.double() @ keys.mT * scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ values).to(query.dtype).transpose(1, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_have_the_logits_and_the_cache_of_the_ordinary_forward_pass(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.inference_mode():
        check_steps(model, attended)


def check_steps(model, attend, tolerance=1e-4, most_tokens=64):
    """Appends, trees, rollbacks and a growing cache, beside the model's own forward pass over the whole text."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(1)
    cache = rollback_cache(model.config, 40)
    held = torch.randint(97, (20,), generator=random)
    model(held[None].to(device), past_key_values=cache)
    step = graphs.StepGraphs(model, cache, attend)
    for _ in range(3):  # of each number of tokens, the second use records and the third replays
        for shape, undone in STEPS:
            tree = shape if isinstance(shape, TreeShape) else None
            count = shape if tree is None else len(tree.parents)
            new = torch.randint(97, (count,), generator=random)
            if count > min(most_tokens, step.most_tokens):
                continue
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


def test_what_only_fills_up_does_not_make_the_cache_grow():
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"]().eval()
    with torch.inference_mode():
        cache = rollback_cache(model.config, 23)
        model(torch.arange(20)[None], past_key_values=cache)
        logits = graphs.StepGraphs(model, cache, attended)(torch.tensor([[5, 6, 7]]), 20)
        wanted = model(torch.tensor([[*range(20), 5, 6, 7]])).logits[0, 20:]
    assert cache.capacity == 23
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_drafter_that_sees_a_part_of_the_text_keeps_its_positions(tiny):
    whole, usual, stepping = (CachedModel(tiny, 64, 300) for _ in range(3))
    whole.prefill(list(range(1, 41)))
    for model in (usual, stepping):
        model.keep(whole, [0, 1, 2, 30, 31, 32, 33], 40)
    stepping.graphs = graphs.StepGraphs(tiny.model, stepping.cache, attended)
    for tokens in ([7, 8], [9], [1, 2, 3]):
        torch.testing.assert_close(stepping.feed(tokens), usual.feed(tokens), rtol=1e-4, atol=1e-4)


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
    if device == "cuda":
        shapes += [(32, 8, 1, 128, 5000), (32, 8, 12, 128, 33333), (28, 4, 8, 128, 4097), (16, 8, 4, 256, 900)]
    for heads, kv_heads, tokens, size, first in shapes:
        query = torch.randn(1, tokens, heads, size).to(device, getattr(torch, dtype)).transpose(1, 2)
        key, value = torch.randn(2, 1, kv_heads, first + tokens + 9, size).to(device, query.dtype)
        key[:, :, first + tokens :] = value[:, :, first + tokens :] = float("nan")
        seen = torch.ones(tokens, tokens, dtype=torch.uint8, device=device).tril()
        seen[2:, 1:2] = torch.eye(tokens, dtype=torch.uint8, device=device)[2:, 1:2]
        places = {"first": torch.tensor([first], device=device), "seen": seen}
        got = flash_decoding.attend(query, key, value, size**-0.5, **places)
        wanted = attended(query.double(), key, value, size**-0.5, **places)
        bound = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
        assert (got.double() - wanted).abs().max() < bound, (heads, kv_heads, tokens, size, first)
