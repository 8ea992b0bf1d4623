"""The ``specrag`` command: ask, demo, index, serve, batch, train, questions, calibrate, eval, models, datastore.

Each module holds one group of commands; ``console`` and ``answers`` say how things look, ``loading`` makes the models.
Results go to stdout, progress and errors to stderr.
Exit codes: 0 answered or done, 1 a failure (its message on stderr), 2 wrong usage, or a server that could not start,
3 the answer abstained.

Heavy libraries load inside the commands, so that ``specrag --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from specrag.cli import ask, batch, calibrate, datastore, evaluate, index, models, serve, train
from specrag.cli.ask import ABSTAINED
from specrag.cli.console import out, print_what_can_be_printed

__all__ = ["ABSTAINED", "app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Retrieval-augmented answers: drafted by a small model, verified by a larger one.",
)
app.command("ask")(ask.ask)
app.command("index")(index.index)
app.command("demo")(ask.demo)
app.command("serve")(serve.serve)
app.command("batch")(batch.batch)
app.command("train")(train.train)
app.command("questions")(train.questions)
app.command("calibrate")(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.add_typer(models.app, name="models")
app.add_typer(datastore.app, name="datastore")


def _print_version(wanted: bool) -> None:
    if wanted:
        from specrag import __version__

        out.print(f"specrag {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``specrag`` command."""
    print_what_can_be_printed()
    app()
