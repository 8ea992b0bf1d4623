"""Cache, attention and exactness on a GPU. Skipped where there is none; docs/results.md says where they ran."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specrag.engine.attention import packed_attention
from specrag.engine.kv_cache import rollback_cache
from specrag.engine.memory import free_memory
from specrag.models import TransformersLM
from specrag.models.reader import SpanReader
from specrag.rapid import LongContext
from specrag.training.examples import IGNORED, EncodedExample
from specrag.training.trainer import Collator, completion_loss
from tests.conftest import tiny_llama
from tests.rapid_parts import DOCUMENT, PROPOSERS, generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=11)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}


def steps(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest errors of the logits, ours and stock, against stock in float32, over appends and rollbacks."""
    torch.manual_seed(0)
    reference = ARCHITECTURES[name]().eval().cuda()
    model = copy.deepcopy(reference).to(dtype)
    cache, held = rollback_cache(model.config, 40), []
    random = torch.Generator().manual_seed(1)
    ours = stock = 0.0
    for count, undone in [(70, 3), (1, 0), (11, 10), (1, 1), (40, 0), (5, 2), (1, 0)]:
        new = torch.randint(97, (count,), generator=random).tolist()
        with torch.inference_mode():
            with packed_attention(model):
                got = model(torch.tensor([new]).cuda(), past_key_values=cache).logits[0].float()
            whole = torch.tensor([held + new]).cuda()
            wanted = reference(whole, use_cache=False).logits[0, len(held) :]
            theirs = model(whole, use_cache=False).logits[0, len(held) :].float()
        ours = max(ours, float((got - wanted).abs().max()))
        stock = max(stock, float((theirs - wanted).abs().max()))
        cache.rollback(undone)
        held = (held + new)[: len(held) + count - undone]
    return ours, stock


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_float32_logits_equal_stock_after_appends_and_rollbacks(name):
    ours, _ = steps(name, torch.float32)
    assert ours < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bfloat16_logits_are_as_near_to_float32_as_stock_ones(name):
    ours, stock = steps(name, torch.bfloat16)
    assert 0 < ours < 1.5 * stock


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize(
    "settings", [{"candidates": 1}, {"candidates": 5}, {}, {"candidates": 5, "tree_width": 3}], ids=str
)
def test_without_transfer_greedy_output_is_the_targets_own(proposer, settings, smollm2_tokenizer):
    if "tree_width" in settings and proposer in ("match", "triforce"):
        pytest.skip("it makes no trees")
    vocabulary = len(smollm2_tokenizer)
    target = TransformersLM(tiny_llama(vocabulary), smollm2_tokenizer, device="cuda", dtype=torch.float32)
    session = LongContext(DOCUMENT, generator(target, transfer="none", proposer=proposer, **settings))
    out = session.ask("who keeps the bell?", max_tokens=24)
    ids = torch.tensor([[*session.prompt.ids, *session.question_tokens("who keeps the bell?")]]).cuda()
    with torch.inference_mode():
        made = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0,
            eos_token_id=sorted(target.end_tokens),
        )  # fmt: skip
    assert out.text == smollm2_tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_span_reader_reads_the_same_spans_as_on_the_cpu(minilm_reader_parts):
    model, tokenizer = minilm_reader_parts
    texts = ["The tower opened in 1889.", "It is 330 metres tall and was built by Gustave Eiffel."]
    on_cpu = SpanReader(copy.deepcopy(model), tokenizer, device="cpu", dtype=torch.float32)
    on_gpu = SpanReader(copy.deepcopy(model), tokenizer, device="cuda", dtype=torch.float32)
    expected, found = (reader.read("when did it open?", texts) for reader in (on_cpu, on_gpu))
    assert [(s.passage, s.start, s.end) for s in found.spans[:5]] == [
        (s.passage, s.start, s.end) for s in expected.spans[:5]
    ]
    assert found.log_no_answer == pytest.approx(expected.log_no_answer, abs=1e-3)


@pytest.fixture(scope="module")
def minilm_reader_parts():
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    from specrag.models._loading import quiet_transformers
    from specrag.models.bundled import located

    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForQuestionAnswering.from_pretrained(located("minilm"))
    return model.eval(), AutoTokenizer.from_pretrained(located("minilm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_training_batch_has_a_finite_loss_and_gradient(dtype):
    torch.manual_seed(0)
    model = tiny_llama(97).cuda().train()
    examples = [EncodedExample(list(range(1, n)), [IGNORED] * (n - 5) + list(range(1, 5))) for n in (9, 60, 95)]
    batch = {name: value.cuda() for name, value in Collator(pad=0)(examples).items()}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        loss, _ = completion_loss(model, **batch)
    loss.backward()
    with torch.no_grad():
        wanted = sum(
            torch.nn.functional.cross_entropy(
                model(torch.tensor([e.ids]).cuda()).logits[0, :-1], torch.tensor(e.labels[1:]).cuda(), reduction="sum"
            )
            for e in examples
        )
    assert loss.item() == pytest.approx(float(wanted), rel=1e-4 if dtype == torch.float32 else 0.02)
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_free_memory_counts_what_torch_holds_unused():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before, held = free_memory(device), torch.empty(1 << 26, dtype=torch.uint8, device=device)
    assert before - free_memory(device) >= held.numel()
    del held  # torch keeps it for the next tensor
    assert abs(before - free_memory(device)) < 1 << 25
