"""Arguments that users of LangChain's own chains try first, and what serves here."""

from __future__ import annotations

from collections.abc import Iterable

from specrag.errors import InvalidInputError

_PROMPTS = "give prompts=Prompts(...) or a mapping of its fields"
_IN_PLACE_OF = {
    "llm": "give drafter=llm, which writes the drafts, and verifier=llm, which scores them",
    "model": "give drafter=model, which writes the drafts, and verifier=model, which scores them",
    "embeddings": "give embedder=",
    "prompt": _PROMPTS,
    "combine_docs_chain": _PROMPTS,
    "chain_type": "leave it out, there is one way to answer",
    "return_source_documents": "leave it out, the result has context and citations",
    "memory": "give condense=model and the messages as chat_history in the input",
    "k": "give it to the retriever, as in store.as_retriever(search_kwargs={'k': 10})",
    "verbose": "leave it out, callbacks and details tell what happened",
    "streaming": "leave it out, call stream()",
}


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Check that none of ``given`` is an argument of LangChain's own chains.

    Raises:
        InvalidInputError: One is. The message says what serves in its place.
    """
    hints = [f"{name}: {_IN_PLACE_OF[name]}" for name in given if name in _IN_PLACE_OF and name not in known]
    if hints:
        raise InvalidInputError(f"this chain drafts and verifies. {'; '.join(hints)}")
