"""The ``specrag`` command: ask, index, demo, questions, train, models fetch.

Exit codes: 0 answered or done, 1 a failure (its message on stderr), 2 wrong usage, 3 the answer abstained.
Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from specrag.errors import InvalidInputError, SpecRAGError

if TYPE_CHECKING:
    from specrag.models.base import LanguageModel
    from specrag.schema import Passage, SpeculativeAnswer
    from specrag.speculative.pipeline import SpeculativeRAG

ABSTAINED = 3
TRAINING_LOG = {
    "loss": "loss",
    "right": "held part right",
    "wrongly_abstained": "wrongly abstained",
    "rightly_abstained": "rightly abstained",
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Retrieval-augmented answers: drafted by a small model, verified by a larger one.",
)
models_app = typer.Typer(no_args_is_help=True, help="The embedded models.")
app.add_typer(models_app, name="models")

out = Console()
err = Console(stderr=True)

Folder = Annotated[Path | None, typer.Option("--models", help="Where the embedded models are (default: user cache).")]
DrafterOption = Annotated[str | None, typer.Option(help="Model folder, .gguf file, hub id, or its name on --server.")]
VerifierOption = Annotated[str | None, typer.Option(help="The same; by default the drafter verifies its own drafts.")]
ServerOption = Annotated[
    list[str] | None,
    typer.Option(help="OpenAI-compatible base URL up to /v1, for drafter and verifier. Repeat for a pool."),
]
TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer of the served model: exact scores over --server.")]


class Statement(str, Enum):
    """Which of the paper's self-reflection statements (Table 7) the verifier answers."""

    one, two, three, four = "1", "2", "3", "4"


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    docs: Annotated[
        Path, typer.Option(help="A file or folder (txt, md, html, pdf), or an index made by `specrag index`.")
    ],
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    server: ServerOption = None,
    tokenizer: TokenizerOption = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="For --server.")
    ] = None,
    drafts: Annotated[int, typer.Option(min=1, help="m: how many drafts.")] = 5,
    passages_per_draft: Annotated[int, typer.Option(min=1, help="k: how many passages each reads.")] = 2,
    top: Annotated[int, typer.Option(min=1, help="How many passages to retrieve.")] = 10,
    statement: Annotated[Statement, typer.Option(help="Self-reflection statement.")] = Statement.one,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON on stdout.")] = False,
    explain: Annotated[bool, typer.Option(help="A table of all drafts, their passages and scores.")] = False,
    models: Folder = None,
) -> None:
    """Answer a question from your documents."""
    with failures_reported():
        from specrag.models import bundled
        from specrag.retrieval import PassageIndex, index_documents

        if not question.strip():
            raise InvalidInputError("the question is empty")
        _check_there(docs)
        with working("loading models"):
            embedder = bundled("minilm", folder=models)
            rag = _pipeline(drafter, verifier, server, tokenizer, api_key, models).replace(
                embedder=embedder, drafts=drafts, passages_per_draft=passages_per_draft, seed=seed
            )
            rag = rag.replace(prompts=_with_statement(rag, statement))
        if (docs / "index.json").exists():
            index = PassageIndex.load(docs, embedder)
        else:
            with counting("indexing") as progress:
                index = index_documents(docs, embedder, progress=progress)
        answer = follow(rag, question, index.search(question, top))
        show(answer, as_json=as_json, explain=explain)
    raise typer.Exit(ABSTAINED if answer.abstained else 0)


@app.command()
def index(
    docs: Annotated[Path, typer.Argument(help="A file or folder (txt, md, html, pdf).")],
    to: Annotated[Path, typer.Option(help="The folder to write the index to.")],
    words: Annotated[int, typer.Option(min=1, help="Words a passage.")] = 100,
    overlap: Annotated[int, typer.Option(min=0, help="Words that a passage repeats of the one before.")] = 0,
    models: Folder = None,
) -> None:
    """Index documents once, to ask many times."""
    with failures_reported():
        from specrag.models import bundled
        from specrag.retrieval import index_documents

        _check_there(docs)
        with working("loading the embedder"):
            embedder = bundled("minilm", folder=models)
        with counting("indexing") as progress:
            made = index_documents(docs, embedder, words=words, overlap=overlap, progress=progress)
        made.save(to)
        out.print(f"{len(made)} passages indexed in {to}")


