"""``specrag models``: the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specrag.cli.console import failures_reported, out, working
from specrag.errors import InvalidInputError, ModelNotFoundError

app = typer.Typer(no_args_is_help=True, help="The bundled models.")


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="As in `specrag models list`; by default those that the defaults need.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Where to put them (default: user cache).")] = None,
) -> None:
    """Download the bundled models, check them and convert them, once."""
    with failures_reported():
        from specrag.models.bundled import ADAPTERS, BUNDLED, FETCHED_BY_DEFAULT, READERS
        from specrag.models.bundled import fetch as fetch_model

        shipped = ADAPTERS | READERS  # part of the package: what is fetched is what they change
        for name in names or ():
            if name not in (*BUNDLED, *shipped):
                raise InvalidInputError(f"no bundled model {name!r}: there are {', '.join((*BUNDLED, *shipped))}")
        for name in dict.fromkeys(shipped.get(name, name) for name in names or FETCHED_BY_DEFAULT):
            with working(f"fetching {name}") as update:
                path = fetch_model(name, to, update)
            out.print(f"{name}: {path}")


@app.command("list")
def show(
    to: Annotated[Path | None, typer.Option("--models", help="Where they are (default: user cache).")] = None,
) -> None:
    """List the bundled models, what each is, and where it is or how to get it."""
    from specrag.models.bundled import ADAPTERS, BUNDLED, READERS, adapter_folder, located

    kinds = {name: BUNDLED[name].description for name in BUNDLED}
    kinds |= {name: f"drafter that writes: {base}, trained for it" for name, base in ADAPTERS.items()}
    kinds |= {name: f"drafter that copies spans: {base}, trained for it" for name, base in READERS.items()}
    shipped = ADAPTERS | READERS
    for name, what in kinds.items():
        try:
            base = located(shipped.get(name, name), to)
            where = str(adapter_folder(name) if name in shipped else base)
        except ModelNotFoundError as error:
            where = f"not here: {error}"
        out.print(f"{name}: {what}\n    {where}", markup=False, highlight=False, soft_wrap=True)
