"""Embedders: texts to vectors. One interface, one implementation in this process and one behind a server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from specrag import _blocking
from specrag._abandoned import in_thread
from specrag._extras import require
from specrag._unicode import well_formed
from specrag.errors import InvalidInputError, ServerError
from specrag.text import check_texts

if TYPE_CHECKING:
    import torch

#: What else makes perspectives where no model runs in this process.
WITHOUT_LOCAL_EMBEDDER = (
    "give embedder=OpenAIEmbedder(base_url, model), an embeddings endpoint, or passages that all have an embedding"
)


class Embedder(ABC):
    """Texts to unit vectors. A subclass implements ``embed``.

    Attributes:
        name: Which embedder it is. A saved index says which one made it.
        template: The text of emb(d | Q), with ``{question}`` and ``{passage}``. An instruction-aware embedder has its
            own.
    """

    name: str = "embedder"
    template: str = "{question} {passage}"

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:  # [texts, dim], float32, unit length
        """One vector per text, in order. Without texts, the shape is [0, dim] or [0, 0]."""

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:  # [texts, dim], float32, unit length
        """``embed`` without blocking the event loop."""
        return await in_thread(self.embed, texts)

    def given_question(self, question: str, passages: Sequence[str]) -> list[str]:
        """The texts whose embedding is emb(d | Q) (Speculative RAG, arXiv 2407.08223, section 3.1)."""
        return [self.template.format(question=question, passage=passage) for passage in passages]


def unit_vectors(vectors: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:  # [texts, dim], float32
    """Any library's vectors as an ``Embedder`` returns them."""
    array = np.asarray(vectors, dtype=np.float32).reshape(len(vectors), -1)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)


class TransformersEmbedder(Embedder):
    """A sentence embedder of transformers (BERT-like), with masked mean or first-token pooling. Runs in this process.

    Args:
        path: A model folder or hub id.
        template: With ``{question}`` and ``{passage}``: the format of an instruction-aware embedder; by default the
            question, then the passage.
        max_tokens: Longer texts are cut there.
        batch_size: Texts per forward pass; by default 32 on a GPU, and 8 on the CPU, where more take longer and need
            more memory.

    Raises:
        MissingExtraError: The extra ``local`` is not installed.
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
        InvalidInputError: A setting cannot be used.
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
        require("torch", "local", "TransformersEmbedder", otherwise=WITHOUT_LOCAL_EMBEDDER)
        import torch

        from specrag.models._loading import load_tokenizer, loading, quiet_transformers, source_of

        if pooling not in ("mean", "first"):
            raise InvalidInputError(f"pooling must be 'mean' or 'first', got {pooling!r}")
        _check_at_least_one(batch_size=batch_size, max_tokens=max_tokens)
        where, options = source_of(path, "embedder")
        self._tokenizer: Any = load_tokenizer(path)
        with quiet_transformers() as transformers, loading(path, "an embedder"):
            model = transformers.AutoModel.from_pretrained(where, dtype=dtype or torch.float32, **options)
        self._model: Any = model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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

        check_texts(texts)
        texts = [*map(well_formed, texts)]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
        for at in range(0, len(texts), self.batch_size):
            batch = by_length[at : at + self.batch_size]
            encoded = self._tokenizer(
                # No token is longer than 40 characters on average: to cut first saves tokenising a whole book.
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


class OpenAIEmbedder(Embedder):
    """An embedder behind one or several OpenAI-compatible ``/embeddings`` endpoints. Needs no torch.

    Args:
        base_url: Up to and including ``/v1``. Several URLs are one pool: each request goes to the least busy server.
        model: The name under which the server knows it.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        template: With ``{question}`` and ``{passage}``: the format of an instruction-aware embedder; by default the
            question, then the passage.
        dimensions: Asked of the server, where the model can shorten its vectors; by default the model's own.
        batch_size: Texts per request.
        max_concurrency: Requests under way at once, per URL.
        max_waiting: Requests that may wait for their turn; a further one is a ``ServerBusyError``.
        timeout: Seconds for one request.
        retries: How often a request is repeated after 408, 409, 429, 5xx or a connection error.
        backoff: Seconds before the first repetition, doubled for each further one. ``Retry-After`` is obeyed.

    Raises:
        InvalidInputError: An argument cannot be used.

    Example:
        >>> embedder = OpenAIEmbedder("http://127.0.0.1:8000/v1", "bge-small-en")
        >>> rag = SpeculativeRAG(drafter=model, embedder=embedder)  # doctest: +SKIP
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        api_key: str | None = None,
        *,
        template: str | None = None,
        dimensions: int | None = None,
        batch_size: int = 64,
        max_concurrency: int = 8,
        max_waiting: int = 1024,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        from specrag.models._servers import ServerPool  # httpx is loaded when a server is used

        _check_at_least_one(batch_size=batch_size, dimensions=dimensions)
        self._pool = ServerPool(
            base_url,
            model,
            api_key=api_key,
            max_concurrency=max_concurrency,
            max_waiting=max_waiting,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
        )
        self.name = model
        self.template = template or self.template
        self.batch_size, self.dimensions = batch_size, dimensions

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({[str(server) for server in self._pool.servers]}, {self.name!r})"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return _blocking.run(self.aembed(texts))

    async def aembed(self, texts: Sequence[str]) -> np.ndarray:
        """One vector per text, in order.

        Raises:
            InvalidInputError: ``texts`` is no list of texts.
            ServerError: The server could not be reached, refused a text, or gave a reply that cannot be used.
        """
        from specrag.models._servers import all_or_none

        check_texts(texts)
        starts = range(0, len(texts), self.batch_size)
        batches = [self._batch(texts[at : at + self.batch_size]) for at in starts]
        made = await all_or_none(batches, self._pool.at_once)
        dimensions = {batch.shape[1] for batch in made}
        if len(dimensions) > 1 or (self.dimensions is not None and dimensions - {self.dimensions}):
            shown = ", ".join(map(str, sorted(dimensions)))
            asked = f"{self.dimensions} were asked for" if self.dimensions else "expected one for all texts"
            raise ServerError(f"{self._pool}: embeddings of {shown} dimensions, {asked}")
        return unit_vectors(np.concatenate(made)) if made else np.empty((0, self.dimensions or 0), dtype=np.float32)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._pool.aclose()

    async def _batch(self, texts: Sequence[str]) -> np.ndarray:  # [texts, dim], float32
        from specrag.models._replies import read_embeddings

        body = {"input": [*map(well_formed, texts)], "dimensions": self.dimensions}
        vectors: np.ndarray = await self._pool.post(
            "embeddings", body, lambda reply: read_embeddings(reply, len(texts))
        )
        return vectors


def _check_at_least_one(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
