"""Long documents with questions, and a model whose positions reach over them: the bundled SmolLM2 or another."""

from __future__ import annotations

from pathlib import Path

import torch

from specrag.engine.onednn import unpack, use_onednn
from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.long_documents import LongDocuments, spread
from specrag.models import TransformersLM
from specrag.models.bundled import located

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"
#: Shapes for random weights, where such a model is not at hand. They are for timing only.
SHAPES = {
    "8b": {  # Llama-3.1-8B
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "tiny": {  # to try a benchmark out
        "vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
CUDA = torch.cuda.is_available()


def stock_model(positions: int, folder: Path | None = None, shape: str | None = None):
    """A model as transformers loads it: float32 on the CPU, bfloat16 on a GPU.

    Args:
        positions: Beyond those that the model was trained with, YaRN stretches them. Quality is not the point there.
        folder: Where the model lies; by default SmolLM2-135M.
        shape: Random weights of this shape in its place.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    dtype = torch.bfloat16 if CUDA else torch.float32
    if shape is not None:
        torch.manual_seed(0)  # two models of one shape have the same weights
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
    """``stock_model`` as a ``TransformersLM``. On the CPU its weights are laid out as a loaded model's are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder or located("smollm2"))
    lm = TransformersLM(stock_model(positions, folder, shape), tokenizer, **options)
    if not CUDA:
        unpack(lm.model)
        use_onednn(lm.model, pack=True)
    return lm


def long_document(lm: TransformersLM, tokens: int, count: int, reserve: int = 320) -> tuple[list[Question], str]:
    """``count`` questions, and one document of about ``tokens - reserve`` tokens with all their gold passages."""
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
