"""``specrag index``: documents made searchable once, to be asked many times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specrag.cli.console import counting, failures_reported, out, show_notes, working
from specrag.cli.loading import ModelOptions
from specrag.cli.options import (
    ApiKeyOption,
    EmbedderOption,
    EmbedderServerOption,
    ModelsOption,
    WordsOption,
    check_there,
)


def index(
    docs: Annotated[Path, typer.Argument(help="A file or folder (txt, md, html, pdf).")],
    to: Annotated[Path, typer.Option(help="The folder to write the index to.")],
    words: WordsOption = 100,
    overlap: Annotated[int, typer.Option(min=0, help="Words that a passage repeats of the one before.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop when a file of the folder cannot be read.")] = False,
    hidden: Annotated[bool, typer.Option("--hidden", help="Index hidden folders and node_modules too.")] = False,
    embedder: EmbedderOption = None,
    embedder_server: EmbedderServerOption = None,
    api_key: ApiKeyOption = None,
    models: ModelsOption = None,
) -> None:
    """Index documents once, to ask many times."""
    with failures_reported():
        from specrag.retrieval import PassageIndex, index_documents

        check_there(docs)
        PassageIndex.check_target(to)
        chosen = ModelOptions(embedder=embedder, embedder_server=embedder_server, api_key=api_key, models=models)
        chosen.check_models()
        with working("loading the embedder"):
            used = chosen.load_embedder()
        notes: list[str] = []
        with counting("indexing") as progress:
            made = index_documents(
                docs, used, words=words, overlap=overlap, strict=strict, hidden=hidden, notes=notes, progress=progress
            )
        made.save(to)
        show_notes(notes)
        out.print(f"{len(made)} passages indexed in {to}")
