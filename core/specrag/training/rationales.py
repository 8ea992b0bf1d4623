"""Rationales β for known answers: the passage's own sentence, or a stronger LM's (paper, section 3.2)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from specrag import _blocking
from specrag.errors import ModelError
from specrag.evaluation.data import Question
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.prompts import Prompts
from specrag.schema import Passage
from specrag.verification import normalize_answer

# A rationale is cut to this many words around the answer; about 40 tokens, under the drafter's 48.
MAX_WORDS = 26
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])|\n+")
_WORD = re.compile(r"\w+")


def answer_in(passage: Passage, answers: Sequence[str]) -> str | None:
    """The longest of ``answers`` that stands in the passage as whole words, as the passage spells it."""
    for answer in sorted(answers, key=len, reverse=True):
        pattern = r"\W+".join(map(re.escape, _WORD.findall(answer)))
        found = re.search(rf"(?<!\w){pattern}(?!\w)", passage.text, re.IGNORECASE) if pattern else None
        if found:
            return found.group()
    return None


def extractive_rationale(question: str, answer: str, passage: Passage, max_words: int = MAX_WORDS) -> str | None:
    """The sentence of ``passage`` that holds ``answer`` and most of the question's words, under its title.

    A long sentence is cut to ``max_words`` words around the answer. ``None``: no sentence holds the answer.
    """
    asked = set(normalize_answer(question).split())
    holding = [s.strip() for s in _SENTENCE.split(passage.text) if _found(answer, s) >= 0]
    if not holding:
        return None
    best = max(holding, key=lambda s: len(asked & set(normalize_answer(s).split())))
    best = _around(" ".join(best.split()), answer, max_words)
    return f"{passage.title}: {best}" if passage.title else best


def _found(answer: str, text: str) -> int:
    """Where ``answer`` stands in ``text`` as whole words; -1: nowhere."""
    pattern = r"\s+".join(map(re.escape, answer.split()))
    found = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
    return found.start() if found else -1


def _around(sentence: str, answer: str, max_words: int) -> str:
    words = sentence.split()
    if len(words) <= max_words:
        return sentence
    before = len(sentence[: max(_found(answer, sentence), 0)].split())
    end = min(len(words), before + len(answer.split()) + 4)
    begin = max(0, min(before, end - max_words))
    if begin == 0:
        end = min(len(words), max(end, max_words))
    return " ".join(words[begin:end])


def synthesize_rationales(
    records: Sequence[Question],
    lm: LanguageModel,
    cache: str | Path,
    *,
    prompts: Prompts = Prompts(),
    max_tokens: int = 48,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Rationales by question id, written by a stronger LM from the gold passages and the answer.

    Every finished rationale is appended to ``cache`` (JSON lines) at once, so a run that was killed goes on
    where it stopped, and a changed record, prompt or model is asked again.

    Raises:
        ModelError: The model failed; what was finished is kept.
    """
    file = Path(cache)
    done: dict[str, str] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                done[row["key"]] = row["rationale"]
            except (json.JSONDecodeError, KeyError):
                continue  # the line in whose middle a run was killed
    keys = {record.id: _key(record, lm, prompts, max_tokens) for record in records}
    missing = [record for record in records if keys[record.id] not in done and record.gold]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        if file.stat().st_size:
            out.write("\n")  # behind a line that a killed run left unfinished
        for at in range(0, len(missing), batch):
            group = missing[at : at + batch]
            requests = [_synthesis(record, prompts, max_tokens) for record in group]
            for record, text in zip(group, _blocking.run(_written(lm, requests)), strict=True):
                done[keys[record.id]] = text
                out.write(json.dumps({"key": keys[record.id], "id": record.id, "rationale": text}) + "\n")
            out.flush()
            progress(min(at + batch, len(missing)), len(missing))
    return {record.id: done[keys[record.id]] for record in records if done.get(keys[record.id])}


def _synthesis(record: Question, prompts: Prompts, max_tokens: int) -> GenerationRequest:
    gold = [record.passages[i] for i in record.gold]
    turn = Turn.of("user", prompts.synthesis_text(record.question, record.answers[0], gold))
    return GenerationRequest(turns=(turn,), stages=(Stage("", max_tokens, ("\n",)),))


def _key(record: Question, lm: LanguageModel, prompts: Prompts, max_tokens: int) -> str:
    asked = _synthesis(record, prompts, max_tokens).turns[0].text
    return hashlib.sha256(f"{lm.name}\n{max_tokens}\n{asked}".encode()).hexdigest()[:16]


async def _written(lm: LanguageModel, requests: Sequence[GenerationRequest]) -> list[str]:
    if lm.capabilities.batched:
        completions = await lm.agenerate(list(requests))
    else:
        completions = [c for (c,) in await asyncio.gather(*(lm.agenerate([request]) for request in requests))]
    texts = [completion.parts[0].text.strip() for completion in completions]
    if not any(texts):
        raise ModelError(f"{lm.name} wrote no rationale for {len(texts)} questions in a row")
    return texts