@app.command()
def demo(
    count: Annotated[int | None, typer.Option("--questions", min=1, help="How many of the sample's questions.")] = None,
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    models: Folder = None,
) -> None:
    """Answer real questions from real passages, and show how each answer was chosen."""
    with failures_reported():
        from specrag.evaluation.data import load_questions
        from specrag.evaluation.metrics import contains_answer
        from specrag.models import bundled

        questions = load_questions(Path(__file__).parent / "data" / "demo.jsonl")[:count]
        with working("loading models"):
            rag = _pipeline(drafter, verifier, None, None, None, models).replace(
                embedder=bundled("minilm", folder=models)
            )
        out.print(
            "Questions of Natural Questions with ten Wikipedia passages each (CC BY-SA 3.0). Every draft reads two of\n"
            "them; the drafts are scored in one forward pass, and the best one is the answer.\n"
        )
        right = 0
        for item in questions:
            answer = follow(rag, item.question, item.passages)
            show(answer, as_json=False, explain=True)
            correct = contains_answer(answer.text, item.answers) if item.answers else answer.abstained
            right += correct
            expected = " or ".join(item.answers) or "no answer: the passages do not hold one"
            out.print(f"expected: {expected} — {'[green]right' if correct else '[red]wrong'}[/]\n")
        out.print(f"{right} of {len(questions)} right.")
        if drafter is None:
            out.print(
                "[dim]Drafter and verifier are SmolLM2-135M, trained as a drafter by `specrag train`: small and quick. For better\n"
                "answers give a larger --verifier, or train a drafter on questions of your own.[/]"
            )


@app.command()
def train(
    data: Annotated[
        Path, typer.Argument(help="JSON lines: question, answers, and passages with gold, or title and text.")
    ],
    output: Annotated[Path, typer.Option("--out", help="Where the adapter (or model) goes; checkpoints beside it.")],
    base: Annotated[str, typer.Option(help="Model to tune: folder, .gguf file, hub id, or smollm2.")] = "smollm2",
    adapter: Annotated[
        str | None, typer.Option(help="LoRA of the base to go on from: folder, or smollm2-rag-drafter.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Rounds over the data, each with other distractors.")] = 2,
    full: Annotated[bool, typer.Option("--full", help="Tune all weights, not a LoRA.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; by default 5e-4, with --full 1e-4.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Examples in memory at once.")] = 8,
    count: Annotated[int | None, typer.Option(min=1, help="Use so many records only.")] = None,
    held: Annotated[int, typer.Option(min=0, help="Records kept back for evaluation.")] = 50,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end only.")] = 0,
    rationales: Annotated[
        str | None, typer.Option(help="Model that writes them; by default the passage's own.")
    ] = None,
    substitute: Annotated[
        float, typer.Option(min=0, max=1, help="Share of examples with another record's answer in the answer's place.")
    ] = 0.0,
    source: Annotated[str, typer.Option(help="Named in the model card.")] = "",
    licence: Annotated[str, typer.Option(help="Of the data; named in the model card.")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    models: Folder = None,
) -> None:
    """Make a drafter out of a small LM and questions with passages. A killed run goes on when repeated."""
    with failures_reported():
        from specrag.evaluation.data import load_questions
        from specrag.models import TransformersLM, bundled
        from specrag.models.bundled import ADAPTERS, adapter_folder

        with _training_extra():
            from specrag.training import Mixture, TrainingSettings, make_examples, synthesize_rationales
            from specrag.training import train as run_training
        _check_there(data)
        settings = TrainingSettings(
            method="full" if full else "lora",
            rank=rank,
            alpha=2 * rank,
            learning_rate=learning_rate,
            batch_size=batch_size,
            micro_batch_size=min(micro_batch_size, batch_size),
            evaluation_steps=evaluate_every,
            seed=seed,
        )
        records = load_questions(data)
        if len(records) <= held + 1:
            raise InvalidInputError(f"{data} has {len(records)} records, of which {held} are held back: give more data")
        step = max(1, len(records) // held) if held else len(records) + 1
        kept = records[::step][:held] if held else []
        known = {record.id for record in kept}
        used = [record for record in records if record.id not in known][:count]
        embedder = bundled("minilm", folder=models)
        written = {}
        if rationales:
            with counting("writing rationales") as update:
                cache = output / "rationales.jsonl"
                written = synthesize_rationales(used, TransformersLM(rationales), cache, progress=update)
        with working("making examples"):
            mixture = Mixture(substituted=substitute)
            rounds = make_examples(used, embedder, variants=epochs, mixture=mixture, rationales=written, seed=seed)
            others = [passage for record in used for passage in record.passages]
            examined = make_examples(kept, embedder, corpus=others, seed=seed + 1)[0] if kept else []
            lm = bundled("smollm2", folder=models) if base == "smollm2" else TransformersLM(base)
        with training_shown() as report:
            run_training(
                lm,
                rounds,
                output,
                settings=settings,
                held=examined,
                adapter=adapter_folder(adapter) if adapter in ADAPTERS else adapter,
                card={"data": source or data.name, "licence of the data": licence or "not given"},
                progress=report,
            )
        out.print((output / "README.md").read_text(encoding="utf-8"), markup=False)


@app.command()
def questions(
    docs: Annotated[
        Path,
        typer.Argument(help="A file or folder (txt, md, html, pdf), or a file for `specrag train`: new ones for it."),
    ],
    to: Annotated[Path, typer.Option("--out", help="JSON lines for `specrag train`; the model's replies beside it.")],
    model: Annotated[
        str, typer.Option(help="The LM that writes: folder, .gguf file, hub id, or its name on --server.")
    ],
    server: ServerOption = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="For --server.")
    ] = None,
    per_passage: Annotated[int, typer.Option(min=1, help="Asked for; fewer come through.")] = 3,
    count: Annotated[int | None, typer.Option("--passages", min=1, help="Ask about so many passages only.")] = None,
    words: Annotated[int, typer.Option(min=1, help="Words a passage.")] = 100,
    models: Folder = None,
) -> None:
    """Have a strong LM write the questions to train on. A killed run goes on when repeated."""
    with failures_reported():
        from specrag.evaluation.data import load_questions, save_questions
        from specrag.models import bundled
        from specrag.retrieval import read_passages

        with _training_extra():
            from specrag.training import synthesize_questions
        _check_there(docs)
        if docs.suffix == ".jsonl":
            passages = [record.passages[i] for record in load_questions(docs) for i in record.gold]
        else:
            passages = read_passages(docs, words)
        with working("loading models"):
            lm, embedder = _load(model, server, api_key), bundled("minilm", folder=models)
        chosen, replies = passages[:count], to.with_suffix(".replies.jsonl")
        with counting("asking about passages") as progress:
            made = synthesize_questions(chosen, lm, embedder, replies, per_passage=per_passage, progress=progress)
        if not made:
            raise SpecRAGError(
                f"{model} wrote no question whose answer stands in its passage: look at {replies}, give a stronger --model"
            )
        save_questions(made, to)
        out.print(f"{len(made)} questions about {len(chosen)} passages in {to}")


