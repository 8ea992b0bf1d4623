"""Recorded steps on a GPU (`SPECRAG_CUDA_GRAPHS=1`). Skipped where there is none; docs/results.md says what ran."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch

from specrag.engine import graphs
from specrag.models import TransformersLM
from specrag.rapid import LongContext
from specrag.rapid.cached_model import CachedModel
from tests.conftest import tiny_llama
from tests.rapid_parts import DOCUMENT, generator
from tests.test_graphs import ARCHITECTURES, TREE, check_kernels, check_steps

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]
# In float16, logits of up to 10 are within 0.05 of stock ones, which are as far from float32 themselves.
NEAR = {"rtol": 0, "atol": 0.2}


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setenv("SPECRAG_CUDA_GRAPHS", "1")
    yield
    assert graphs.CudaRecorder._possible, "a recording failed: see the warnings"


@pytest.fixture
def lm(smollm2_tokenizer):
    return TransformersLM(tiny_llama(97, head_dim=16), smollm2_tokenizer, device="cuda", dtype=torch.float16)


def usual_and_recorded(lm, prompt):
    """Two conversations about the same text; the second one is recorded."""
    pair = [CachedModel(lm, 300, 97) for _ in range(2)]
    assert pair[1].graphs is not None
    pair[0].graphs = None
    for model in pair:
        model.prefill(prompt)
    return pair


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_attend_as_the_slow_reference_does(dtype):
    check_kernels("cuda", dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_steps_have_the_logits_and_the_cache_of_the_ordinary_forward_pass(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval().to("cuda", torch.float16)
    assert graphs.supports(model)
    with torch.inference_mode():
        check_steps(model, tolerance=0.2)


def test_recorded_steps_are_as_near_to_float32_as_stock_ones(smollm2_tokenizer):
    torch.manual_seed(0)
    reference = ARCHITECTURES["llama"]().eval().cuda()
    lm = TransformersLM(copy.deepcopy(reference).bfloat16(), smollm2_tokenizer)
    held, random = list(range(1, 90)), torch.Generator().manual_seed(1)
    _, recorded = usual_and_recorded(lm, held)
    ours = stock = 0.0
    for count in [1, 6, 1, 6, 1, 6, 11, 11, 11, 3, 3]:
        held += (new := torch.randint(97, (count,), generator=random).tolist())
        got = recorded.feed(new).float()
        with torch.inference_mode():
            whole = torch.tensor([held]).cuda()
            wanted = reference(whole, use_cache=False).logits[0, -count:]
            theirs = lm.model(whole, use_cache=False).logits[0, -count:].float()
        ours, stock = max(ours, float((got - wanted).abs().max())), max(stock, float((theirs - wanted).abs().max()))
    assert 0 < ours < 1.5 * stock


def test_trees_and_chains_take_turns(lm):
    usual, recorded = usual_and_recorded(lm, list(range(40)))
    for _ in range(4):
        for fed in (lambda model: model.feed_tree([1, 2, 3, 4, 5], TREE), lambda model: model.feed([1, 2, 3, 4, 5])):
            length = usual.length
            torch.testing.assert_close(fed(recorded), fed(usual), **NEAR)
            for model in (usual, recorded):
                model.keep_path(length, [0, 1])


def test_conversations_that_end_leave_the_others_as_they_are(lm):
    usual, lasting = usual_and_recorded(lm, list(range(40)))
    for turn in range(4):
        _, ending = usual_and_recorded(lm, list(range(50, 80)))
        for _ in range(3):
            for model in (ending, lasting, usual):
                model.feed([1, 2, 3, turn])
                model.rollback_to(model.length - 4)
        del ending
        torch.cuda.empty_cache()
        torch.testing.assert_close(lasting.feed([7]), usual.feed([7]), **NEAR)


def test_weights_that_move_are_noticed(lm):
    usual, recorded = usual_and_recorded(lm, list(range(40)))
    for turn in range(6):
        if turn == 3:
            for parameter in lm.model.parameters():
                parameter.data = parameter.data * 1.1
        torch.testing.assert_close(recorded.feed([5]), usual.feed([5]), **NEAR)


def test_the_memory_of_graphs_is_given_back(smollm2_tokenizer):
    lm = TransformersLM(tiny_llama(30_000, head_dim=16), smollm2_tokenizer, device="cuda", dtype=torch.float16)

    def conversation() -> int:
        model = CachedModel(lm, 200, 30_000)
        model.prefill(list(range(40)))
        for _ in range(3):
            for count in (1, 8, 32):
                model.feed(list(range(count)))
                model.rollback_to(40)
        del model
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    conversation()
    before = conversation()
    assert [conversation() for _ in range(3)][-1] <= before


def test_rapid_speculates_over_recorded_steps(smollm2_tokenizer):
    lm = TransformersLM(tiny_llama(len(smollm2_tokenizer)), smollm2_tokenizer, device="cuda", dtype=torch.float16)
    session = LongContext(DOCUMENT, generator(lm, transfer="none", proposer="rag", candidates=5))
    for _ in range(2):
        out = session.ask("who keeps the bell?", max_tokens=40)
        assert out.stats.accepted > 0 and out.stats.tokens > 10
    assert session.model.graphs is not None
