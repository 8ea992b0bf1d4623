"""Scores and drafts of a batch equal those of each conversation alone, for architectures of every kind of position."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from specrag.models import GenerationRequest, Sampling, Segment, Stage, TransformersLM, Turn
from specrag.models._generation import batch_layout
from specrag.models._scoring import obeys_explicit_masks

SHARED = "The turbine of hall seven was checked in week seven. " * 8
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 1024,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# Positions from the place in the row (ALiBi), learned, rotary, and attention that slides over a window.
FAMILIES = {
    "mpt": (hf.MptForCausalLM, hf.MptConfig, {"d_model": 64, "n_heads": 4, "n_layers": 2, "initializer_range": 0.2}),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, {"hidden_size": 64, "n_head": 4, "n_layer": 2}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": 64, "n_head": 4, "n_layer": 2, "initializer_range": 0.2}),
    "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SIZES),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, GROUPED | {"sliding_window": 120}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED | {"sliding_window": 64, "head_dim": 16}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
}


@pytest.fixture(params=FAMILIES)
def lm(request, smollm2_tokenizer) -> TransformersLM:
    model, config, fields = FAMILIES[request.param]
    torch.manual_seed(0)
    return TransformersLM(model(config(vocab_size=len(smollm2_tokenizer), **fields)).eval(), smollm2_tokenizer)


def conversations() -> list[tuple[Turn, Turn]]:
    """They begin alike and have own parts of different lengths, as the drafts of one question."""
    return [
        (Turn.of("user", SHARED + f"question {i} " * (9 * i + 1)), Turn("assistant", (Segment("Yes it is", "x"),)))
        for i in range(4)
    ]


def test_scores_of_a_batch_are_those_of_each_conversation_alone(lm):
    alone = [lm.score([conversation])[0].log_probs["x"] for conversation in conversations()]
    together = [score.log_probs["x"] for score in lm.score(conversations())]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, seed=3)], ids=["greedy", "sampled"])
def test_drafts_of_a_batch_are_those_of_each_request_alone(lm, sampling):
    requests = [GenerationRequest((user,), (Stage(max_tokens=12),)) for user, _ in conversations()]
    together = lm.generate(requests, sampling)
    for i, request in enumerate(requests):
        seed = None if sampling.seed is None else sampling.seed + i
        (alone,) = lm.generate([request], Sampling(temperature=sampling.temperature, seed=seed))
        assert together[i].text == alone.text
        assert together[i].parts[0].log_probs == pytest.approx(alone.parts[0].log_probs, abs=1e-3)


@pytest.mark.parametrize(("family", "packs", "layout"), [("mpt", False, "padded"), ("gpt2", True, "shared")])
def test_the_probes_find_what_an_architecture_can(smollm2_tokenizer, family, packs, layout):
    model, config, fields = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(vocab_size=1000, **fields)).eval()
    with torch.inference_mode():
        assert (obeys_explicit_masks(made, 1e-3), batch_layout(made, 1e-3)) == (packs, layout)


def test_rows_that_no_batch_suits_are_written_one_after_the_other(smollm2_tokenizer, monkeypatch):
    model, config, fields = FAMILIES["gpt2"]
    torch.manual_seed(0)
    lm = TransformersLM(model(config(vocab_size=len(smollm2_tokenizer), **fields)).eval(), smollm2_tokenizer)
    requests = [GenerationRequest((user,), (Stage(max_tokens=6),)) for user, _ in conversations()]
    expected = [completion.text for completion in lm.generate(requests)]
    rows = []
    monkeypatch.setattr("specrag.models._generation.Batch.keep", lambda self, kept: rows.append(kept))
    monkeypatch.setattr("specrag.models._generation.batch_layout", lambda *_: "single")
    again = TransformersLM(lm.model, lm.tokenizer)
    assert [completion.text for completion in again.generate(requests)] == expected and rows == []