@models_app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="smollm2, minilm; by default all.")] = None,
    to: Annotated[Path | None, typer.Option(help="Where to put them (default: user cache).")] = None,
) -> None:
    """Download the embedded models, check them and convert them, once."""
    with failures_reported():
        from specrag.models.bundled import BUNDLED
        from specrag.models.bundled import fetch as fetch_model

        for name in names or list(BUNDLED):
            if name not in BUNDLED:
                raise InvalidInputError(f"no embedded model {name!r}: there are {', '.join(BUNDLED)}")
        for name in names or list(BUNDLED):
            with working(f"fetching {name}") as update:
                path = fetch_model(name, to, update)
            out.print(f"{name}: {path}")


# --- pieces ------------------------------------------------------------------------------------------


def _pipeline(
    drafter: str | None,
    verifier: str | None,
    server: list[str] | None,
    tokenizer: str | None,
    api_key: str | None,
    models: Path | None,
) -> SpeculativeRAG:
    from specrag.models import bundled
    from specrag.speculative.pipeline import SpeculativeRAG

    if server and drafter is None:
        raise InvalidInputError("--server needs --drafter: the model's name on the server")

    if drafter is None:
        # Int8 weights halve the drafting time on the CPU; a GPU has no use for it.
        import torch

        options = {} if torch.cuda.is_available() else {"quantization": "int8"}
        first: LanguageModel = bundled("smollm2-rag-drafter", folder=models, **options)
    else:
        first = _load(drafter, server, api_key, tokenizer)
    return SpeculativeRAG(drafter=first, verifier=_load(verifier, server, api_key, tokenizer) if verifier else None)


def _load(name: str, server: list[str] | None, api_key: str | None, tokenizer: str | None = None) -> LanguageModel:
    if server:
        from specrag.models import OpenAILM  # needs the extra `openai`

        return OpenAILM(name, server, api_key=api_key, tokenizer=tokenizer)
    from specrag.models import TransformersLM

    return TransformersLM(name)


@contextlib.contextmanager
def _training_extra() -> Iterator[None]:
    """What is imported inside needs the extra `train`."""
    try:
        yield
    except ImportError as error:
        raise SpecRAGError("training needs its extra: pip install 'specrag[train]'") from error


def _check_there(path: Path) -> None:
    """Before models load: a typing error shall not cost a minute."""
    if not path.exists():
        raise InvalidInputError(f"no file or folder at {path}")


