"""Sessions on disk: a safetensors file with the prompt's tokens, the target's cache and the chunks' embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specrag.errors import InvalidInputError, NotFoundError
from specrag.models.transformers import TransformersLM
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.compatibility import fingerprint
from specrag.rapid.prompt import PromptTokens

SESSION_VERSION = 1


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds."""

    prompt: PromptTokens
    model: CachedModel  # the target, with the prompt's head and context in its cache
    vectors: np.ndarray | None  # the embeddings of the context's chunks, where they were made


def write_session(session: SavedSession, path: str | Path) -> None:
    """Write a session. The file appears whole or not at all."""
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
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    facts = {"version": str(SESSION_VERSION), "model": fingerprint(lm), "tail": prompt.tail, "name": lm.name}
    save_file(tensors, part, metadata=facts)
    part.replace(target)


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
    file = Path(path).expanduser()
    if not file.exists():
        raise NotFoundError(f"no saved session at {file}")
    try:
        with safe_open(file, "pt", device=str(lm.device)) as data:
            facts = data.metadata() or {}
            _check(file, facts, lm)
            head, context = (tuple(data.get_tensor(name).tolist()) for name in ("head", "context"))
            vectors = data.get_tensor("pieces").cpu().numpy() if "pieces" in set(data.keys()) else None
            model = CachedModel(lm, len(head) + len(context) + spare_tokens, vocabulary)
            for i, layer in enumerate(model.cache.layers):
                layer.update(data.get_tensor(f"keys.{i}"), data.get_tensor(f"values.{i}"))
    except (SafetensorError, KeyError, OSError) as error:
        raise InvalidInputError(f"{file} is not a saved session, or damaged: {error}") from error
    return SavedSession(PromptTokens(head, context, facts["tail"]), model, vectors)


def _check(file: Path, facts: dict[str, str], lm: TransformersLM) -> None:
    if facts.get("version") != str(SESSION_VERSION):
        raise InvalidInputError(
            f"{file} is a session of version {facts.get('version')}, this is {SESSION_VERSION}: read the text again"
        )
    if facts.get("model") != fingerprint(lm):
        raise InvalidInputError(
            f"{file} was made with {facts.get('name')}, not with these weights of {lm.name}: "
            "load the same model or read the text again"
        )
