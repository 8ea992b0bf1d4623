"""What both trainings, of drafters and of readers, ask of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from specrag.engine.onednn import multiplies_bfloat16


class Settings(Protocol):
    """The settings that both trainings have."""

    @property
    def warmup(self) -> float:
        """The share of the steps in which the learning rate rises."""

    @property
    def precision(self) -> str:
        """``"auto"``, ``"bfloat16"`` or ``"float32"``."""

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints."""

    @property
    def seed(self) -> int:
        """Of what is drawn at random."""


def training_arguments(folder: Path, settings: Settings, device: torch.device, **own: Any) -> TrainingArguments:
    """One pass over examples that are in order, under a cosine schedule, with checkpoints in ``folder``.

    Args:
        own: The arguments of this training: its learning rate, its batches, its weight decay.
    """
    bfloat16 = settings.precision == "bfloat16" or (settings.precision == "auto" and multiplies_bfloat16(device))
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        max_grad_norm=1.0,
        bf16=bfloat16,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_pin_memory=device.type == "cuda",
        **own,
    )
