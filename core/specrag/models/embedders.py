"""Embedders: texts to vectors. One protocol, one local implementation on transformers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from specrag.errors import InvalidInputError, ModelNotFoundError

if TYPE_CHECKING:
    import torch


class Embedder(ABC):
    """Texts to unit vectors. A subclass implements ``embed``; ``template`` makes it aware of the question."""

    name: str = "embedder"
    #: How a passage is put beside the question for emb(d | Q). An instruction-aware embedder has its own.
    template: str = "{question} {passage}"

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:  # [texts, dim], float32, unit length
        """One vector a text, in order. An empty list gives shape [0, dim] or [0, 0]."""

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:
        """``embed`` without blocking the event loop."""
        return await asyncio.to_thread(self.embed, texts)

    def given_question(self, question: str, passages: Sequence[str]) -> list[str]:
        """The texts whose embedding is emb(d | Q) (paper, section 3.1)."""
        return [self.template.format(question=question, passage=passage) for passage in passages]


def unit_vectors(vectors: Sequence[Sequence[float]]) -> np.ndarray:  # [texts, dim], float32
    """Any library's vectors as an ``Embedder`` returns them."""
    array = np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


class TransformersEmbedder(Embedder):
    """A sentence embedder of transformers (BERT-like), with masked mean or first-token pooling.

    Args:
        path: A model folder or hub id.
        template: With ``{question}`` and ``{passage}``: the instruction format of an instruction-aware
            embedder; by default question and passage together.
        max_tokens: Longer texts are cut there.
        batch_size: Texts a forward pass; by default 32 on a GPU, and 8 on the CPU, where more take longer and more memory.

    Raises:
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        template: str | None = None,
        pooling: Literal["mean", "first"] = "mean",
        max_tokens: int = 256,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        from specrag.models.transformers import quiet_transformers

        if pooling not in ("mean", "first"):
            raise InvalidInputError(f"pooling must be 'mean' or 'first', got {pooling!r}")
        if batch_size is not None and batch_size < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}")
        local = Path(path).expanduser()
        if (isinstance(path, Path) or str(path).startswith(("/", ".", "~"))) and not local.exists():
            raise ModelNotFoundError(f"no embedder at {local}: give a model folder or a hub id")
        where = str(local) if local.exists() else str(path)
        with quiet_transformers():
            try:
                self._tokenizer: Any = AutoTokenizer.from_pretrained(where)
                self._model: Any = AutoModel.from_pretrained(where, dtype=dtype or torch.float32).eval()
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(f"{path} could not be loaded as an embedder: {error}") from error
        self._model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name = str(path)
        self.template = template or self.template
        self.pooling, self.max_tokens = pooling, max_tokens
        self.batch_size = batch_size or (8 if self._model.device.type == "cpu" else 32)

    def __repr__(self) -> str:
        return f"TransformersEmbedder({self.name!r})"

    @property
    def dimension(self) -> int:
        return int(self._model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
        for at in range(0, len(texts), self.batch_size):
            batch = by_length[at : at + self.batch_size]
            encoded = self._tokenizer(
                # No token is longer than 40 characters on average: cutting first saves tokenising a whole book.
                [texts[i][: 40 * self.max_tokens] for i in batch],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._model.device)
            with torch.inference_mode():
                hidden = self._model(**encoded).last_hidden_state.float()
                if self.pooling == "mean":
                    weight = encoded["attention_mask"][..., None].float()
                    pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
                else:
                    pooled = hidden[:, 0]
                vectors[batch] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return vectors
