"""Training data that a stronger LM writes: rationales for known answers, and questions for passages that have none.

Each reply is kept in a file of JSON lines (``replies``), so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specrag.errors import InvalidInputError
from specrag.evaluation.data import Question
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.speculative.prompts import Prompts
from specrag.text import normalize_answer, passage_text
from specrag.training.rationales import answer_in
from specrag.training.replies import Progress, replies_of

#: A longer answer is a sentence, and that is the rationale's part.
MAX_ANSWER_WORDS = 8
# A question with one of these words cannot be understood without its passage.
_POINTS_AT_PASSAGE = re.compile(r"\b(passage|text|article|paragraph|according to)\b", re.IGNORECASE)


def synthesize_rationales(
    records: Sequence[Question],
    lm: LanguageModel,
    cache: str | Path,
    *,
    prompts: Prompts = Prompts(),
    max_tokens: int = 48,
    batch: int = 8,
    progress: Progress = lambda done, total: None,
) -> dict[str, str]:
    """Rationales by question id, written by a stronger LM from the gold passages and the answer (paper, section 3.2).

    Args:
        cache: File of the LM's replies; it is created if it does not exist.
        progress: Called with the number of rationales written and their total.

    Raises:
        ModelError: The model failed; finished replies are kept.
    """
    requests = {}
    for record in records:
        if gold := [record.passages[i] for i in record.gold]:
            asked = prompts.synthesis_text(record.question, record.answers[0], gold)
            requests[record.id] = GenerationRequest((Turn.of("user", asked),), (Stage("", max_tokens, ("\n",)),))
    return {name: text for name, (text,) in replies_of(requests, lm, cache, batch, progress).items() if text}


def synthesize_questions(
    passages: Sequence[Passage],
    lm: LanguageModel,
    embedder: Embedder,
    cache: str | Path,
    *,
    per_passage: int = 3,
    prompts: Prompts = Prompts(),
    batch: int = 16,
    progress: Progress = lambda done, total: None,
) -> list[Question]:
    """Questions with answers, written by a stronger LM about passages without questions.

    A question is kept only if its answer appears verbatim in its passage, is short, and is not in the question itself.
    It must differ from all others, and its own passage must be the nearest to it: "when was it released" fits any film
    (the consistency filter of Promptagator, Dai et al., arXiv 2209.11755, section 3.2).

    Args:
        embedder: Finds the passage that is nearest to a question.
        cache: File of the LM's replies; it is created if it does not exist.
        per_passage: How many questions are written per passage; fewer are kept.
        batch: Passages per call of a batching LM.
        progress: Called with the number of passages asked about and their total.

    Raises:
        ModelError: The model failed; finished replies are kept.
        InvalidInputError: No passages, or ``per_passage`` below 1.
    """
    if not passages or per_passage < 1:
        raise InvalidInputError(
            f"got {len(passages)} passages and per_passage={per_passage}: give at least one of each"
        )
    by_text = {passage_text(p): p for p in passages}
    pair = (Stage("\nQuestion:", 28, ("\n",)), Stage("\nAnswer:", 16, ("\n",)))
    stages = (Stage("Question:", 28, ("\n",)), *(pair * per_passage)[1:])
    requests = {
        text: GenerationRequest((Turn.of("user", prompts.questions_text(passage)),), stages)
        for text, passage in by_text.items()
    }
    written = [
        (text, question, answer)
        for text, replies in replies_of(requests, lm, cache, batch, progress).items()
        for question, reply in zip(replies[::2], replies[1::2], strict=True)
        if (answer := _answer(question, reply, by_text[text])) is not None
    ]
    if not written:
        return []
    texts = list(by_text)
    nearest = np.argmax(embedder.embed([question for _, question, _ in written]) @ embedder.embed(texts).T, axis=1)
    kept: dict[str, Question] = {}
    for at, (text, question, answer) in zip(nearest, written, strict=True):
        if texts[at] == text:
            asked = normalize_answer(question)
            name = f"synthetic-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
            kept.setdefault(asked, Question(name, question, (answer,), (by_text[text],), (0,)))
    return list(kept.values())


def _answer(question: str, reply: str, passage: Passage) -> str | None:
    """The answer in ``reply`` as the passage spells it; ``None`` when the pair must be dropped."""
    answer = answer_in(passage, [reply])
    if answer is None or len(answer.split()) > MAX_ANSWER_WORDS or len(question.split()) < 4:
        return None
    told = f" {normalize_answer(answer)} " in f" {normalize_answer(question)} "
    return None if told or _POINTS_AT_PASSAGE.search(question) else answer
