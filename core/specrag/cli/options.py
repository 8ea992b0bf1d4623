"""Options that several commands share, and the checks made before anything loads."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from specrag.errors import InvalidInputError, NotFoundError

ModelsOption = Annotated[
    Path | None, typer.Option("--models", help="Where the bundled models are (default: user cache).")
]
DrafterOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Bundled model (see `specrag models list`), trained reader, model folder, .gguf file, hub id, or its "
        "name on --server. Repeat to pool the drafts of several."
    ),
]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        help="One of the same; by default the first drafter that writes, or nobody where all judge their own drafts."
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="A file of `specrag calibrate`; by default the one that ships for these models, if any."),
]
MinConfidenceOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Abstain below this probability of being right; 0.25 with the default drafter alone."
    ),
]
ServerOption = Annotated[
    list[str] | None,
    typer.Option(help="OpenAI-compatible base URL up to /v1, for drafter and verifier. Repeat for a pool."),
]
VerifierServerOption = Annotated[
    list[str] | None,
    typer.Option(help="The same for the verifier, where it is not on --server. Repeat for a pool."),
]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="For the servers of all these options.")
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(help="Embedder: folder, hub id, or its name on --embedder-server; by default the bundled one."),
]
EmbedderServerOption = Annotated[
    list[str] | None,
    typer.Option(help="OpenAI-compatible base URL up to /v1, for the embedder. Repeat for a pool."),
]
TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer of the served model: exact scores over --server.")]
WordsOption = Annotated[int, typer.Option(min=1, help="Words per passage.")]


class Escalate(str, Enum):
    """What the verifier reads when it answers itself."""

    passages, standard = "passages", "standard"


EscalateOption = Annotated[
    Escalate | None,
    typer.Option(
        help="In doubt, the verifier answers itself: from the best drafts' passages, or from all (standard RAG)."
    ),
]
EscalateBelowOption = Annotated[
    float, typer.Option(min=0, max=1, help="Doubt is a probability of being right below this.")
]


class Statement(str, Enum):
    """Which of the paper's self-reflection statements (Table 7) the verifier answers."""

    one, two, three, four = "1", "2", "3", "4"


def check_there(path: Path) -> None:
    """Raise InvalidInputError when nothing is at ``path``, before models load: a typing error costs no minute."""
    if not path.exists():
        raise InvalidInputError(f"no file or folder at {path}")


def check_index(folder: Path) -> None:
    """Raise NotFoundError when no index is at ``folder``, before models load."""
    from specrag.retrieval import PassageIndex

    if not PassageIndex.is_saved_at(folder):
        raise NotFoundError(f"no index at {folder}: make one with `specrag index DOCUMENTS --to {folder}`")
