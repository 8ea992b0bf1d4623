"""A sequence-classification model of transformers over pairs of texts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specrag._abandoned import stop_if_abandoned
from specrag.errors import InvalidInputError
from specrag.models._loading import load_tokenizer, loading, quiet_transformers


class PairClassifier:
    """Probabilities of one class for pairs of texts.

    Args:
        model: A folder or hub id, or a loaded model.
        tokenizer: Needed with a loaded model.
        label: The class.
        batch_size: Pairs per forward pass.
    """

    def __init__(self, model: str | Path | Any, tokenizer: Any, label: str, batch_size: int) -> None:
        self.name = str(model) if isinstance(model, str | Path) else str(getattr(model, "name_or_path", "") or "nli")
        if isinstance(model, str | Path):
            from transformers import AutoModelForSequenceClassification

            tokenizer = tokenizer or load_tokenizer(model)
            with loading(model, "a sequence classifier"), quiet_transformers():
                model = AutoModelForSequenceClassification.from_pretrained(model)
        if tokenizer is None:
            raise InvalidInputError("a loaded model needs its tokenizer: NLIEvaluator(model, tokenizer)")
        if batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
        self._model, self._tokenizer, self._batch_size = model.eval(), tokenizer, batch_size
        self._class = None if model.config.num_labels == 1 else _class_of(model.config, label)
        self._lock = threading.RLock()

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[float], int]:
        """P(class) of each pair, in order, and how many tokens were read."""
        values: list[float] = []
        tokens = 0
        with self._lock, torch.inference_mode():
            for start in range(0, len(pairs), self._batch_size):
                stop_if_abandoned()
                firsts, seconds = zip(*pairs[start : start + self._batch_size], strict=True)
                batch = self._tokenizer(
                    list(firsts), list(seconds), padding=True, truncation="only_first", return_tensors="pt",
                    max_length=min(512, self._tokenizer.model_max_length),
                ).to(self._model.device)  # fmt: skip
                logits = self._model(**batch).logits.float()  # [pairs, classes]
                made = logits[:, 0].sigmoid() if self._class is None else logits.softmax(-1)[:, self._class]
                values += made.tolist()
                tokens += int(batch["attention_mask"].sum())
        return values, tokens


def _class_of(config: Any, label: str) -> int:
    names = {str(name).casefold(): int(number) for number, name in config.id2label.items()}
    if label.casefold() not in names:
        raise InvalidInputError(f"the model has no class {label!r}; it has {', '.join(names)}: give label=")
    return names[label.casefold()]
