"""Sessions on disk: a safetensors file with the prompt's tokens, the target's cache and the chunks' embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specrag._files import path_of, replacing
from specrag.engine.kv_cache import head_shape
from specrag.engine.tensor_files import load_checked, save_checked
from specrag.errors import InvalidInputError, NotFoundError
from specrag.models.transformers import TransformersLM
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.compatibility import fingerprint
from specrag.rapid.prompt import PromptTokens

SESSION_VERSION = 2


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds."""

    prompt: PromptTokens
    model: CachedModel  # the target, with the prompt's head and context in its cache
    vectors: np.ndarray | None  # the embeddings of the context's chunks, where they were made
    embedder: str | None = None  # the name of what made them


def write_session(session: SavedSession, path: str | Path) -> None:
    """Write a session. The file appears whole or stays as it was.

    Raises:
        InvalidInputError: ``path`` is a folder.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    prompt, lm = session.prompt, session.model.lm
    tensors = {
        "head": torch.tensor(prompt.head, dtype=torch.long),
        "context": torch.tensor(prompt.context, dtype=torch.long),
    }
    for i, layer in enumerate(session.model.cache.layers):
        tensors[f"keys.{i}"] = layer.key_buffer[:, :, : layer.length].contiguous().cpu()
        tensors[f"values.{i}"] = layer.value_buffer[:, :, : layer.length].contiguous().cpu()
    if session.vectors is not None:
        tensors["pieces"] = torch.from_numpy(session.vectors)
    facts = {
        "version": str(SESSION_VERSION),
        "model": fingerprint(lm),
        "tail": prompt.tail,
        "name": lm.name,
        "embedder": session.embedder or "",
    }
    with replacing(path_of(path)) as part:
        save_checked(tensors, part, facts)


def read_session(path: str | Path, lm: TransformersLM, vocabulary: int, spare_tokens: int) -> SavedSession:
    """Read a session that ``write_session`` wrote.

    Args:
        path: The file.
        lm: The target, with the weights that the session was made with.
        vocabulary: Entries of the vocabulary that count.
        spare_tokens: Room in the cache after the context.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: The file is damaged, of another version, or of another model.
    """
    file = path_of(path)
    if not file.exists():
        raise NotFoundError(f"no saved session at {file}")
    try:
        with safe_open(file, "pt", device="cpu") as data:
            _check_origin(file, data.metadata() or {}, lm)  # before all of it is read
        tensors, facts = load_checked(file)
        return _session(facts, tensors, lm, vocabulary, spare_tokens)
    except (SafetensorError, KeyError, OSError, ValueError, TypeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"{file} is not a saved session, or damaged ({error}): read the text again") from error


def _session(
    facts: Mapping[str, str], tensors: Mapping[str, Tensor], lm: TransformersLM, vocabulary: int, spare_tokens: int
) -> SavedSession:
    """The session that a file holds.

    Raises:
        KeyError, ValueError: Something is missing, or does not fit the model.
    """
    head, context = (tuple(tensors[name].tolist()) for name in ("head", "context"))
    model = CachedModel(lm, len(head) + len(context) + spare_tokens, vocabulary)
    expected = _shape(lm, len(head) + len(context))
    for i, layer in enumerate(model.cache.layers):
        keys, values = tensors[f"keys.{i}"], tensors[f"values.{i}"]
        if not tuple(keys.shape) == tuple(values.shape) == expected or keys.dtype != model.dtype:
            raise ValueError(
                f"layer {i} has keys and values of {tuple(keys.shape)} and {tuple(values.shape)}, "
                f"{lm.name} needs {expected}"
            )
        layer.update(keys.to(lm.device), values.to(lm.device))
    vectors = tensors["pieces"].numpy() if "pieces" in tensors else None
    return SavedSession(PromptTokens(head, context, facts["tail"]), model, vectors, facts["embedder"])


def _shape(lm: TransformersLM, tokens: int) -> tuple[int, int, int, int]:
    """Of the keys and values of each layer: [batch, kv_heads, tokens, head_dim]."""
    heads, size = head_shape(lm.model.config)
    return 1, heads, tokens, size


def _check_origin(file: Path, facts: Mapping[str, str], lm: TransformersLM) -> None:
    if "version" not in facts:
        raise ValueError("it has no version")
    if facts["version"] != str(SESSION_VERSION):
        raise InvalidInputError(
            f"{file} is a session of version {facts['version']}, this is {SESSION_VERSION}: read the text again"
        )
    if facts.get("model") != fingerprint(lm):
        raise InvalidInputError(
            f"{file} was made with {facts.get('name')}, not with these weights of {lm.name}: "
            "load the same model or read the text again"
        )
