"""The in-process backend against slow, obvious references."""

import functools
import math

import pytest
import torch

from specrag.engine import onednn
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models import GenerationRequest, Sampling, Segment, Stage, TransformersLM, Turn
from tests.conftest import tiny_llama

FAMILIES = ["smollm2", "wordpiece_lm", "unigram_lm"]


def conversation(answer: str, rationale: str, question: str = "who won the prize") -> tuple[Turn, ...]:
    return (
        Turn.of("user", f"Question: {question}"),
        Turn(
            "assistant",
            (Segment("Answer: "), Segment(answer, "contain"), Segment("\nRationale: "), Segment(rationale, "contain")),
        ),
        Turn.of("user", "Does the rationale support the answer? (Yes or No)"),
        Turn("assistant", (Segment("Yes", "reflect"),)),
    )


CONVERSATIONS = [
    conversation("Wilhelm Röntgen", "The first Nobel Prize in Physics went to Wilhelm Conrad Röntgen in 1901."),
    conversation("1981", "It opened."),
    # the boundary between unscored and scored text stands inside a word
    (
        Turn.of("user", "a question"),
        Turn("assistant", (Segment("The capi"), Segment("tal of 日本 is Tokyo", "contain"))),
    ),
    conversation("the president of the club", "He presided over it for many years, and was re-elected twice. " * 2),
]


@functools.cache  # one model's references serve all tests of it
def reference_scores(lm: TransformersLM, turns) -> dict[str, list[float]]:
    """One token at a time: feed everything before a token, read its log-probability, nothing shared or packed.

    SmolLM2 reads a conversation once for all its tokens: one pass per token takes 20 seconds.
    """
    encoded = lm.encoder.encode_scored(turns)
    whole = logits_of(lm, encoded.ids) if lm.model.config.hidden_size > 500 else None
    scores = {}
    for name, positions in encoded.segments.items():
        scores[name] = []
        for position in positions:
            logits = whole[position - 1] if whole is not None else logits_of(lm, encoded.ids[:position])[-1]
            scores[name].append(float(torch.log_softmax(logits, -1)[encoded.ids[position]]))
    return scores


