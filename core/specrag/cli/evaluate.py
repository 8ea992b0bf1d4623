"""``specrag eval``: systems side by side on questions with known answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from specrag.cli.console import counting, err, failures_reported, out, working
from specrag.cli.loading import check_models, load_embedder, load_models
from specrag.cli.options import (
    ApiKeyOption,
    DrafterOption,
    EmbedderOption,
    EmbedderServerOption,
    ModelsOption,
    ServerOption,
    TokenizerOption,
    VerifierOption,
    VerifierServerOption,
    check_there,
)
from specrag.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from specrag.evaluation.records import Question
    from specrag.evaluation.runs import Run
    from specrag.models.embedders import Embedder
    from specrag.retrieval import PassageIndex
    from specrag.schema import ScoreName

# The names of `specrag.evaluation.systems.SYSTEMS`, which loads too much for `specrag --help`.
NAMES = "standard, corrective, self-reflective, drafter, extractive-pair, speculative"
SystemsOption = Annotated[
    str,
    typer.Option(help=f"With commas: {NAMES}. Settings follow a name, as in speculative:subsets=random,drafts=10."),
]

RescoreOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Scores that choose among the drafts of each speculative system, as draft or draft+self_reflect: one "
        "more row of the table, and no model is asked. Repeat for several."
    ),
]


def evaluate(
    data: Annotated[Path, typer.Argument(help="Questions with answers and passages, in any known format.")],
    output: Annotated[Path, typer.Option("--out", help="The folder of the run. A run that is there goes on.")],
    systems: SystemsOption = "speculative",
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    server: ServerOption = None,
    verifier_server: VerifierServerOption = None,
    tokenizer: TokenizerOption = None,
    embedder: EmbedderOption = None,
    embedder_server: EmbedderServerOption = None,
    api_key: ApiKeyOption = None,
    data_format: Annotated[str, typer.Option("--format", help="Of DATA; auto: seen from its first row.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask at most so many questions.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many at the beginning.")] = 0,
    retrieve: Annotated[
        Path | None, typer.Option(help="An index made by `specrag index`: the passages come from there.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many passages to retrieve, with --retrieve.")] = 10,
    second: Annotated[Path | None, typer.Option(help="Another index: the second retriever of corrective RAG.")] = None,
    retry: Annotated[bool, typer.Option(help="Ask again what failed in an earlier run.")] = False,
    rescore: RescoreOption = None,
    seed: int = 0,
    models: ModelsOption = None,
) -> None:
    """Measure systems side by side, on your questions or on a benchmark's."""
    with failures_reported():
        from specrag.evaluation.run import evaluate as run_all
        from specrag.evaluation.systems import Parts, build, check_names, split_names
        from specrag.models.bundled import DEFAULT_DRAFTER

        names = split_names(systems)
        check_names(names)
        scores = _rescored_by(rescore or (), names)
        questions = _questions(data, data_format, skip, limit, retrieved=retrieve is not None)
        check_indexes(retrieve, second)
        check_models(drafter, verifier, server, embedder, embedder_server, verifier_server)
        with working("loading models"):
            used = load_embedder(embedder, embedder_server, api_key, models=models)
            drafting, judge = load_models(
                drafter or (DEFAULT_DRAFTER,),
                verifier,
                models=models,
                server=server,
                verifier_server=verifier_server,
                tokenizer=tokenizer,
                api_key=api_key,
            )
            other = _index(second, used) if second else None
            parts = Parts(drafter=drafting, verifier=judge, embedder=used, second=other, settings={"seed": seed})
            entries = build(names, parts)
        if retrieve is not None:
            questions = _retrieved(questions, retrieve, used, top)
        with counting("asking") as progress:
            run = run_all(entries, questions, output, source=str(data), retry=retry, progress=progress)
        failed = report(run, scores)
    raise typer.Exit(1 if failed else 0)


def _questions(data: Path, data_format: str, skip: int, limit: int | None, *, retrieved: bool) -> Sequence[Question]:
    """The questions to ask, checked before any model is loaded."""
    from specrag.evaluation.data import load
    from specrag.evaluation.scoring import check_questions

    check_there(data)
    loaded = load(data, data_format, limit=None if limit is None else skip + limit)
    if skip >= len(loaded):
        raise InvalidInputError(f"--skip {skip} leaves no question: {data} has {len(loaded)}")
    questions = loaded[skip:]
    check_questions(questions, passages=not retrieved)
    return questions


def check_indexes(*folders: Path | None) -> None:
    """Raise InvalidInputError where one of ``folders`` holds no index."""
    from specrag.retrieval import PassageIndex

    for folder in folders:
        if folder is not None and not PassageIndex.is_saved_at(folder):
            raise InvalidInputError(f"no index at {folder}: make one with `specrag index`")


def _index(folder: Path, embedder: Embedder) -> PassageIndex:
    from specrag.retrieval import PassageIndex

    return PassageIndex.load(folder, embedder)


def _retrieved(questions: Sequence[Question], folder: Path, embedder: Embedder, top: int) -> Sequence[Question]:
    from specrag.evaluation.data import with_retrieved

    index = _index(folder, embedder)
    with working("retrieving"):
        found = with_retrieved(questions, lambda question: index.search(question, top))
    # A passage's vector would not be written with the question: what is asked later shall be what is asked now.
    return [replace(q, passages=tuple(replace(p, embedding=None) for p in q.passages)) for q in found]


def _rescored_by(given: Sequence[str], names: Sequence[str]) -> list[tuple[ScoreName, ...]]:
    """The scores of ``--rescore``, checked before anything is computed."""
    from specrag.evaluation.rescoring import check_scores

    scores = [tuple(part.strip() for part in one.split("+")) for one in given]
    if given and not _speculative(names):
        raise InvalidInputError("--rescore chooses among the drafts of a speculative system, and --systems has none")
    return [check_scores(one) for one in scores]


def _speculative(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.split(":")[0] == "speculative"]


def report(run: Run, scores: Sequence[Sequence[ScoreName]] = ()) -> bool:
    """Show the figures of ``run`` and write them into its folder; whether every answer failed.

    Args:
        scores: The drafts of each speculative system are chosen by each of these once more.
    """
    from specrag.evaluation.page import write_page
    from specrag.evaluation.report import plot, summary_tables
    from specrag.evaluation.rescoring import with_rescored
    from specrag.evaluation.summary import summarize

    more = run
    for name in _speculative(run.info.systems):
        for chosen in scores:
            try:
                more = with_rescored(more, name, [chosen])
            except InvalidInputError as error:  # the figures of the run are shown all the same
                err.print(f"[yellow]note:[/] {'+'.join(chosen)} left out: {escape(str(error))}", highlight=False)
    summary = summarize(more)
    for table in summary_tables(summary):
        out.print(table)
    for pair in summary.comparisons:
        out.print(escape(str(pair)), highlight=False, style="dim" if pair.noise else "")
    written = [summary.save(run.folder), write_page(run.folder, summarize(run) if scores else summary)]
    try:
        written += plot(summary, run.folder)
    except MissingExtraError as error:
        err.print(f"[yellow]note:[/] no plots: {escape(str(error))}", highlight=False)
    failed = [row for row in run.answers if row.error is not None]
    if failed:
        err.print(
            f"[yellow]note:[/] {len(failed)} of {len(run.answers)} answers failed; the first: "
            f"{escape(str(failed[0].error))}. Ask them again with --retry",
            highlight=False,
        )
    names = ", ".join(file.name for file in written)
    out.print(f"{len(run.questions)} questions; {run.folder} has {names} and every answer", highlight=False)
    return len(failed) == len(run.answers)
