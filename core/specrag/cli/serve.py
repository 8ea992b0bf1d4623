"""``specrag serve``: an OpenAI-compatible server over indexes, and RAPID over uploaded files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrag._extras import require
from specrag.cli.console import err, failures_reported
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
)
from specrag.cli.served import KEYS, OnRay, Served
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from specrag.serving import ServerSettings

CANNOT_START = 2  # the exit code of a server that could not start
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
    ray: Annotated[
        bool, typer.Option("--ray", help="On Ray Serve (extra ray): each model in replicas of its own.")
    ] = False,
    deployments: Annotated[
        Path | None, typer.Option(help="With --ray: a YAML file with the replicas of each deployment.")
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(help="debug also shows questions.")] = LogLevel.info,
    models: ModelsOption = None,
) -> None:
    """Serve your documents to every OpenAI client: questions over indexes, RAPID over uploads."""
    with failures_reported(CANNOT_START):
        for package in ("fastapi", "uvicorn", "multipart", "prometheus_client"):
            require(package, "serve", "specrag serve")
        if ray:
            require("ray", "ray", "specrag serve --ray")
        if deployments is not None and not ray:
            raise InvalidInputError("--deployments says how many replicas there are on Ray: give --ray too")
        served = Served(
            index=index or (),
            rapid=rapid,
            rapid_drafter=rapid_drafter,
            rapid_proposer=rapid_proposer.value,
            rapid_datastore=rapid_datastore,
            keys=keys,
            drafter=drafter,
            verifier=verifier,
            server=server,
            verifier_server=verifier_server,
            tokenizer=tokenizer,
            embedder=embedder,
            embedder_server=embedder_server,
            api_key=api_key,
            calibration=calibration,
            min_confidence=min_confidence,
            escalate=escalate.value if escalate is not None else None,
            escalate_below=escalate_below,
            drafts=drafts,
            passages_per_draft=passages_per_draft,
            top=top,
            deadline=deadline,
            concurrency=concurrency,
            queue=queue,
            max_tokens=max_tokens,
            max_upload=max_upload,
            drain=drain,
            log_level=log_level.value,
            models=models,
        )
        served.check()
        if ray:
            _serve_on_ray(served, deployments, host, port)
        else:
            _serve_here(served, host, port)


def _serve_here(served: Served, host: str, port: int) -> None:
    from specrag.serving.logs import configure
    from specrag.serving.server import listening, run

    settings = served.settings()
    socket = listening(host, port)
    configure(served.log_level)
    _note_open(host, settings)
    _tell(host, socket.getsockname()[1])
    run(settings, [socket])


def _serve_on_ray(served: Served, file: Path | None, host: str, port: int) -> None:
    from specrag.serving.deployments import cpus_needed, read_deployments
    from specrag.serving.server import listening

    wanted = OnRay(served)
    given = read_deployments(file, wanted.names) if file is not None else {}
    wanted.check(given)
    with listening(host, port) as socket:  # it is free: Ray's proxy takes it
        port = socket.getsockname()[1]
    from specrag.serving import on_ray

    parts = wanted.parts()
    _note_open(host, parts.settings)
    on_ray.run(
        on_ray.application(parts, given),
        host,
        port,
        served.drain,
        cpus=cpus_needed(given, wanted.names),
        told=lambda: _tell(host, port),
    )


def _note_open(host: str, settings: ServerSettings) -> None:
    if settings.keys is None and host not in _LOCAL:
        err.print(f"note: anybody who reaches {host} may use this server: set --keys or {KEYS}", soft_wrap=True)


def _tell(host: str, port: int) -> None:
    err.print(f"specrag serves http://{host}:{port}", highlight=False, soft_wrap=True)
