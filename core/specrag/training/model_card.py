"""The model card of a trained drafter or reader: README.md for people, training.json for programs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specrag.models.base import LanguageModel
from specrag.training.quality import DraftingQuality
from specrag.training.reader import ReaderSettings
from specrag.training.reader_examples import ReaderMixture
from specrag.training.reader_quality import ReaderQuality
from specrag.training.settings import TrainingSettings


def write_card(
    output: Path,
    base: LanguageModel,
    settings: TrainingSettings,
    examples: int,
    left_out: int,
    metrics: Mapping[str, float],
    quality: DraftingQuality | None,
    card: Mapping[str, str],
) -> None:
    """Write the two files into ``output``.

    Args:
        examples, left_out: How many were trained on, and how many were too long.
        metrics: What transformers' Trainer measured over the run.
        quality: On the held part, if there is one.
        card: Lines of the user: data, licence.
    """
    facts = {
        "base": base.name,
        "settings": dataclasses.asdict(settings),
        "examples": examples,
        "left_out": left_out,
        "training": dict(metrics),
        "held": None if quality is None else dataclasses.asdict(quality),
        "command": shlex.join(sys.argv),
        **card,
    }
    lines = [f"# A drafter for Speculative RAG, made from {Path(base.name).name}", ""]
    lines += [f"- **{name}**: {text}" for name, text in card.items()]
    lines += [
        f"- **method**: {settings.method}" + (f", rank {settings.rank}" if settings.method == "lora" else ""),
        f"- **examples**: {examples} ({left_out} longer than {settings.max_tokens} tokens left out), "
        f"batches of {settings.batch_size}, peak learning rate {settings.peak:g}",
        f"- **loss** (mean over the run): {metrics.get('train_loss', float('nan')):.3f}",
    ]
    if quality is not None:
        low, high = quality.right_interval
        lines += [
            f"- **held part**: {quality.right:.1%} right of {quality.answerable} that can be answered "
            f"(95 % interval {low:.1%} to {high:.1%}), {quality.wrongly_abstained:.1%} of them abstained; "
            f"{quality.rightly_abstained:.1%} of {quality.unanswerable} that cannot were abstained from"
        ]
        if quality.separation is not None:
            lines += [
                f"- **verdicts on the held part**: area under the ROC curve {quality.separation:.2f} "
                f"over {quality.verdicts} drafts (1: every right draft is judged better than every wrong one)"
            ]
    _write(output, facts, lines)


def write_reader_card(
    output: Path,
    base: str,
    settings: ReaderSettings,
    mixture: ReaderMixture,
    examples: int,
    quality: ReaderQuality | None,
    card: Mapping[str, str],
) -> None:
    """Write the two files of a span reader into ``output``.

    Args:
        base: What was trained: a bundled model's name, a folder or a hub id.
        examples: How many were trained on, all rounds together.
        quality: On the held part, if there is one.
        card: Lines of the user: data, licence.
    """
    facts = {
        "base": base,
        "settings": dataclasses.asdict(settings),
        "mixture": dataclasses.asdict(mixture),
        "examples": examples,
        "held": None if quality is None else dataclasses.asdict(quality),
        "command": shlex.join(sys.argv),
        **card,
    }
    name = Path(base).name
    lines = [f"# A span reader for Speculative RAG, made from {name}", ""]
    lines += [
        "It finds the spans of passages that answer a question:",
        "",
        "    from specrag.models import load_reader",
        '    reader = load_reader("this folder")',
        "",
    ]
    lines += [f"- **{key}**: {text}" for key, text in card.items()]
    kept = "" if settings.train_embeddings or settings.method == "lora" else "; the embeddings are the base's"
    lines += [
        f"- **method**: {settings.method}" + (f", rank {settings.rank}" if settings.method == "lora" else kept),
        f"- **examples**: {examples}, at most {settings.rows} passages per step, "
        f"peak learning rate {settings.learning_rate:g}",
    ]
    if quality is not None:
        low, high = quality.right_interval
        lines += [
            f"- **held part**: the best span is right for {quality.right:.1%} of {quality.answerable} questions that "
            f'can be answered (95 % interval {low:.1%} to {high:.1%}); "no span answers" is likelier than not for '
            f"{quality.wrongly_doubted:.1%} of them, and for {quality.rightly_doubted:.1%} of {quality.unanswerable} "
            "that cannot"
        ]
    _write(output, facts, lines)


def _write(output: Path, facts: Mapping[str, Any], lines: Sequence[str]) -> None:
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    made_by = ["", "Made by:", "", f"    {facts['command']}", ""]
    (output / "README.md").write_text("\n".join([*lines, *made_by]), encoding="utf-8")
