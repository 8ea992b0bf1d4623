"""``TransformersLM`` and RAPID over the native engine: what it writes, and what serves where it is missing."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from specrag.engine import native, onednn
from specrag.engine.blocks import BlockLinear, Kind
from specrag.engine.int8 import Int8Linear
from specrag.errors import InvalidInputError
from specrag.models import GenerationRequest, Sampling, Stage, TransformersLM, Turn, bundled
from specrag.rapid import LongContext
from specrag.rapid.cached_model import CachedModel
from tests.conftest import tiny_llama
from tests.native import needs_native
from tests.rapid_parts import asked, generator
from tests.test_gguf_blocks import Format, write_gguf
from tests.test_transformers_lm import CONVERSATIONS, PROMPTS

FORMATS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
# Mean difference of a scored token's log-probability from float32, in nats.
NEAR = {"bfloat16": 0.05, "int8": 0.1, "int4": 0.4}


@pytest.fixture(scope="module", params=FORMATS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def lm(name):
    return bundled("smollm2", **FORMATS[name])


@needs_native
def test_it_scores_as_float32_does_but_for_rounding(name, lm, smollm2):
    differences = [
        abs(a - b)
        for own, full in zip(lm.score(CONVERSATIONS[:3]), smollm2.score(CONVERSATIONS[:3]), strict=True)
        for a, b in zip(own.log_probs["contain"], full.log_probs["contain"], strict=True)
    ]
    assert sum(differences) / len(differences) < NEAR[name]


@needs_native
def test_a_reply_does_not_depend_on_the_batch(lm):
    assert lm.native is not None
    together = lm.generate(PROMPTS, Sampling())
    for request, reply in zip(PROMPTS, together, strict=True):
        alone = lm.generate([request], Sampling())[0]
        assert alone.text == reply.text
        assert alone.parts[0].log_probs == reply.parts[0].log_probs


@needs_native
def test_generation_gives_what_the_native_pass_gives_token_by_token(lm):
    request = GenerationRequest((Turn.of("user", "Name three rivers."),), (Stage(max_tokens=10),))
    made = lm.generate([request])[0]
    model = CachedModel(lm, 64, lm.native.vocabulary)
    ids = lm.encoder.encode_generation(request)
    logits, written = model.prefill(ids), []
    for _ in range(10):
        written.append(int(logits.argmax()))
        logits = model.feed([written[-1]])[0]
    assert made.text == lm.tokenizer.decode(written, skip_special_tokens=True)


QUESTIONS = [f"What does note {i} say, and who keeps the {word}?" for i, word in enumerate(["key", "lamp"] * 4)]


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("proposer", ["match", "sparse"])
def test_speculation_writes_what_plain_decoding_writes_for_eight_prompts(lm, questions, proposer):
    text = "\n\n".join(p.text for p in questions[0].passages[:3])
    speculative = generator(lm, transfer="none", candidates=6, proposer=proposer, retrieval_budget=300)
    plain = generator(lm, transfer="none", candidates=0, proposer="match")
    sessions = [LongContext(text, rapid) for rapid in (speculative, plain)]
    accepted = 0
    for question in QUESTIONS:
        outs = [session.ask(question, max_tokens=10) for session in sessions]
        assert outs[0].text == outs[1].text
        accepted += outs[0].stats.accepted
    assert accepted > 4


@needs_native
def test_verification_has_the_bits_of_single_steps(lm):
    session = LongContext("Some words to read. " * 30, generator(lm, candidates=0, proposer="match"))
    target, _ = asked(session, "q")
    before, tokens = target.length, [5, 9, 2000, 31, 7, 7, 7]
    together = target.feed(tokens)
    target.rollback_to(before)
    alone = torch.cat([target.feed([token]) for token in tokens])
    assert torch.equal(together, alone)


@needs_native
def test_a_saved_session_goes_on_where_it_was(lm, tmp_path):
    rapid = generator(lm, candidates=0, proposer="match")
    session = LongContext("Some words to read. " * 30, rapid)
    session.save(tmp_path / "session.safetensors")
    loaded = LongContext.load(tmp_path / "session.safetensors", rapid)
    assert torch.equal(asked(loaded, "q")[1], asked(session, "q")[1])


@needs_native
def test_keys_and_values_are_kept_for_another_model_of_the_same_shape(lm):
    first = CachedModel(lm, 64, lm.native.vocabulary)
    first.prefill(list(range(100, 140)))
    second = CachedModel(lm, 64, lm.native.vocabulary)
    second.keep(first, range(40), 40)
    assert torch.equal(first.feed([7]), second.feed([7]))


@needs_native
def test_replaced_layers_are_not_run_as_they_were():
    model = tiny_llama(64, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    lm = TransformersLM(model, bundled("smollm2").tokenizer, quantization="int8")
    assert lm.native is not None and lm.native is lm.native
    before = copy.deepcopy(model.lm_head).unpacked(torch.float32).weight
    onednn.unpack(model)
    assert lm.native is None
    assert type(model.lm_head) is torch.nn.Linear and torch.allclose(model.lm_head.weight, before)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()  # and can be trained again


@needs_native
def test_tied_weights_are_kept_once_and_tied_again():
    lm = bundled("smollm2", quantization="int8")
    assert lm.model.lm_head.matrix is lm.model.model.embed_tokens.matrix
    onednn.unpack(lm.model)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


@needs_native
def test_a_model_in_bfloat16_is_saved_as_transformers_saves_it(tmp_path, smollm2_path):
    lm = bundled("smollm2", dtype=torch.bfloat16)
    assert lm.native is not None
    lm.model.save_pretrained(tmp_path)
    saved, original = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (tmp_path, smollm2_path)
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


@needs_native
def test_a_gguf_file_keeps_its_blocks(tmp_path, smollm2, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "model.gguf", "qwen2", [Format.Q4_K, Format.Q6_K])
    lm = TransformersLM(path, smollm2.tokenizer, quantization="gguf")
    assert lm.native is not None and lm.quantization == "gguf"
    assert {m.matrix.kind for m in lm.model.model.layers[0].modules() if isinstance(m, BlockLinear)} == {
        Kind.Q4_K,
        Kind.Q6_K,
    }


def test_what_does_not_go_with_gguf_blocks_is_refused(tmp_path, smollm2):
    with pytest.raises(InvalidInputError, match=r"keeps the weights of a \.gguf file as they are, got 'some/folder'"):
        TransformersLM("some/folder", quantization="gguf")
    with pytest.raises(InvalidInputError, match="an adapter cannot be merged"):
        TransformersLM("model.gguf", smollm2.tokenizer, quantization="gguf", adapter=tmp_path)
    with pytest.raises(InvalidInputError, match="runs on the CPU"):
        TransformersLM("model.gguf", smollm2.tokenizer, quantization="gguf", device="cuda")


@pytest.fixture
def without_engine(monkeypatch):
    monkeypatch.setattr(native, "_found", lambda: (None, "there is no C compiler"))


def test_without_the_engine_torch_serves(without_engine, tmp_path, monkeypatch, smollm2_path):
    assert bundled("smollm2", dtype=torch.bfloat16).native is None
    layer = bundled("smollm2", quantization="int8").model.model.layers[0].mlp.up_proj
    assert type(layer) is Int8Linear
    with pytest.warns(UserWarning, match="in 8 bits, not in 4: .* there is no C compiler"):
        lm = TransformersLM(smollm2_path, quantization="int4")
    assert lm.generate(PROMPTS[:1])[0].text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "model.gguf", "llama", [Format.Q8_0])
    with pytest.warns(UserWarning, match=r"model\.gguf is unpacked to .*, as there is no native engine: there is no C"):
        lm = TransformersLM(path, lm.tokenizer, quantization="gguf")
    assert lm.native is None
