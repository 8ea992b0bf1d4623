"""The rollback cache and the packed attention against stock transformers, for every supported architecture."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specrag.engine import attention, forward
from specrag.engine.attention import MAX_PACKED_QUERIES, attention_name, check_supported, packed_attention
from specrag.engine.kv_cache import RollbackCache, rollback_cache
from specrag.engine.onednn import multiplies_bfloat16, use_onednn
from specrag.errors import InvalidInputError
from specrag.models import TransformersLM
from tests.test_transformers_lm import CONVERSATIONS

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=11)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE,
            sliding_window=13,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=8,
        )
    ),
}
_made: dict[str, torch.nn.Module] = {}


def model_of(name):
    if name not in _made:
        torch.manual_seed(0)
        _made[name] = ARCHITECTURES[name]().eval()
    return _made[name]


def stock(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


# Steps of a decoder's life: tokens to append, then how many of them to roll back.
STEPS = st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=5)


# By the length from which on the tiles are used, and whether torch has the kernel: the short cases below take each way.
WAYS = {"packed": {}, "tiled": {"MIN_TILED_LENGTH": 0}, "without the kernel": {"FLASH_KERNEL": None}}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(attention, name, value)
    return request.param


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, seed=st.integers(0, 1000), capacity=st.integers(1, 300))
def test_logits_equal_stock_transformers_after_any_append_verify_and_rollback(way, name, steps, seed, capacity):
    model = model_of(name)
    generator = torch.Generator().manual_seed(seed)
    cache = rollback_cache(model.config, capacity)
    held: list[int] = []
    for count, undone in steps:
        new = torch.randint(97, (count,), generator=generator).tolist()
        with torch.inference_mode(), packed_attention(model):
            logits = model(torch.tensor([new]), past_key_values=cache).logits[0]
        expected = stock(model, held + new)[len(held) :]
        assert torch.allclose(logits, expected, atol=1e-3), (logits - expected).abs().max()
        held += new
        back = int(undone * count)
        cache.rollback(back)
        held = held[: len(held) - back]
        assert cache.length == len(held)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("prepared", ["as loaded", "onednn", "packed"])
@settings(max_examples=5, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_the_light_forward_pass_equals_stock_transformers(name, prepared, steps, seed):
    model = copy.deepcopy(model_of(name))
    if prepared != "as loaded":
        use_onednn(model, pack=prepared == "packed")
    assert forward.supports(model)
    generator = torch.Generator().manual_seed(seed)
    cache, held = rollback_cache(model.config, 300), [1, 2, 3]
    with torch.inference_mode():
        model(torch.tensor([held]), past_key_values=cache)
        for count, undone in steps:
            new = torch.randint(97, (min(count, forward.MAX_TOKENS),), generator=generator).tolist()
            positions = torch.arange(len(held), len(held) + len(new))[None]
            logits = forward.decoder_forward(model, torch.tensor([new]), positions, cache, attention.attend)[0]
            expected = stock(model_of(name), held + new)[len(held) :]
            assert torch.allclose(logits, expected, atol=1e-3), (logits - expected).abs().max()
            back = int(undone * len(new))
            cache.rollback(back)
            held = (held + new)[: len(held) + len(new) - back]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("pack", [False, True])
def test_in_bfloat16_the_light_forward_pass_is_as_near_to_float32_as_transformers_own(name, pack):
    if not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bfloat16")
    own = copy.deepcopy(model_of(name)).to(torch.bfloat16)
    model = copy.deepcopy(own)
    use_onednn(model, pack=pack)
    assert forward.supports(model)
    generator = torch.Generator().manual_seed(3)
    cache, held, errors = rollback_cache(model.config, 300), [1, 2, 3], []
    with torch.inference_mode():
        model(torch.tensor([held]), past_key_values=cache)
        for count, back in ((60, 0), (1, 0), (6, 4), (11, 3), (2, 1), (64, 20), (1, 0), (16, 0)):
            new = torch.randint(97, (count,), generator=generator).tolist()
            positions = torch.arange(len(held), len(held) + len(new))[None]
            logits = forward.decoder_forward(model, torch.tensor([new]), positions, cache, attention.attend)[0]
            assert logits.dtype == torch.bfloat16
            exact, theirs = (stock(m, held + new)[len(held) :].float() for m in (model_of(name), own))
            errors += zip((logits - exact).abs().mean(-1), (theirs - exact).abs().mean(-1), strict=True)
            cache.rollback(back)
            held = (held + new)[: len(held) + len(new) - back]
    mine, stock_error = torch.tensor(errors).mean(0)
    assert 0 < mine < 1.2 * stock_error, (mine, stock_error)


def test_the_light_forward_pass_is_for_what_it_computes_alone():
    assert not any(forward.supports(model_of(name)) for name in ("mistral-sliding", "gemma3"))
    half = copy.deepcopy(model_of("llama")).to(torch.bfloat16)
    assert forward.supports(half) == multiplies_bfloat16(torch.device("cpu"))
    half.model.norm.float()
    assert not forward.supports(half) and not forward.supports(copy.deepcopy(model_of("llama")).half())
    gelu = LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu"))
    hooked, patched, mine = (copy.deepcopy(model_of("llama")) for _ in range(3))
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    patched.model.norm.forward = lambda x: x
    mine.__class__ = type("Mine", (LlamaForCausalLM,), {})
    assert not any(forward.supports(model) for model in (gelu, hooked, patched, mine))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_one_query_a_row_attends_as_sdpa_does(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, generator=generator) for heads, n in ((6, 1), (2, 20), (2, 20)))
    half = (t.to(dtype) for t in (query, key, value))
    seen = torch.rand(3, 1, 1, 20, generator=generator) > 0.4
    hidden = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    made = forward.one_query_attention(*half, 0.3, hidden)
    assert made.dtype == dtype and torch.allclose(made.float(), expected.transpose(1, 2), atol=tolerance)


def test_both_ways_of_attending_were_taken():
    assert 1 < MAX_PACKED_QUERIES < 90  # the property test draws on both sides of the switch


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_padded_batch_with_stock_cache_is_untouched_by_the_packed_attention(name):
    model = model_of(name)
    ids = torch.randint(97, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :12] = mask[2, :7] = 0
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with packed_attention(model):
            inside = model(ids, attention_mask=mask).logits
            cache = DynamicCache(config=model.config)
            model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            in_steps = model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits
    for row, start in ((0, 12), (1, 0), (2, 7)):
        assert torch.allclose(inside[row, start:], expected[row, start:], atol=1e-4)
        assert torch.allclose(in_steps[row], expected[row, 20:], atol=1e-4)


def test_scores_of_a_shared_model_are_the_same_before_during_and_after(tiny):
    lm = TransformersLM(tiny.model, tiny.tokenizer, packing=False)  # padded batches
    before = lm.score(CONVERSATIONS[:3])
    cache = rollback_cache(lm.model.config, 64)
    with torch.inference_mode(), packed_attention(lm.model):
        lm.model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
        lm.model(torch.tensor([[5]]), past_key_values=cache)
        during = lm.score(CONVERSATIONS[:3])
    after = lm.score(CONVERSATIONS[:3])
    assert attention_name(lm.model) == "sdpa"
    for scores in (during, after):
        for a, b in zip(before, scores, strict=True):
            assert b.log_probs["contain"] == pytest.approx(a.log_probs["contain"], abs=1e-4)


def test_the_attention_is_restored_after_a_failure():
    model = model_of("llama")
    before = attention_name(model)
    with pytest.raises(RuntimeError), packed_attention(model):
        raise RuntimeError
    assert attention_name(model) == before


def test_rolling_back_copies_nothing_and_cannot_go_too_far():
    model = model_of("llama")
    cache = rollback_cache(model.config, 32)
    with torch.inference_mode():
        model(torch.arange(10)[None], past_key_values=cache)
    address = cache.layers[0].key_buffer.data_ptr()
    cache.rollback_to(4)
    assert cache.length == cache.get_seq_length() == 4 and cache.layers[0].key_buffer.data_ptr() == address
    for wrong in (5, -1):
        with pytest.raises(InvalidInputError, match="of 4 cached tokens"):
            cache.rollback(wrong)
    cache.crop(-1)
    assert cache.length == 3
    with pytest.raises(InvalidInputError, match="negative count"):
        cache.crop(2)


def test_rows_can_be_repeated_and_selected():
    cache = RollbackCache(1, 4)
    keys = torch.arange(6.0).reshape(1, 1, 3, 2)
    cache.update(keys, keys, 0)
    cache.batch_repeat_interleave(3)
    more = torch.arange(6.0).reshape(3, 1, 1, 2)
    cache.update(more, more, 0)
    cache.batch_select_indices(torch.tensor([0, 2]))
    held, _ = cache.update(more[:2], more[:2], 0)  # grows beyond its capacity of 4
    assert held.shape == (2, 1, 5, 2)
    assert torch.equal(held[1, 0, :3], keys[0, 0]) and torch.equal(held[1, 0, 3], more[2, 0, 0])


def test_what_cannot_be_rolled_back_or_computed_is_refused():
    config = Qwen3Config(**SHAPE)
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(InvalidInputError, match="linear_attention"):
        rollback_cache(config, 8)
    with pytest.raises(InvalidInputError, match="linear_attention"):
        check_supported(config)
    capped = Gemma3TextConfig(**SHAPE, attn_logit_softcapping=30.0)
    with pytest.raises(InvalidInputError, match="caps its attention logits"):
        check_supported(capped)
    with pytest.raises(InvalidInputError, match="at least 1"):
        RollbackCache(0, 5)
