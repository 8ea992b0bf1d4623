"""Which awaited methods of LlamaIndex's models really await.

Many of them call the blocking method, so that everything else on the event loop stands still meanwhile.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM

_AWAITING = frozenset({"GET_AWAITABLE", "GET_ANEXT", "GET_AITER", "BEFORE_ASYNC_WITH"})


def llm_awaits(llm: BaseLLM) -> bool:
    """Whether ``achat`` of ``llm`` leaves the event loop free."""
    code = getattr(_undecorated(type(llm).achat), "__code__", None)
    if code is not None and "acomplete" in code.co_names and not _awaits(type(llm).acomplete):
        return False
    return _awaits(type(llm).achat)


def embedder_awaits(model: BaseEmbedding) -> bool:
    """Whether ``aget_text_embedding_batch`` of ``model`` leaves the event loop free."""
    kind = type(model)
    if kind._aget_text_embeddings is BaseEmbedding._aget_text_embeddings:  # one by one
        return _awaits(kind._aget_text_embedding)
    return _awaits(kind._aget_text_embeddings)


def _awaits(method: Callable[..., Any]) -> bool:
    """Whether a coroutine function awaits anything. A method in C counts as one that does."""
    code = getattr(_undecorated(method), "__code__", None)
    return code is None or any(step.opname in _AWAITING for step in dis.get_instructions(code))


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method below decorators. LlamaIndex's for callbacks keep it in a closure, as ``f``."""
    while True:
        below = getattr(method, "__wrapped__", None)
        if not inspect.iscoroutinefunction(below) and inspect.isfunction(method):
            below = inspect.getclosurevars(method).nonlocals.get("f")
        if not inspect.iscoroutinefunction(below):
            return method
        method = below
