"""Long documents with a question each, and the bundled SmolLM2 stretched to read them."""

from __future__ import annotations

from pathlib import Path

from specrag.evaluation.data import Question, load_questions
from specrag.models import TransformersLM
from specrag.models.bundled import located
from specrag.prompts import passage_text

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def stretched_smollm2(positions: int, **options) -> TransformersLM:
    """SmolLM2-135M with YaRN beyond its 8,192 positions: quality is not the point there, the shapes are."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = located("smollm2")
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
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="float32")
    lm = TransformersLM(model, AutoTokenizer.from_pretrained(folder))
    if options.get("quantization") == "int8":
        from specrag.models.quantization import quantize_int8

        quantize_int8(lm.model)
        lm.quantization = "int8"
    return lm


def long_documents(lm: TransformersLM, tokens: int, count: int, reserve: int = 320) -> list[tuple[Question, str]]:
    """``count`` questions, each with a document of about ``tokens - reserve`` tokens that holds its gold passage."""
    questions = load_questions(DATA)
    pool = [passage_text(p) for q in questions for p in q.passages]
    made = []
    for i in range(count):
        question = questions[i]
        gold = passage_text(question.passages[question.gold[0]])
        parts, size, at = [gold], lm.count_tokens(gold), 37 * i
        while True:
            piece = pool[at % len(pool)]
            at += 1
            size += lm.count_tokens(piece) + 2
            if size > tokens - reserve:
                break
            parts.append(piece)
        depth = (i + 1) * len(parts) // (count + 1)
        parts.insert(depth, parts.pop(0))
        made.append((question, "\n\n".join(parts)))
    return made
