"""``specrag models``: the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specrag.cli.console import failures_reported, out, working
from specrag.errors import InvalidInputError

app = typer.Typer(no_args_is_help=True, help="The embedded models.")


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="smollm2, minilm; by default all.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where to put them (default: user cache).")] = None,
) -> None:
    """Download the embedded models, check them and convert them, once."""
    with failures_reported():
        from specrag.models.bundled import BUNDLED
        from specrag.models.bundled import fetch as fetch_model

        wanted = names or list(BUNDLED)
        for name in wanted:
            if name not in BUNDLED:
                raise InvalidInputError(f"no embedded model {name!r}: there are {', '.join(BUNDLED)}")
        for name in wanted:
            with working(f"fetching {name}") as update:
                path = fetch_model(name, to, update)
            out.print(f"{name}: {path}")
