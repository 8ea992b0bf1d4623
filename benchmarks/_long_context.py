"""Long documents with a question each, and the bundled SmolLM2, or another model, stretched to read them."""

from __future__ import annotations

from pathlib import Path

import torch

from specrag.engine.onednn import unpack, use_onednn
from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.long_documents import LongDocuments, spread
from specrag.models import TransformersLM
from specrag.models.bundled import located

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"
#: Random weights of these shapes, for timing alone, where no such model is to be had.
SHAPES = {
    "8b": {  # Llama-3.1-8B
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
CUDA = torch.cuda.is_available()


def stock_model(positions: int, folder: Path | None = None, shape: str | None = None):
    """SmolLM2-135M, or what lies in ``folder``, as transformers loads it, or random weights of a shape; float32, on a GPU
    bfloat16. With YaRN beyond its positions: quality is not the point there, the shapes are."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    dtype = torch.bfloat16 if CUDA else torch.float32
    if shape is not None:
        with torch.device("cuda" if CUDA else "cpu"):
            return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype).eval()
    folder = folder or located("smollm2")
    config = AutoConfig.from_pretrained(folder)
    if positions > config.max_position_embeddings:
        original = config.max_position_embeddings
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "yarn",
            "factor": positions / original,
            "original_max_position_embeddings": original,
        }
        config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()
    return model.to("cuda") if CUDA else model


def stretched_model(positions: int, folder: Path | None = None, shape: str | None = None, **options) -> TransformersLM:
    """The same as our model; on the CPU with its weights laid out as those of a model that we load ourselves."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or located("smollm2"))
    lm = TransformersLM(stock_model(positions, folder, shape), tokenizer, **options)
    if not CUDA:
        unpack(lm.model)
        use_onednn(lm.model, pack=True)
    return lm


def long_document(lm: TransformersLM, tokens: int, count: int, reserve: int = 320) -> tuple[list[Question], str]:
    """``count`` questions, and one document of about ``tokens - reserve`` tokens that holds all their gold passages."""
    questions = load_questions(DATA)
    made = _documents(lm, questions, tokens - reserve).share(questions[:count], spread(count))
    return made, made[0].context


def long_documents(lm: TransformersLM, tokens: int, count: int, reserve: int = 320) -> list[tuple[Question, str]]:
    """``count`` questions, each with a document of about ``tokens - reserve`` tokens that holds its gold passage."""
    questions = load_questions(DATA)
    documents = _documents(lm, questions, tokens - reserve)
    made = [documents.make(question, depth) for question, depth in zip(questions, spread(count), strict=False)]
    return [(question, question.context) for question in made]


def _documents(lm: TransformersLM, questions: list[Question], tokens: int) -> LongDocuments:
    """Documents longer than all the passages together repeat them."""
    corpus = [passage for question in questions for passage in question.passages]
    return LongDocuments(corpus, lm.count_tokens, tokens, repeat=True)
