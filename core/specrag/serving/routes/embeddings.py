"""``/v1/models`` and ``/v1/embeddings``."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request

from specrag.serving.errors import not_found, of_failure, refused
from specrag.serving.logs import log
from specrag.serving.models import EMBEDDER
from specrag.serving.requests import EmbeddingRequest
from specrag.serving.routes._common import OwnerOf, StateOf, unless_gone

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """The models that this key may use."""
    models = state.loaded
    return {"object": "list", "data": [models.described(name) for name in models.names(owner)]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, state: StateOf, owner: OwnerOf) -> dict[str, Any]:
    """One of them."""
    if name not in state.loaded.names(owner):
        raise not_found(f"the model {name[:80]!r}", "model", "model_not_found")
    return state.loaded.described(name)


@router.post("/v1/embeddings")
async def embeddings(
    request: Request, body: Annotated[EmbeddingRequest, Body()], state: StateOf, owner: OwnerOf
) -> dict[str, Any]:
    """Vectors of unit length, one per text."""
    embedder = state.loaded.embedder
    if body.model != EMBEDDER or embedder is None:
        raise not_found(f"the model {body.model[:80]!r}", "model", "model_not_found")

    async def embed() -> np.ndarray:  # [texts, dim]
        async with state.gate.turn():
            return await embedder.aembed(body.input)

    try:
        vectors = np.asarray(await unless_gone(request, embed()), dtype=np.float32)
    except Exception as error:
        told = of_failure(error, param="input")
        if told.status >= 500:
            log.error("failure", exc_info=error, extra={"fields": {"model": EMBEDDER}})
        raise told from error
    if body.dimensions not in (None, vectors.shape[1]):
        raise refused(f"the embedder has {vectors.shape[1]} dimensions", "dimensions", "unsupported_value")
    used = sum(len(text.split()) for text in body.input)  # words: the embedder counts no tokens
    data = [
        {"object": "embedding", "index": at, "embedding": _written(vector, body.encoding_format)}
        for at, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "model": EMBEDDER, "data": data, "usage": usage}


def _written(vector: np.ndarray, form: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
