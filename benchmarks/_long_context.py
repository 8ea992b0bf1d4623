"""Long documents with a question each, and the bundled SmolLM2 stretched to read them."""

from __future__ import annotations

from pathlib import Path

from specrag.evaluation.data import Question, load_questions
from specrag.models import TransformersLM
from specrag.models.bundled import located
from specrag.models.linear import unpack, use_onednn
from specrag.prompts import passage_text

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def stock_smollm2(positions: int):
    """SmolLM2-135M as transformers loads it, with YaRN beyond its 8,192 positions: quality is not the point there, the
    shapes are."""
    from transformers import AutoConfig, AutoModelForCausalLM

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
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="float32").eval()


def stretched_smollm2(positions: int, **options) -> TransformersLM:
    """The same as our model, with its weights laid out as those of a model that we load ourselves."""
    from transformers import AutoTokenizer

    lm = TransformersLM(stock_smollm2(positions), AutoTokenizer.from_pretrained(located("smollm2")), **options)
    unpack(lm.model)
    use_onednn(lm.model, pack=True)
    return lm


def long_document(lm: TransformersLM, tokens: int, count: int, reserve: int = 320) -> tuple[list[Question], str]:
    """``count`` questions, and one document of about ``tokens - reserve`` tokens that holds all their gold passages."""
    questions = load_questions(DATA)
    asked = questions[:count]
    golds = [passage_text(q.passages[q.gold[0]]) for q in asked]
    known = {*golds}
    parts: list[str] = []
    size = sum(lm.count_tokens(text) + 2 for text in golds)
    for text in dict.fromkeys(passage_text(p) for q in questions for p in q.passages):
        if text in known:
            continue
        size += lm.count_tokens(text) + 2
        if size > tokens - reserve:
            break
        parts.append(text)
    for i, text in enumerate(golds):
        parts.insert((i + 1) * len(parts) // (count + 1), text)
    return asked, "\n\n".join(parts)


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
