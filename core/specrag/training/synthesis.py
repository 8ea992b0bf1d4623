"""Training data that a stronger LM writes: rationales for known answers, and questions for passages that have none.

Each reply is appended to a file of JSON lines at once, so a run that was killed continues where it stopped.
A record is asked about again when the record, the prompt or the model changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from specrag import _blocking
from specrag._files import writing
from specrag.errors import InvalidInputError, ModelError
from specrag.evaluation.data import Question
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.models.embedders import Embedder
from specrag.schema import Passage
from specrag.speculative.prompts import Prompts
from specrag.text import normalize_answer, passage_text
from specrag.training.rationales import answer_in

Progress = Callable[[int, int], None]

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
    return {name: text for name, (text,) in _replies(requests, lm, cache, batch, progress).items() if text}


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
        for text, replies in _replies(requests, lm, cache, batch, progress).items()
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


def _replies(
    requests: Mapping[str, GenerationRequest], lm: LanguageModel, cache: str | Path, batch: int, progress: Progress
) -> dict[str, list[str]]:
    """What the LM wrote in the stages of each request, by its name; only requests that ``cache`` lacks are sent."""
    file = Path(cache)
    done: dict[str, list[str]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                key, reply = row["key"], row["reply"]
            except (ValueError, KeyError, TypeError):
                continue  # a killed run left half a line
            if isinstance(key, str) and isinstance(reply, list) and all(isinstance(text, str) for text in reply):
                done[key] = reply
    keys = {name: _key(request, lm) for name, request in requests.items()}
    missing = [name for name, key in keys.items() if key not in done]
    missing.sort(key=lambda name: len(requests[name].turns[0].text))  # a batch is as slow as its longest
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file), file.open("a", encoding="utf-8") as out:
        if file.stat().st_size:
            out.write("\n")  # after a line that a killed run left unfinished
        for at in range(0, len(missing), batch):
            group = missing[at : at + batch]
            for name, reply in zip(group, _blocking.run(_written(lm, [requests[n] for n in group])), strict=True):
                done[keys[name]] = reply
                out.write(json.dumps({"key": keys[name], "reply": reply}) + "\n")
            out.flush()
            progress(min(at + batch, len(missing)), len(missing))
    return {name: done[key] for name, key in keys.items()}


def _key(request: GenerationRequest, lm: LanguageModel) -> str:
    asked = [lm.name, request.turns[0].text, *(f"{stage.header}\n{stage.max_tokens}" for stage in request.stages)]
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]


async def _written(lm: LanguageModel, requests: Sequence[GenerationRequest]) -> list[list[str]]:
    if lm.capabilities.batched:
        completions = await lm.agenerate(list(requests))
    else:
        completions = [c for (c,) in await asyncio.gather(*(lm.agenerate([request]) for request in requests))]
    replies = [[part.text.strip() for part in completion.parts] for completion in completions]
    if not any(map(any, replies)):
        raise ModelError(f"{lm.name} replied nothing to {len(replies)} requests in a row")
    return replies
