"""``specrag eval``: systems side by side on questions with known answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from specrag._files import check_folder_target
from specrag.cli.console import err, failures_reported, out
from specrag.cli.evaluate_long import MAX_TOKENS, LongRun, check_options, plan_of
from specrag.cli.evaluate_passages import PassagesRun
from specrag.cli.loading import ModelOptions
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
    from specrag.evaluation.statistics import Comparison
    from specrag.schema import ScoreName

# Of so many pairs of systems, each has its line.
_FEW_PAIRS = 6
# The names of `specrag.evaluation.systems.SYSTEMS`, which loads too much for `specrag --help`.
NAMES = "standard, corrective, self-reflective, drafter, extractive-pair, speculative"
SystemsOption = Annotated[
    str,
    typer.Option(
        help=f"With commas: {NAMES}; or, over long documents, long-context, rag, naive-sd-self, magicdec-self, "
        "rapid-self-10, ... Settings follow a name, as in speculative:subsets=random,drafts=10."
    ),
]
DocumentsOption = Annotated[
    list[int] | None,
    typer.Option(
        metavar="TOKENS",
        help="Over long documents: make documents of so many tokens, with question and answer, of the data's "
        "passages. Repeat for several lengths. By default, each question has its own document.",
    ),
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
    target: Annotated[
        str | None,
        typer.Option(help="Over long documents: the model that reads them (folder, .gguf file, hub id or bundled)."),
    ] = None,
    documents: DocumentsOption = None,
    depth: Annotated[
        str | None, typer.Option(help="Where the evidence stands in a document that is made: 0 to 1, or random.")
    ] = None,
    share: Annotated[int | None, typer.Option(min=1, help="How many questions share a document that is made.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Over long documents: of an answer, at most; by default {MAX_TOKENS}.")
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="Over long documents: keep what was read here, for a run that goes on.")
    ] = None,
    seed: int = 0,
    models: ModelsOption = None,
) -> None:
    """Measure systems side by side, on your questions or on a benchmark's."""
    with failures_reported():
        from specrag.evaluation.long_names import over_documents
        from specrag.evaluation.systems import split_names

        names = split_names(systems)
        long = over_documents(names)
        check_options(
            over_documents=long,
            passages={
                "--verifier": verifier,
                "--server": server,
                "--verifier-server": verifier_server,
                "--tokenizer": tokenizer,
                "--retrieve": retrieve,
                "--second": second,
                "--rescore": rescore,
            },
            documents={
                "--target": target,
                "--documents": documents,
                "--depth": depth,
                "--share": share,
                "--max-tokens": max_tokens,
                "--sessions": sessions,
            },
        )
        check_folder_target(output)
        scores = _rescored_by(rescore or (), names)
        plan = plan_of(documents, depth, share, seed)
        questions, known = _questions(data, data_format, skip, limit, whole=plan is not None)
        common: dict[str, Any] = {
            "names": names,
            "data": data,
            "questions": questions,
            "chosen": ModelOptions(
                drafter=drafter,
                verifier=verifier,
                server=server,
                verifier_server=verifier_server,
                tokenizer=tokenizer,
                embedder=embedder,
                embedder_server=embedder_server,
                api_key=api_key,
                models=models,
            ),
            "seed": seed,
            "retry": retry,
        }
        most = max_tokens or MAX_TOKENS
        made = (
            LongRun(**common, corpus=known, plan=plan, target=str(target), max_tokens=most, sessions=sessions)
            if long
            else PassagesRun(**common, retrieve=retrieve, top=top, second=second)
        )
        made.check()
        failed = report(made.ask(output), scores)
    raise typer.Exit(1 if failed else 0)


def _questions(
    data: Path, data_format: str, skip: int, limit: int | None, *, whole: bool = False
) -> tuple[Sequence[Question], Sequence[Question]]:
    """The questions to ask; and those that were read, with ``whole`` all of the data."""
    from specrag.evaluation.data import load

    check_there(data)
    end = None if limit is None else skip + limit
    read = load(data, data_format, limit=None if whole else end)
    if skip >= len(read):
        raise InvalidInputError(f"--skip {skip} leaves no question: {data} has {len(read)}")
    return read[skip:end], read


def _rescored_by(given: Sequence[str], names: Sequence[str]) -> list[tuple[ScoreName, ...]]:
    """The scores of ``--rescore``, checked before anything is computed."""
    from specrag.evaluation.rescoring import check_scores

    scores = [tuple(part.strip() for part in one.split("+")) for one in given]
    if given and not _speculative(names):
        raise InvalidInputError("--rescore chooses among the drafts of a speculative system, and --systems has none")
    return [check_scores(one) for one in scores]


def _speculative(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.split(":")[0] == "speculative"]


def show_comparisons(pairs: Sequence[Comparison]) -> None:
    """Print each pair of systems; of many pairs, those that differ, and how many do not."""
    shown = pairs if len(pairs) <= _FEW_PAIRS else [pair for pair in pairs if not pair.noise]
    for pair in shown:
        out.print(escape(str(pair)), highlight=False, style="dim" if pair.noise else "")
    if left := len(pairs) - len(shown):
        out.print(f"{left} of {len(pairs)} pairs of systems differ by noise: see summary.json", style="dim")


def report(run: Run, scores: Sequence[Sequence[ScoreName]] = ()) -> bool:
    """Show the figures of ``run`` and write them into its folder; whether every answer failed.

    Args:
        scores: The drafts of each speculative system are chosen by each of these once more.
    """
    from specrag.evaluation.page import write_page
    from specrag.evaluation.report import decoding_table, plot, plot_lengths, summary_tables
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
    if any(row.rapid is not None for row in run.answers):
        from specrag.evaluation.long_rows import long_figures  # which loads torch

        out.print(decoding_table(list(long_figures(run.answers, [one.system for one in summary.systems]))))
    else:
        show_comparisons(summary.comparisons)
    written = [summary.save(run.folder), write_page(run.folder, summarize(run) if scores else summary)]
    try:
        written += plot(summary, run.folder) + plot_lengths(run.answers, run.folder)
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
