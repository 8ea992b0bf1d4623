"""``specrag serve``: an OpenAI-compatible server over indexes, and RAPID over uploaded files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrag._extras import require
from specrag.cli.console import err, failures_reported
from specrag.cli.loading import check_models, load_embedder, load_pipeline
from specrag.cli.options import (
    ApiKeyOption,
    CalibrationOption,
    DrafterOption,
    EmbedderOption,
    EmbedderServerOption,
    EscalateBelowOption,
    EscalateOption,
    MinConfidenceOption,
    ModelsOption,
    ServerOption,
    TokenizerOption,
    VerifierOption,
    VerifierServerOption,
    check_there,
)
from specrag.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    from specrag.rapid import RapidGenerator
    from specrag.serving import ApiKeys, Models

CANNOT_START = 2  # the exit code of a server that could not start
KEYS = "SPECRAG_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOCAL = ("127.0.0.1", "::1", "localhost")


class Proposer(str, Enum):
    """Proposers of RAPID (``specrag.rapid.settings.ProposerName``, which loads too much for ``specrag --help``)."""

    rag, sparse, naive, window, match, hybrid = "rag", "sparse", "naive", "window", "match", "hybrid"
    hybrid_sparse, rest, triforce = "hybrid-sparse", "rest", "triforce"


class LogLevel(str, Enum):
    """What is logged: at ``debug``, questions too."""

    debug, info, warning, error = "debug", "info", "warning", "error"


# Longer than other functions: half of it is the options of the command.
def serve(
    index: Annotated[
        list[str] | None,
        typer.Option(help="An index of `specrag index`: its folder, or NAME=FOLDER. Repeat for several."),
    ] = None,
    rapid: Annotated[
        str | None, typer.Option(help="The model of RAPID: folder, .gguf file, hub id, or smollm2. It reads uploads.")
    ] = None,
    rapid_drafter: Annotated[str | None, typer.Option(help="Its drafter; by default the same model.")] = None,
    rapid_proposer: Annotated[Proposer, typer.Option(help="Where its candidates come from.")] = Proposer.hybrid,
    rapid_datastore: Annotated[
        Path | None, typer.Option(help="What the proposer rest looks up: a folder of `specrag datastore build`.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(help=f"A file with one API key per line; or the variable {KEYS}, with commas. Default: no keys."),
    ] = None,
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    server: ServerOption = None,
    verifier_server: VerifierServerOption = None,
    tokenizer: TokenizerOption = None,
    embedder: EmbedderOption = None,
    embedder_server: EmbedderServerOption = None,
    api_key: ApiKeyOption = None,
    calibration: CalibrationOption = None,
    min_confidence: MinConfidenceOption = None,
    escalate: EscalateOption = None,
    escalate_below: EscalateBelowOption = 0.5,
    drafts: Annotated[int, typer.Option(min=1, help="m: how many drafts.")] = 5,
    passages_per_draft: Annotated[int, typer.Option(min=1, help="k: how many passages each draft reads.")] = 2,
    top: Annotated[int, typer.Option(min=1, help="How many passages to retrieve.")] = 10,
    deadline: Annotated[float | None, typer.Option(help="Seconds per question; then the best draft so far.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests that are worked on at once.")] = 4,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait; further ones get status 429.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens that a request may ask for.")] = 1024,
    max_upload: Annotated[int, typer.Option(min=1, help="The largest upload, in MiB.")] = 32,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for running requests after SIGTERM.")] = 30.0,
    log_level: Annotated[LogLevel, typer.Option(help="debug also shows questions.")] = LogLevel.info,
    models: ModelsOption = None,
) -> None:
    """Serve your documents to every OpenAI client: questions over indexes, RAPID over uploads."""
    with failures_reported(CANNOT_START):
        for package in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
            require(package, "serve", "specrag serve")
        folders = _folders(index or ())
        if not folders and rapid is None:
            raise InvalidInputError("nothing to serve: give --index FOLDER, --rapid MODEL, or both")
        _check_rapid(rapid, rapid_drafter, rapid_proposer, rapid_datastore)
        check_models(drafter, verifier, server, embedder, embedder_server, verifier_server)
        from specrag.serving import ServerSettings
        from specrag.serving.logs import configure
        from specrag.serving.server import listening, run

        def pipeline() -> Any:
            return load_pipeline(
                drafter,
                verifier,
                models=models,
                server=server,
                verifier_server=verifier_server,
                tokenizer=tokenizer,
                api_key=api_key,
                calibration=calibration,
                min_confidence=min_confidence,
                escalate=escalate.value if escalate is not None else None,
                escalate_below=escalate_below,
                deadline=deadline,
                drafts=drafts,
                passages_per_draft=passages_per_draft,
            )

        def load() -> Models:
            used = load_embedder(embedder, embedder_server, api_key, models=models)
            generator = None
            if rapid is not None:
                proposing = {"proposer": rapid_proposer.value, "datastore": rapid_datastore}
                generator = _load_rapid(rapid, rapid_drafter, models, embedder=used, **proposing)
            return _loaded(folders, pipeline, used, generator)

        settings = ServerSettings(
            load=load,
            keys=_keys(keys),
            concurrency=concurrency,
            queue=queue,
            top=top,
            max_tokens=max_tokens,
            max_upload=max_upload << 20,
            drain=drain,
        )
        socket = listening(host, port)
        configure(log_level.value)
        if settings.keys is None and host not in _LOCAL:
            err.print(f"note: anybody who reaches {host} may use this server: set --keys or {KEYS}", soft_wrap=True)
        address = socket.getsockname()
        err.print(f"specrag serves http://{host}:{address[1]}", highlight=False, soft_wrap=True)
        run(settings, [socket])


def _folders(given: Sequence[str]) -> dict[str, Path]:
    """The indexes by name: ``NAME=FOLDER``, or a folder under its own name.

    Raises:
        InvalidInputError: A name is taken twice, or has characters that do not belong into one.
        NotFoundError: There is no index.
    """
    from specrag.retrieval import PassageIndex

    found: dict[str, Path] = {}
    for item in given:
        name, equals, folder = item.partition("=")
        path = Path(folder if equals else item).expanduser()
        name = name if equals else re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)
        if not _NAME.fullmatch(name):
            raise InvalidInputError(f"--index {item}: give NAME=FOLDER; a name has letters, digits and . _ -")
        if name in found:
            raise InvalidInputError(f"two indexes are named {name}: give NAME=FOLDER")
        if not PassageIndex.is_saved_at(path):
            raise NotFoundError(f"no index at {path}: make one with `specrag index DOCUMENTS --to {path}`")
        found[name] = path
    return found


def _keys(file: Path | None) -> ApiKeys | None:
    """The keys of the file or the environment, if any."""
    from specrag.serving import ApiKeys

    if file is not None:
        return ApiKeys.read(file)
    written = os.environ.get(KEYS)
    return ApiKeys(written.replace(",", "\n").splitlines()) if written else None


def _check_rapid(rapid: str | None, drafter: str | None, proposer: Proposer, datastore: Path | None) -> None:
    """Check the options of RAPID against each other, before a model is loaded.

    Raises:
        InvalidInputError: One of them has no use without another, which is not given.
        NotFoundError: There is nothing at ``datastore``.
    """
    if rapid is None and (drafter is not None or datastore is not None or proposer is not Proposer.hybrid):
        raise InvalidInputError("--rapid-drafter, --rapid-proposer and --rapid-datastore need --rapid MODEL")
    if proposer is Proposer.rest and datastore is None:
        raise InvalidInputError("--rapid-proposer rest looks up a datastore: give --rapid-datastore FOLDER")
    if datastore is not None:
        if proposer is not Proposer.rest:
            raise InvalidInputError(f"--rapid-proposer {proposer.value} looks up no datastore: give rest")
        check_there(datastore)


def _loaded(
    folders: Mapping[str, Path],
    pipeline: Callable[[], Any],
    embedder: Any,
    rapid: RapidGenerator | None,
) -> Models:
    from specrag.retrieval import PassageIndex
    from specrag.serving import Models

    indexes = {name: PassageIndex.load(folder, embedder) for name, folder in folders.items()}
    return Models(
        rag=pipeline().replace(embedder=embedder) if indexes else None,
        indexes=indexes,
        rapid=rapid,
        embedder=embedder,
    )


def _load_rapid(target: str, drafter: str | None, models: Path | None, **options: Any) -> RapidGenerator:
    from specrag.models import TransformersLM, bundled
    from specrag.rapid import RapidGenerator

    def load(name: str) -> TransformersLM:
        return bundled("smollm2", folder=models) if name == "smollm2" else TransformersLM(name)

    return RapidGenerator(load(target), load(drafter) if drafter is not None else None, **options)
