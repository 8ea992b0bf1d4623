"""Shared real parts: each model is loaded once per session. Weights come from `specrag models fetch`."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specrag.engine import forward, step
from specrag.evaluation.data import load_questions
from specrag.models import TransformersLM, bundled
from specrag.models.bundled import located

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEMO = Path(__file__).parent.parent / "core" / "specrag" / "data" / "demo.jsonl"

# Tests that take more than two seconds on two cores (`pytest --durations=60`), besides those with the mark in their
# file. `make fast` leaves out what is marked `slow`.
SLOW = {
    "test_a_conversation_goes_on_in_its_session",
    "test_a_documents_session_is_used_again_and_the_oldest_goes",
    "test_a_long_common_beginning_changes_nothing",
    "test_a_model_is_written_by_its_path_and_read_again",
    "test_a_padded_batch_generates_what_each_prompt_generates_alone",
    "test_a_stream_carries_text_usage_and_how_it_was_decoded",
    "test_all_conversations_are_scored_in_one_forward_pass_without_padding",
    "test_components_are_written_and_read",
    "test_conversation",
    "test_core_langchain_and_llamaindex_give_the_same_answer",
    "test_every_form_of_a_call_gives_the_same_reply_and_its_event_once",
    "test_init_time",
    "test_int8_weights_keep_the_likely_tokens",
    "test_it_answers_asynchronously_and_in_batches",
    "test_nothing_touches_the_default_llm",
    "test_options_and_refusals_of_rapid",
    "test_real_drafts_are_made_scored_and_chosen_over_real_passages",
    "test_retrieved_chunks_stand_in_document_order_within_the_budget",
    "test_sampling_repeats_under_a_seed_and_differs_between_seeds",
    "test_scores_equal_token_by_token_scoring",
    "test_stages_put_headers_into_the_models_mouth_and_score_only_what_it_wrote",
    "test_stop_seed_and_temperature_per_call",
    "test_the_text_interface",
    "test_two_streams_at_once_do_not_share_a_session",
    "test_vllm_drafter_and_verifier_answer_like_the_in_process_pipeline",
    "test_vllm_drafts_agree_with_the_in_process_model",
}


def pytest_addoption(parser):
    parser.addoption("--vllm-url", help="run the recorded server tests against this live vLLM instead")
    parser.addoption("--openai-like-python", help="a Python that has llama-index-llms-openai-like (needs openai<3)")
    parser.addoption("--llamacpp-url", help="run the recorded llama.cpp tests against this live server instead")


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item, "originalname", item.name) in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def smollm2() -> TransformersLM:
    return bundled("smollm2")


@pytest.fixture(scope="session")
def quick_smollm2() -> TransformersLM:
    """The same with int8 weights: half the time, for tests of what stands around the model."""
    return bundled("smollm2", quantization="int8")


@pytest.fixture(scope="session")
def quick_drafter() -> TransformersLM:
    """The bundled drafter as `specrag ask` loads it on a CPU."""
    return bundled("smollm2-rag-drafter", quantization="int8")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return located("smollm2")


@pytest.fixture(scope="session")
def minilm():
    return bundled("minilm")


@pytest.fixture(scope="session")
def reader():
    return bundled("minilm-reader")


@pytest.fixture(scope="session")
def questions():
    return load_questions(DEMO)


def tiny_llama(vocabulary: int, seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(settings | config))).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path):
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Qwen2.5's, with its chat template and fewer merges: `<tool_call>` is one of its tokens."""
    written = gzip.decompress((TOKENIZERS / "qwen2.5.json.gz").read_bytes()).decode()
    template = (TOKENIZERS / "qwen2.5.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(written), chat_template=template, eos_token="<|im_end|>"
    )


@pytest.fixture(scope="session")
def tiny_qwen(qwen_tokenizer) -> TransformersLM:
    """Qwen2.5's tokenizer on random weights."""
    return TransformersLM(tiny_llama(len(qwen_tokenizer), max_position_embeddings=8192), qwen_tokenizer)


@pytest.fixture(scope="session")
def tiny(smollm2_tokenizer) -> TransformersLM:
    """SmolLM2's tokenizer on random weights."""
    return TransformersLM(tiny_llama(len(smollm2_tokenizer), max_position_embeddings=8192), smollm2_tokenizer)


@pytest.fixture(scope="session")
def tiny_path(tiny, tmp_path_factory) -> Path:
    """The folder of ``tiny``."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other(smollm2_tokenizer) -> TransformersLM:
    """A drafter for ``tiny`` that mostly disagrees, with a padded vocabulary."""
    size = len(smollm2_tokenizer) + 64
    return TransformersLM(tiny_llama(size, seed=5, max_position_embeddings=8192), smollm2_tokenizer)


@pytest.fixture(scope="session")
def twin(smollm2_tokenizer) -> TransformersLM:
    """``tiny``'s shape with other weights: keys and values that mean nothing to it."""
    return TransformersLM(tiny_llama(len(smollm2_tokenizer), seed=5, max_position_embeddings=8192), smollm2_tokenizer)


@pytest.fixture(scope="session")
def wordpiece_lm() -> TransformersLM:
    """BERT's WordPiece tokenizer, no chat template, random weights: another family of tokenizers."""
    tokenizer = AutoTokenizer.from_pretrained(located("minilm"))
    return TransformersLM(tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="session")
def unigram_lm(questions) -> TransformersLM:
    """A SentencePiece-like Unigram tokenizer with a beginning-of-sequence token, trained on the sample."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator((p.text for q in questions for p in q.passages), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return TransformersLM(tiny_llama(len(fast), seed=1), fast)


@pytest.fixture
def forward_passes(monkeypatch):
    """Counts forward passes: ``counts = forward_passes(model)``, then ``len(counts)``; entries are token counts."""
    handles = []

    def watch(model) -> list[int]:
        counts: list[int] = []
        handles.append(
            model.register_forward_pre_hook(
                lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
            )
        )
        ours = forward.decoder_forward  # passes by a model's hooks where they came after the conversation began

        def watched(own, ids, *args):
            if own is model:
                counts.append(ids.numel())
            return ours(own, ids, *args)

        native = step.NativeDecoder.run

        def watched_natively(own, tokens, *args):
            if own.model is model:
                counts.append(len(tokens))
            return native(own, tokens, *args)

        monkeypatch.setattr(forward, "decoder_forward", watched)
        monkeypatch.setattr(step.NativeDecoder, "run", watched_natively)
        return counts

    yield watch
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def chromium():
    """A Chromium of the system, or the one that `playwright install chromium` brought; closed before other modules."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are opened with playwright: make .venv/.dev")
    with playwright.sync_playwright() as started:
        path = next(filter(None, map(shutil.which, BROWSERS)), started.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip(f"no Chromium: install one of {', '.join(BROWSERS)}, or run `playwright install chromium`")
        # Chromium's sandbox refuses to run as root, as in containers.
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()
