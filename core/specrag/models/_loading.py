"""Loading tokenizers and causal language models with transformers.

transformers is imported at the first call, and torch for models only: the client of a server loads tokenizers alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag._extras import require
from specrag._files import path_of
from specrag.errors import InvalidInputError, ModelNotFoundError, SpecRAGError, kind_of, said
from specrag.models._hub import check_hub_id

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def loading(source: object, kind: str) -> Iterator[None]:
    """Whatever a damaged folder or file makes the libraries raise, as one error that names it.

    Args:
        source: What is loaded.
        kind: As what, with its article.

    Raises:
        ModelNotFoundError: In place of such an error. That a package is missing or memory ran out is raised as it is.
    """
    try:
        yield
    except (SpecRAGError, ImportError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # damaged weights, configs and tokenizers raise types of Rust, torch, json and plain ones
        if "torch" in sys.modules:
            from specrag.engine.memory import out_of_memory  # imports torch, which a client of servers does not have

            if out_of_memory(error):
                raise
        raise ModelNotFoundError(f"{source} could not be loaded as {kind}: {said(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The package transformers, without its progress bars, load reports and advice on stderr."""
    log = logging.getLogger("transformers")
    was_disabled, log.disabled = log.disabled, True  # its import advises to install torch
    try:
        import transformers
    finally:
        log.disabled = was_disabled
    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield transformers
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def source_of(path: str | Path, kind: str) -> tuple[str, dict[str, str]]:
    """``path`` as ``from_pretrained`` takes it: a folder or hub id, and the name of a ``.gguf`` file in the folder.

    Args:
        path: A folder, a ``.gguf`` file or a hub id.
        kind: What is to be loaded, for the messages.

    Raises:
        InvalidInputError: ``path`` is empty or no path, or the name of a bundled model.
        ModelNotFoundError: ``path`` is a local one, and nothing is there. Or it is a hub id, and the model is neither
            on this machine nor can the hub be reached.
        MissingExtraError: It is a ``.gguf`` file, and what reads one is not installed.
    """
    if not isinstance(path, str | Path) or not str(path).strip():
        shown = repr(path) if isinstance(path, str) else kind_of(path)
        raise InvalidInputError(f"{kind} must be a folder, a .gguf file or a hub id, got {shown}")
    local, text = path_of(path), str(path)
    gguf = local.suffix == ".gguf"
    is_local = isinstance(path, Path) or local.is_absolute() or text.startswith((".", "~")) or gguf
    if is_local and not local.exists():
        raise ModelNotFoundError(f"no {kind} at {local}: give a folder, a .gguf file or a hub id")
    if not local.exists():
        check_hub_id(text, kind)
    if not gguf:
        return str(local) if local.exists() else text, {}
    for package in ("torch", "gguf"):
        require(package, "local", f"reading {local.name}")
    return str(local.parent), {"gguf_file": local.name}


def load_tokenizer(source: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a ``.gguf`` file or a hub id; a loaded one as it is.

    Only ``.gguf`` files need torch.

    Raises:
        ModelNotFoundError: None could be loaded from there.
        MissingExtraError: See ``source_of``.
    """
    if not isinstance(source, str | Path):
        return source
    where, options = source_of(source, "tokenizer")
    with quiet_transformers() as transformers, loading(source, "a tokenizer"):
        if options:
            from specrag.models._gguf import read_tokenizer  # imports torch, which a client of servers does not have

            return read_tokenizer(Path(source).expanduser())
        return transformers.AutoTokenizer.from_pretrained(where)


def load_causal_lm(source: str | Path, dtype: torch.dtype, *, device_map: Any = None) -> PreTrainedModel:
    """A causal language model from a folder, a ``.gguf`` file or a hub id.

    Raises:
        ModelNotFoundError: None could be loaded from there.
        MissingExtraError: A package that this model or ``device_map`` needs is not installed.
    """
    where, options = source_of(source, "model")
    local = Path(where)
    if local.is_dir() and not options and not (local / "config.json").exists():
        raise ModelNotFoundError(f"{local} has no config.json: it is not a model folder")
    if options or device_map is not None:
        require("accelerate", "local", f"reading {local.name}" if options else "device_map")
    place = {} if device_map is None else {"device_map": device_map}
    with quiet_transformers() as transformers, loading(source, "a causal language model"):
        return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options, **place)
