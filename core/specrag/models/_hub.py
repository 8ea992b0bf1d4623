"""Names of models that are no path: bundled ones, mistyped ones, and ids of the hub.

The hub's own client repeats its requests for a minute where there is no network. What is known before is said at once.
"""

from __future__ import annotations

import difflib

from specrag.errors import InvalidInputError, ModelNotFoundError, said

#: What ``bundled`` takes. It stands here because the module that loads the models imports this one.
BUNDLED_NAMES = ("smollm2", "minilm", "mpnet", "smollm2-rag-drafter", "minilm-reader", "mpnet-reader")
# Seconds that the hub has to answer.
_PATIENCE = 5.0
# How like a bundled name a name must be to be taken for a typing error, from 0 to 1.
_LIKE = 0.75
# Of these files, a model or tokenizer that was downloaded before has one at least.
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def check_hub_id(name: str, kind: str) -> None:
    """Whether the hub may have a model ``name``, or this machine has it from there.

    Args:
        name: Not the path of something that exists.
        kind: What is to be loaded, for the messages.

    Raises:
        InvalidInputError: It is the name of a bundled model, which ``bundled`` loads.
        ModelNotFoundError: It is like the name of one, is no id, or the hub cannot be reached.
    """
    if name in BUNDLED_NAMES:
        raise InvalidInputError(f"{name!r} is a bundled model: load it with bundled({name!r})")
    if near := near_names(name):
        raise ModelNotFoundError(f"no {kind} {name!r}: did you mean {near}?")

    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    where = f"give a folder, a .gguf file, a hub id, or the name of a bundled model ({', '.join(BUNDLED_NAMES)})"
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return
    except HFValidationError as error:
        raise ModelNotFoundError(f"no {kind} {name!r} is here, and it is no hub id: {where}") from error
    if constants.HF_HUB_OFFLINE:
        raise ModelNotFoundError(f"no {kind} {name!r} is here, and HF_HUB_OFFLINE forbids to look at the hub: {where}")
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # the client's own types changed between its versions
        raise ModelNotFoundError(
            f"no {kind} {name!r} is here, and {constants.ENDPOINT} cannot be reached ({said(error)}): {where}"
        ) from error


def near_names(name: str) -> str:
    """The bundled names that ``name`` may be a typing error of, as a text; empty where there are none."""
    near = [] if "/" in name else difflib.get_close_matches(name.lower(), BUNDLED_NAMES, n=2, cutoff=_LIKE)
    return " or ".join(map(repr, near))
