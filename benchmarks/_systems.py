"""What the benchmarks of systems over long documents share: models, questions, progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _long_context import CUDA, stretched_model

from specrag.evaluation.data import Question, load
from specrag.evaluation.long_data import filler_of
from specrag.evaluation.runs import AnswerRow
from specrag.models import TransformersLM
from specrag.schema import Passage

DATA = Path(__file__).parent / "data"


def loaded(path: Path | None) -> TransformersLM:
    """The model at ``path`` in bfloat16; without a path a tiny one with random weights, to try a script out."""
    if path is None:
        return stretched_model(32_768, shape="tiny")
    fast = CUDA or torch.backends.mkldnn.is_available()
    return TransformersLM(path, dtype=torch.bfloat16 if fast else torch.float32)


def questions(count: int) -> list[Question]:
    """NQ and HotpotQA, taking turns."""
    nq, hotpot = load(DATA / "nq_dev_10_passages.jsonl"), load(DATA / "hotpotqa_dev.jsonl")
    pairs = [question for pair in zip(nq, hotpot, strict=False) for question in pair]
    return [*pairs, *nq[len(hotpot) :]][:count]


def corpus() -> list[Passage]:
    """Passages of both sets, to fill documents with."""
    return filler_of([q for name in ("nq_dev_10_passages", "hotpotqa_dev") for q in load(DATA / f"{name}.jsonl")])


class Told:
    """Prints each question's rows in a few lines, and the time that is left."""

    def __init__(self, total: int) -> None:
        self._total, self._last, self._began = total, "", time.monotonic()

    def __call__(self, row: AnswerRow, done: int, left: float | None) -> None:
        if row.id != self._last:
            self._last = row.id
            rest = "" if left is None else f", about {left / 60:.0f} min left"
            print(
                f"[{time.monotonic() - self._began:6.0f} s] question {done + 1} of {self._total}{rest}: {row.id}",
                flush=True,
            )
        made = row.rapid or {}
        speed = f"{made.get('tokens_per_second') or 0:5.1f} tokens/s"
        share = made.get("acceptance")
        accepted = "    " if share is None else f"{share:4.0%}"
        right = "right" if row.right else "     "
        said = row.error or " ".join(row.text.split())
        print(f"    {row.system:30} {right} {accepted} {speed} {row.seconds:5.1f} s  {said:.70}", flush=True)


def names_of(text: str) -> Sequence[str]:
    """Names from a list with commas."""
    return [name for name in text.split(",") if name]
