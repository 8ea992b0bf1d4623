"""What stands behind a Runnable: ``bind``, ``with_config``, ``with_retry`` and ``with_fallbacks`` wrap others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.language_models.llms import LLM
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable

from specrag.errors import kind_of


def inner_runnables(runnable: Any) -> list[Any]:
    """The Runnables that serve the calls of ``runnable``: what it wraps, and the fallbacks. Itself where it wraps none.

    The input and the options of a call reach each of them unchanged.
    """
    return list(_inner(runnable))


def _inner(runnable: Any) -> Iterator[Any]:
    if isinstance(runnable, RunnableBindingBase):  # bind, with_config, with_retry, with_types, ...
        yield from _inner(runnable.bound)
    elif isinstance(runnable, RunnableWithFallbacks):
        for each in (runnable.runnable, *runnable.fallbacks):
            yield from _inner(each)
    elif isinstance(runnable, DynamicRunnable):  # configurable_fields, configurable_alternatives
        yield from _inner(runnable.default)
    else:
        yield runnable


def bound_options(runnable: Any) -> set[str]:
    """The options that ``bind`` gave to ``runnable``. They are the user's choice."""
    if isinstance(runnable, RunnableBindingBase):
        return set(runnable.kwargs) | bound_options(runnable.bound)
    if isinstance(runnable, RunnableWithFallbacks):
        return set().union(*map(bound_options, (runnable.runnable, *runnable.fallbacks)))
    return bound_options(runnable.default) if isinstance(runnable, DynamicRunnable) else set()


def known_options(runnable: Any) -> set[str]:
    """The fields that every model behind ``runnable`` has. A chain of several steps takes no options."""
    models = inner_runnables(runnable)
    if not all(isinstance(each, BaseLanguageModel) for each in models):
        return set()
    return {"stop", *set.intersection(*(set(type(each).model_fields) for each in models))}


def really_awaits(runnable: Any) -> bool:
    """Whether every model behind ``runnable`` has awaited methods of its own.

    LangChain runs the others in the thread pool of the event loop. It has few threads, and the loop cannot close before
    they are done.
    """
    return all(_awaits(each) for each in inner_runnables(runnable))


def _awaits(each: Any) -> bool:
    kind = type(each)
    if isinstance(each, RunnableLambda):
        return hasattr(each, "afunc")
    if isinstance(each, Embeddings):
        return kind.aembed_documents is not Embeddings.aembed_documents
    if isinstance(each, LLM):
        return kind._acall is not LLM._acall
    if isinstance(each, BaseChatModel):
        return kind._agenerate is not BaseChatModel._agenerate or kind._astream is not BaseChatModel._astream
    return True


def is_retriever(runnable: Any) -> bool:
    """Whether ``runnable`` is a retriever, wrapped or not, or a chain that begins with one: it takes a question."""
    return isinstance(runnable, Runnable) and all(
        isinstance(_first(r), BaseRetriever) for r in inner_runnables(runnable)
    )


def store_of(retriever: Any) -> Any:
    """The vector store of a retriever, wrapped or not; ``None`` where it has none."""
    return getattr(_first(retriever), "vectorstore", None)


def _first(runnable: Any) -> Any:
    """What gets the input first."""
    inner = inner_runnables(runnable)[0]
    return _first(inner.first) if isinstance(inner, RunnableSequence) else inner


def name_of(runnable: Any) -> str:
    """What a model is called in messages: the class of what is wrapped."""
    return kind_of(inner_runnables(runnable)[0])