def logits_of(lm: TransformersLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", ["auto", False])
def test_scores_equal_token_by_token_scoring(request, family, packing):
    reference = request.getfixturevalue(family)
    lm = TransformersLM(reference.model, reference.tokenizer, packing=packing)
    made = lm.score(CONVERSATIONS)
    assert lm.packs == (packing == "auto")
    for turns, score in zip(CONVERSATIONS, made, strict=True):
        expected = reference_scores(reference, turns)
        assert score.log_probs.keys() == expected.keys()
        for name, values in expected.items():
            assert len(values) > 0
            assert score.log_probs[name] == pytest.approx(values, abs=1e-4)


def test_all_conversations_are_scored_in_one_forward_pass_without_padding(smollm2, forward_passes):
    smollm2.score(CONVERSATIONS[:2])  # the packing probe runs once a model
    counts = forward_passes(smollm2.model)
    smollm2.score(CONVERSATIONS)
    lengths = [len(smollm2.encoder.encode_scored(turns).ids) for turns in CONVERSATIONS]
    assert len(counts) == 1
    assert max(lengths) >= 2 * min(lengths)
    assert counts[0] < sum(lengths)  # what they begin with in common stands once


def test_logits_are_computed_at_scored_positions_only(smollm2):
    seen = []
    handle = smollm2.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    try:
        score = smollm2.score([CONVERSATIONS[0]])[0]
    finally:
        handle.remove()
    assert seen == [sum(len(values) for values in score.log_probs.values())]


def test_an_architecture_that_ignores_the_mask_is_scored_in_padded_batches(smollm2):
    class Ignorant(type(smollm2.model)):
        def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
            if attention_mask is not None and attention_mask.dim() == 4:  # as a recurrent model would
                attention_mask = position_ids = None
            return super().forward(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    model = tiny_llama(smollm2.model.config.vocab_size)
    plain = TransformersLM(model, smollm2.tokenizer, packing=False).score(CONVERSATIONS)
    model.__class__ = Ignorant
    lm = TransformersLM(model, smollm2.tokenizer)
    made = lm.score(CONVERSATIONS)
    assert not lm.packs
    for a, b in zip(made, plain, strict=True):
        assert a.log_probs["contain"] == pytest.approx(b.log_probs["contain"], abs=1e-4)


def test_sliding_windows_are_not_packed_beyond_the_window(wordpiece_lm):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(wordpiece_lm.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
    )  # fmt: skip
    lm = TransformersLM(MistralForCausalLM(config).eval(), wordpiece_lm.tokenizer)
    made = lm.score(CONVERSATIONS)
    for turns, score in zip(CONVERSATIONS, made, strict=True):
        for name, values in reference_scores(lm, turns).items():
            assert score.log_probs[name] == pytest.approx(values, abs=1e-4)


PROMPTS = [
    GenerationRequest((Turn.of("user", "Name the capital of France."),), (Stage(max_tokens=8),)),
    GenerationRequest(
        (Turn.of("user", "Write one sentence about the river Seine, and mention Paris and London."),),
        (Stage(max_tokens=8),),
    ),
    GenerationRequest((Turn.of("user", "1, 2, 3, 4,"),), (Stage(max_tokens=8),)),
]


def reference_greedy(lm: TransformersLM, request: GenerationRequest) -> tuple[list[int], list[float]]:
    ids, made, log_probs = lm.encoder.encode_generation(request), [], []
    while len(made) < request.max_tokens:
        with torch.inference_mode():
            logits = lm.model(torch.tensor([ids + made]), logits_to_keep=1).logits[0, -1].double()
        token = int(logits.argmax())
        if token in lm.end_tokens:
            break
        log_probs.append(float(torch.log_softmax(logits, -1)[token]))
        made.append(token)
    return made, log_probs


def test_a_padded_batch_generates_what_each_prompt_generates_alone(smollm2):
    for request, completion in zip(PROMPTS, smollm2.generate(PROMPTS), strict=True):
        tokens, log_probs = reference_greedy(smollm2, request)
        assert completion.text == smollm2.tokenizer.decode(tokens)
        assert completion.parts[0].log_probs == pytest.approx(log_probs, abs=1e-4)
        assert completion.usage.prompt_tokens == len(smollm2.encoder.encode_generation(request))


def test_a_long_common_beginning_changes_nothing(smollm2):
    beginning = "Read this with care. " * 20
    requests = [
        GenerationRequest((Turn.of("user", beginning + end),), (Stage(max_tokens=4),))
        for end in ("What is two plus two?", "Who wrote Hamlet, and when did he live, roughly?")
    ]
    for request, completion in zip(requests, smollm2.generate(requests), strict=True):
        tokens, log_probs = reference_greedy(smollm2, request)
        assert completion.text == smollm2.tokenizer.decode(tokens)
        assert completion.parts[0].log_probs == pytest.approx(log_probs, abs=1e-4)


def test_finished_rows_leave_the_batch(smollm2, forward_passes):
    short = GenerationRequest(PROMPTS[0].turns, (Stage(max_tokens=2),))
    long = GenerationRequest(PROMPTS[1].turns, (Stage(max_tokens=6),))
    smollm2.generate([short, short])  # the check of batches comes before the count
    counts = forward_passes(smollm2.model)
    smollm2.generate([short, long])
    assert counts[1:] == [2, 1, 1, 1, 1]


def test_stages_prefill_headers_and_score_only_what_the_model_wrote(smollm2):
    request = GenerationRequest(
        (Turn.of("user", "The sky is blue. What colour is the sky?"),),
        (Stage("Rationale:", 24, ("\n",)), Stage("\nAnswer:", 8, ("\n", "."))),
    )
    completion = smollm2.generate([request])[0]
    rationale, answer = completion.parts
    assert rationale.text.strip() and "\n" not in rationale.text.strip()
    assert "Answer:" not in rationale.text + answer.text and "." not in answer.text
    for written in (rationale, answer):
        assert len(written.log_probs) == written.tokens == len(written.token_ends)
    # The answer's log-probabilities are those of the text as it was kept: score the same text.
    rendered = smollm2.encoder.render_generation(request) + rationale.text + "\nAnswer:"
    ids = smollm2.encoder.encode_rendered(rendered)
    with torch.inference_mode():
        logits = smollm2.model(torch.tensor([ids])).logits[0, -1].double()
    first = smollm2.encoder.encode_text(answer.text)[0]
    assert answer.log_probs[0] == pytest.approx(float(torch.log_softmax(logits, -1)[first]), abs=1e-4)


def test_sampling_repeats_under_a_seed_and_differs_between_seeds(smollm2):
    def texts(seed):
        return [c.text for c in smollm2.generate(PROMPTS, Sampling(temperature=1.0, seed=seed))]

    first = texts(1)
    assert texts(1) == first
    assert texts(2) != first
    # A row's draws come from its own generator: its neighbours do not matter.
    alone = smollm2.generate(PROMPTS[:1], Sampling(temperature=1.0, seed=1))[0].text
    assert alone == first[0]


def test_log_probs_are_the_models_own_whatever_the_sampling(smollm2):
    made = smollm2.generate(PROMPTS[:1], Sampling(temperature=2.0, top_k=5, top_p=0.9, seed=3))[0]
    ids = smollm2.encoder.encode_generation(PROMPTS[0])
    own = smollm2.encoder.encode_text(made.text)
    with torch.inference_mode():
        logits = smollm2.model(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1].double()
    expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(own)[:, None])[:, 0].tolist()
    assert made.parts[0].log_probs == pytest.approx(expected, abs=1e-4)


def test_top_log_probs_hold_the_likeliest_tokens(smollm2):
    top = smollm2.generate(PROMPTS[:1], top_log_probs=5)[0].parts[0].top_log_probs
    assert all(len(position) <= 5 for position in top)
    assert sum(math.exp(v) for v in top[0].values()) <= 1.0001


def test_int8_weights_keep_the_likely_tokens(smollm2_path, smollm2):
    quantized = TransformersLM(smollm2_path, quantization="int8")
    a, b = quantized.score(CONVERSATIONS[:2]), smollm2.score(CONVERSATIONS[:2])
    for x, y in zip(a, b, strict=True):
        difference = [abs(i - j) for i, j in zip(x.log_probs["contain"], y.log_probs["contain"], strict=True)]
        assert sum(difference) / len(difference) < 0.2
    assert quantized.generate(PROMPTS[:1])[0].text.strip()


def test_gguf_files_that_cannot_be_loaded_are_refused(tmp_path):
    # That a good one loads is shown by `specrag models fetch`, which converts SmolLM2 from GGUF on a new machine.
    import gguf
    import numpy as np

    missing = tmp_path / "none.gguf"
    with pytest.raises(ModelNotFoundError, match=r"no model at .*none\.gguf"):
        TransformersLM(missing)
    broken = tmp_path / "broken.gguf"
    writer = gguf.GGUFWriter(broken, "nothing-known")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotFoundError, match="could not be loaded"):
        TransformersLM(broken)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("/nowhere/model",), ModelNotFoundError, "no model at /nowhere/model"),
        (("/tmp",), ModelNotFoundError, "has no config.json"),
    ],
)
def test_a_path_without_a_model_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TransformersLM(*arguments)


