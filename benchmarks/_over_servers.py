"""What the benchmarks over servers share: questions, their index, and pipelines for a small language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from specrag import Passage, SpeculativeRAG
from specrag.evaluation.data import load_questions
from specrag.models import OpenAILM, bundled
from specrag.models.base import LanguageModel
from specrag.models.bundled import located
from specrag.retrieval import PassageIndex
from specrag.serving import Models
from specrag.speculative.prompts import Prompts

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"
QUESTIONS = 30
TOP = 6


@cache
def questions() -> list[str]:
    return [question.question for question in load_questions(DATA)[:QUESTIONS]]


def index() -> PassageIndex:
    """The passages of all the questions, each cut to 40 words."""
    made = PassageIndex(bundled("minilm"))
    for question in load_questions(DATA)[:QUESTIONS]:
        made.add(Passage(" ".join(p.text.split()[:40]), title=p.title) for p in question.passages)
    return made


def server(model: str, urls: Sequence[str], tokenizer: str = "smollm2") -> OpenAILM:
    return OpenAILM(model, list(urls), tokenizer=located(tokenizer))


def pipeline(
    drafter: LanguageModel, verifier: LanguageModel, deadline: float | None = None, *, short: bool = False
) -> SpeculativeRAG:
    """``short``: fewer and shorter drafts, where only their fate counts."""
    return SpeculativeRAG(
        drafter=drafter,
        verifier=verifier,
        drafts=2 if short else 3,
        passages_per_draft=1 if short else 2,
        prompts=Prompts.for_small_models(),
        max_rationale_tokens=12 if short else 24,
        max_answer_tokens=6 if short else 12,
        deadline=deadline,
    )


def over_servers(
    model: str,
    drafters: Sequence[str],
    verifiers: Sequence[str],
    deadline: float | None = None,
    folder: Path | None = None,
    *,
    short: bool = False,
) -> Models:
    """What `specrag serve` serves. Importable, for its process. ``folder``: of the index, where it is saved."""
    rag = pipeline(server(model, drafters), server(model, verifiers), deadline, short=short)
    found = index() if folder is None else PassageIndex.load(folder, bundled("minilm"))
    return Models(rag=rag.replace(embedder=found.embedder), indexes={"nq": found}, embedder=found.embedder)
