"""The model card of a trained drafter: README.md to read, training.json for programs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from specrag.models.base import LanguageModel
from specrag.training.quality import DraftingQuality
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
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
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
    lines += ["", "Made by:", "", f"    {facts['command']}", ""]
    (output / "README.md").write_text("\n".join(lines), encoding="utf-8")
