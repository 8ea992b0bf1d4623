"""``specrag datastore``: texts from which RAPID's proposer "rest" copies candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specrag.cli.console import failures_reported, out, show_notes, working
from specrag.cli.loading import check_generating
from specrag.cli.options import ModelsOption, check_there

app = typer.Typer(no_args_is_help=True, help="Datastores: texts from which RAPID copies candidates (proposer rest).")


@app.callback()
def _group() -> None:
    """Keeps ``build`` a command of its own while it is the only one."""


@app.command()
def build(
    texts: Annotated[list[Path], typer.Argument(help="Files or folders (txt, md, html, pdf).")],
    to: Annotated[Path, typer.Option("--out", help="The folder to write the datastore to.")],
    model: Annotated[
        str, typer.Option(help="The target, whose tokenizer is used: folder, .gguf file, hub id, or smollm2.")
    ] = "smollm2",
    strict: Annotated[bool, typer.Option("--strict", help="Stop when a file of a folder cannot be read.")] = False,
    hidden: Annotated[bool, typer.Option("--hidden", help="Read hidden folders and node_modules too.")] = False,
    models: ModelsOption = None,
) -> None:
    """Make a datastore of texts, for targets with the tokenizer of --model."""
    with failures_reported():
        from specrag.models._loading import load_tokenizer
        from specrag.models.bundled import ADAPTERS, BUNDLED, located
        from specrag.rapid.datastore import Datastore
        from specrag.retrieval import read_documents

        for path in texts:
            check_there(path)
        Datastore.check_target(to)
        check_generating([model])
        base = ADAPTERS.get(model, model)
        tokenizer = load_tokenizer(located(base, models) if base in BUNDLED else model)
        notes: list[str] = []
        with working("reading") as update:
            documents = [
                document
                for path in texts
                for document in read_documents(path, strict=strict, hidden=hidden, notes=notes)
            ]
            update("sorting")
            made = Datastore.build((document.text for document in documents), tokenizer, to, name=model)
        show_notes(notes)
        texts_of = "1 text" if len(documents) == 1 else f"{len(documents)} texts"
        out.print(f"{len(made)} tokens of {texts_of} in {to}", highlight=False)