def test_contradicting_arguments_are_refused(smollm2):
    with pytest.raises(InvalidInputError, match="device or device_map"):
        TransformersLM("x", device="cpu", device_map="auto")
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        TransformersLM(smollm2.model)
    with pytest.raises(InvalidInputError, match="quantization must be"):
        TransformersLM("x", quantization="int3")
    with pytest.raises(InvalidInputError, match="packing must be"):
        TransformersLM("x", packing="never")


def test_a_conversation_beyond_the_window_is_refused_with_the_numbers(wordpiece_lm):
    long = conversation("x", "word " * 600)
    with pytest.raises(InvalidInputError, match="exceed the 512 positions"):
        wordpiece_lm.score([long])
    with pytest.raises(InvalidInputError, match="exceed the 512 positions"):
        wordpiece_lm.generate([GenerationRequest((Turn.of("user", "word " * 600),))])


def test_nothing_to_do_is_done(smollm2):
    assert smollm2.generate([]) == []
    assert smollm2.score([]) == []


def test_linear_layers_multiply_with_onednn_and_stay_what_they_are(smollm2):
    if not onednn.available():
        pytest.skip("no oneDNN product here")
    model = tiny_llama(61)
    expected = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(expected).logits
    weights = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    lm = TransformersLM(model, smollm2.tokenizer)
    layers = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear)]
    assert layers and all(type(m) is onednn.OneDNNLinear for m in layers)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == weights  # nothing copied
    with torch.inference_mode():
        assert torch.allclose(lm.model(expected).logits, before, atol=1e-4)
    layer = torch.nn.Linear(6, 4)
    x = torch.randn(2, 3, 6)
    want, own = layer(x), layer.weight
    onednn.use_onednn(torch.nn.Sequential(layer))
    assert type(layer) is onednn.OneDNNLinear
    with torch.no_grad():
        assert torch.allclose(layer(x), want, atol=1e-6)  # with a bias, and more than two dimensions
        for count in (1, 16, 17, 64, 513, 1100):  # rounded up, and in parts
            many = torch.randn(count, 6)
            made = layer(many)
            assert made.shape == (count, 4) and torch.allclose(
                made, torch.nn.functional.linear(many, own, layer.bias), atol=1e-5
            )
    layer(x).sum().backward()  # gradients still flow
    assert layer.weight is own and own.grad is not None
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, None)])
def test_packed_weights_give_the_same_and_come_back(smollm2, dtype, tolerance):
    if not onednn.available() or (dtype == torch.bfloat16 and not onednn.multiplies_bfloat16(torch.device("cpu"))):
        pytest.skip("no oneDNN product here")
    ids = torch.tensor([[5, 6, 7, 8]])

    def kinds(model):
        return [type(m) for m in model.modules()]

    for tied in (True, False):
        model = tiny_llama(61, tie_word_embeddings=tied, attention_bias=True).to(dtype)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.inference_mode():
            before = model(ids).logits
        onednn.use_onednn(model, pack=True)
        assert kinds(model).count(onednn.PackedLinear) == 2 * 7 + (
            not tied
        )  # the embedding needs tied weights as they are
        with torch.inference_mode():
            atol = tolerance or 0.02 * before.abs().max().item()  # bfloat16 has eight bits
            assert torch.allclose(model(ids).logits, before, atol=atol)
        packed = model.state_dict()
        assert packed.keys() == state.keys() and all(torch.equal(packed[name], state[name]) for name in state)
        TransformersLM(model, smollm2.tokenizer, dtype=torch.float64)  # who changes the weights finds them as they were
        assert onednn.PackedLinear not in kinds(model) and model.lm_head.weight.dtype == torch.float64
        onednn.use_onednn(model.to(dtype), pack=True)
        onednn.unpack(model)
        assert not {onednn.PackedLinear, onednn.OneDNNLinear} & {*kinds(model)}
        model(ids).logits.sum().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
