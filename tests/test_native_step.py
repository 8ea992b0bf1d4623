"""The native forward pass against transformers over the same blocks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specrag.engine.blocks import Kind, use_blocks
from specrag.engine.step import Conversation, NativeDecoder, supports
from specrag.errors import InvalidInputError
from tests.native import needs_native

pytestmark = needs_native

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters=SCALED | {"original_max_position_embeddings": 256})
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
_made: dict = {}


def model_of(name, kind=Kind.BF16):
    """A random model in blocks, and the native decoder of it."""
    if (name, kind) not in _made:
        torch.manual_seed(0)
        model = ARCHITECTURES[name]().eval()
        for parameter in model.parameters():  # norms and biases are ones and zeros else
            parameter.data += 0.05 * torch.randn_like(parameter)
        use_blocks(model, kind)
        _made[name, kind] = model, NativeDecoder(model)
    return _made[name, kind]


def feed(decoder, cache, ids):
    at = torch.arange(cache.length, cache.length + len(ids))
    return decoder(torch.tensor(ids), at, cache)


@pytest.mark.parametrize("kind", [Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers_over_the_same_blocks(name, kind):
    model, decoder = model_of(name, kind)
    ids = torch.randint(97, (350,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
    made = feed(decoder, decoder.cache(400), ids.tolist()).log_softmax(-1)
    # Keys, values and attention weights are bfloat16 here, and float32 there.
    divergence = (expected.exp() * (expected - made)).sum(-1)
    assert divergence.mean() < 2e-3, divergence.mean()
    assert (expected.argmax(-1) == made.argmax(-1)).float().mean() > 0.9


STEPS = st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=1, max_size=6)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@settings(max_examples=15, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 999), capacity=st.integers(1, 400))
def test_logits_have_the_same_bits_after_any_append_verify_and_rollback(name, steps, seed, capacity):
    _, decoder = model_of(name, Kind.Q8_0)
    generator = torch.Generator().manual_seed(seed)
    cache, held = decoder.cache(capacity), []
    for count, undone in steps:
        new = torch.randint(97, (count,), generator=generator).tolist()
        made = feed(decoder, cache, new)
        held += new
        back = int(undone * count)
        cache.rollback(back)
        at_once = feed(decoder, decoder.cache(len(held)), held)
        assert torch.equal(made, at_once[-count:])
        held = held[: len(held) - back]
        assert cache.length == len(held)


def test_only_the_wanted_rows_have_logits():
    _, decoder = model_of("llama")
    ids = torch.arange(20) % 97
    everything = decoder(ids, torch.arange(20), decoder.cache(20))
    some = decoder(ids, torch.arange(20), decoder.cache(20), wanted=[19, 3])
    assert torch.equal(some, everything[[19, 3]])
    assert decoder(ids, torch.arange(20), decoder.cache(20), wanted=[]).shape == (0, 97)


def test_tokens_outside_of_the_vocabulary_are_refused():
    _, decoder = model_of("llama")
    cache = decoder.cache(20)
    with pytest.raises(InvalidInputError, match="token ids must be from 0 to 96, got 3 to 97"):
        feed(decoder, cache, [3, 97])
    assert cache.length == 0


def test_positions_need_not_be_those_of_the_cache():
    model, decoder = model_of("llama")
    ids, at = torch.arange(30) % 97, torch.arange(500, 530)
    with torch.inference_mode():
        expected = model(ids[None], position_ids=at[None], use_cache=False).logits[0]
    made = decoder(ids, at, decoder.cache(30))
    assert (expected.log_softmax(-1) - made.log_softmax(-1)).abs().mean() < 0.05


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_conversations_in_one_pass_are_what_they_are_alone(lengths, seed):
    _, decoder = model_of("qwen2", Kind.Q4_1)
    random = torch.Generator().manual_seed(seed)
    texts = [torch.randint(97, (length + 3,), generator=random) for length in lengths]
    places = torch.randperm(len(texts), generator=random).tolist()
    cache = decoder.cache(50, len(texts))
    parts, ends = [text[:-3] for text in texts], torch.tensor(lengths).cumsum(0) - 1
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    taking_part = [Conversation(place, 0, len(part)) for place, part in zip(places, parts, strict=True)]
    first = decoder.run(torch.cat(parts), positions, cache, taking_part, ends.tolist())
    steps = [first]
    for i in range(3):
        taking_part = [Conversation(place, length + i, 1) for place, length in zip(places, lengths, strict=True)]
        tokens = torch.stack([text[len(text) - 3 + i] for text in texts])
        steps.append(decoder.run(tokens, torch.tensor(lengths) + i, cache, taking_part))
    for i, text in enumerate(texts):
        alone = decoder(text, torch.arange(len(text)), decoder.cache(len(text)))
        assert torch.equal(torch.stack([step[i] for step in steps]), alone[-4:])


def test_what_is_computed_otherwise_is_not_supported():
    model, _ = model_of("llama")
    assert supports(model)
    plain = ARCHITECTURES["llama"]().eval()
    assert not supports(plain)
    mixed = copy.deepcopy(model)
    mixed.model.layers[1].mlp.up_proj = plain.model.layers[1].mlp.up_proj
    assert not supports(mixed)
    sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=11)).eval()
    use_blocks(sliding, Kind.Q8_0)
    assert not supports(sliding)
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=stretched)).eval()
    use_blocks(dynamic, Kind.Q8_0)
    assert not supports(dynamic)


def test_a_copy_of_a_model_stands_on_its_own():
    model, decoder = model_of("llama", Kind.Q8_0)
    twin = copy.deepcopy(model)
    ids = list(range(20))
    before = feed(decoder, decoder.cache(20), ids)
    twin.model.layers[0].mlp.up_proj.data.zero_()
    assert torch.equal(feed(decoder, decoder.cache(20), ids), before)
    assert not torch.equal(feed(NativeDecoder(twin), decoder.cache(20), ids), before)