def _with_statement(rag: SpeculativeRAG, statement: Statement) -> Any:
    from dataclasses import replace

    from specrag.speculative.prompts import SELF_REFLECTION_STATEMENTS

    return replace(rag.texts, statement=SELF_REFLECTION_STATEMENTS[int(statement.value) - 1])


def follow(rag: SpeculativeRAG, question: str, passages: list[Passage] | tuple[Passage, ...]) -> SpeculativeAnswer:
    """Answer while a line on stderr tells what is going on."""
    from specrag.schema import AnswerReady, DraftDone, DraftFailed, SubsetsChosen, VerdictReady

    drafted = verified = total = 0
    answer = None
    with working("retrieving perspectives") as update:
        for event in rag.stream(question, passages):
            if isinstance(event, SubsetsChosen):
                total = len(event.subsets)
            elif isinstance(event, DraftDone | DraftFailed):
                drafted += 1
            elif isinstance(event, VerdictReady):
                verified += 1
            elif isinstance(event, AnswerReady):
                answer = event.answer
            update(f"drafted {drafted} of {total}, verified {verified}")
    assert answer is not None
    return answer


def show(answer: SpeculativeAnswer, *, as_json: bool, explain: bool) -> None:
    """Print an answer for a person, or as JSON for a program."""
    if as_json:
        sys.stdout.write(json.dumps(answer.to_dict(), ensure_ascii=False, indent=2) + "\n")
        return
    shown = (
        f"[yellow]no answer:[/] {escape(answer.reason or '')}"
        if answer.abstained
        else f"[bold]{escape(answer.text)}[/]"
    )
    if answer.rationale and not answer.abstained:
        shown += f"\n[dim]{escape(answer.rationale)}[/]"
    out.print(Panel(shown, title=escape(answer.question), title_align="left"))
    for passage in answer.passages:
        name = passage.title or passage.id or "passage"
        out.print(f"  [cyan]{escape(name)}[/] {escape(passage.text[:110])}{'…' if len(passage.text) > 110 else ''}")
    if explain:
        out.print(_table(answer))
    t = answer.timings
    out.print(
        f"[dim]embed {t.embed:.2f} s, cluster {t.cluster:.3f} s, draft {t.draft:.2f} s, verify {t.verify:.2f} s, "
        f"total {t.total:.2f} s[/]"
    )
    for note in answer.notes:
        err.print(f"[yellow]note:[/] {escape(note)}")


def _table(answer: SpeculativeAnswer) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("draft", "passages"):
        table.add_column(name, overflow="fold")
    for name in ("log ρ_draft", "log ρ_SC", "log ρ_SR", "log ρ"):
        table.add_column(name, justify="right", no_wrap=True)

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    for i, v in enumerate(answer.verdicts):
        text = escape(v.draft.text) if not v.draft.abstained else f"[dim]{escape(v.draft.text)}[/]"
        chosen = i == 0 and not answer.abstained
        table.add_row(
            f"[green]{text}[/]" if chosen else text,
            ", ".join(str(n + 1) for n in v.draft.subset),
            number(v.log_draft),
            number(v.log_self_contain),
            number(v.log_self_reflect),
            number(v.log_score),
        )
    for failure in answer.failures:
        table.add_row(f"[red]{escape(failure.error)}[/]", ", ".join(str(n + 1) for n in failure.subset))
    return table


@contextlib.contextmanager
def working(doing: str) -> Iterator[Any]:
    """A spinner with a text that can change, on stderr, when that is a terminal."""
    with err.status(doing) as status:
        yield status.update


@contextlib.contextmanager
def counting(doing: str) -> Iterator[Any]:
    """A bar that counts up, on stderr; yields a function of (done, total)."""
    columns = (SpinnerColumn(), TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def training_shown() -> Iterator[Any]:
    """A bar with the time left, on stderr; what is logged goes above it, a line each."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("training", total=None)

        def report(step: int, steps: int, logged: Mapping[str, Any]) -> None:
            bar.update(task, completed=step, total=steps)
            shown = {name: value for name, value in logged.items() if name in TRAINING_LOG and value is not None}
            if shown:
                text = ", ".join(f"{TRAINING_LOG[name]} {float(value):.3g}" for name, value in shown.items())
                bar.console.print(f"step {step} of {steps}: {text}", highlight=False)

        yield report


@contextlib.contextmanager
def failures_reported() -> Iterator[None]:
    """What specrag raises on purpose becomes one line on stderr and exit code 1."""
    try:
        yield
    except SpecRAGError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except ImportError as error:
        if error.name != "httpx":
            raise
        err.print("[red]error:[/] --server needs httpx: pip install 'specrag\\[openai]'")
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the ``specrag`` command."""
    app()


if __name__ == "__main__":
    main()
