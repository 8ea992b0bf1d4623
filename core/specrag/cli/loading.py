"""Models and pipelines as the options of a command describe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from specrag._extras import require
from specrag.cli.options import Statement
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from specrag.models.base import LanguageModel
    from specrag.models.embedders import Embedder
    from specrag.speculative.pipeline import SpeculativeRAG


def load_model(
    name: str, server: Sequence[str] | None, api_key: str | None = None, tokenizer: str | None = None
) -> LanguageModel:
    """The language model ``name``: on the servers when there are any, else a local one (folder, file or hub id)."""
    if server:
        from specrag.models import OpenAILM

        return OpenAILM(name, list(server), api_key=api_key, tokenizer=tokenizer)
    from specrag.models import TransformersLM

    return TransformersLM(name)


def load_embedder(
    name: str | None, server: Sequence[str] | None, api_key: str | None = None, *, models: Path | None = None
) -> Embedder:
    """The embedder ``name``: on the servers when there are any, else a local one; without a name, the bundled one."""
    if server and name is None:
        raise InvalidInputError("--embedder-server needs --embedder: the model's name on the server")
    if name is None:
        from specrag.models import bundled

        require("torch", "local", "the bundled embedder", otherwise="name one with --embedder and --embedder-server")
        return bundled("minilm", folder=models)
    from specrag.models import OpenAIEmbedder, TransformersEmbedder

    return OpenAIEmbedder(list(server), name, api_key) if server else TransformersEmbedder(name)


def load_pipeline(
    drafter: str | None,
    verifier: str | None,
    *,
    models: Path | None,
    server: Sequence[str] | None = None,
    tokenizer: str | None = None,
    api_key: str | None = None,
) -> SpeculativeRAG:
    """The pipeline of a drafter and a verifier; without a drafter's name, the bundled drafter.

    Without a verifier's name, the drafter verifies its own drafts.
    """
    from specrag.speculative.pipeline import SpeculativeRAG

    if server and drafter is None:
        raise InvalidInputError("--server needs --drafter: the model's name on the server")
    first = _bundled_drafter(models) if drafter is None else load_model(drafter, server, api_key, tokenizer)
    second = load_model(verifier, server, api_key, tokenizer) if verifier else None
    return SpeculativeRAG(drafter=first, verifier=second)


def _bundled_drafter(models: Path | None) -> LanguageModel:
    from specrag.models import bundled

    # Int8 weights halve the drafting time on a CPU. A GPU does not need them.
    options = {} if _gpu_found() else {"quantization": "int8"}
    return bundled("smollm2-rag-drafter", folder=models, **options)


def _gpu_found() -> bool:
    try:
        import torch
    except ImportError:  # then loading the model says what to install
        return False
    return torch.cuda.is_available()


def with_statement(rag: SpeculativeRAG, statement: Statement) -> SpeculativeRAG:
    """The same pipeline with another self-reflection statement in its prompts."""
    from specrag.speculative.prompts import SELF_REFLECTION_STATEMENTS

    text = SELF_REFLECTION_STATEMENTS[int(statement.value) - 1]
    return rag.replace(prompts=replace(rag.texts, statement=text))
