"""``specrag train`` and ``specrag questions``: a drafter or reader of one's own, and the questions to train it on."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrag._files import check_file_target
from specrag.cli.console import counting, failures_reported, out, show_notes, working
from specrag.cli.loading import check_servers, load_model
from specrag.cli.options import ApiKeyOption, ModelsOption, ServerOption, WordsOption, check_there
from specrag.cli.train_drafter import DrafterTraining
from specrag.cli.train_reader import ReaderTraining
from specrag.errors import InvalidInputError, SpecRAGError

if TYPE_CHECKING:
    from specrag.evaluation.data import Question
    from specrag.schema import Passage


class Method(str, Enum):
    """What is trained."""

    lora, full = "lora", "full"


# Longer than other functions: half of it is the options of the command.
def train(
    data: Annotated[
        Path, typer.Argument(help="JSON lines: question, answers, and passages with gold, or title and text.")
    ],
    output: Annotated[Path, typer.Option("--out", help="Where the adapter (or model) goes; checkpoints beside it.")],
    reader: Annotated[
        bool, typer.Option("--reader", help="Train a span reader, which copies answers, not a drafter that writes.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model to tune: folder, .gguf file, hub id, or smollm2 (with --reader: minilm), the default."
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="LoRA of the base to go on from: folder, or smollm2-rag-drafter.")
    ] = None,
    epochs: Annotated[
        int, typer.Option("--epochs", "--rounds", min=1, help="Rounds over the data, each with other distractors.")
    ] = 2,
    method: Annotated[
        Method | None, typer.Option(help="Tune a LoRA (by default) or all weights (with --reader by default).")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The same as --method full.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the LoRA; 32, with --reader 16.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; 5e-4, with --method full 1e-4, with --reader 3e-4.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per step (8); with --reader, passages per step (64).")
    ] = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in memory at once (8).")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use only this many records.")] = None,
    held: Annotated[int, typer.Option(min=0, help="Records kept back for evaluation.")] = 50,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end only.")] = 0,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; 50, with --reader 100.")
    ] = None,
    rationales: Annotated[
        str | None, typer.Option(help="Model that writes them; by default a sentence of the passage.")
    ] = None,
    substitute: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of examples with another record's answer in the answer's place; 0, with --reader 0.1.",
        ),
    ] = None,
    verdict: Annotated[
        bool, typer.Option("--verdict", help="Teach the drafter of --adapter to say whether its own drafts are right.")
    ] = False,
    source: Annotated[str, typer.Option(help="Named in the model card.")] = "",
    licence: Annotated[str, typer.Option(help="Of the data; named in the model card.")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    models: ModelsOption = None,
) -> None:
    """Make a drafter, or with --reader a span reader, out of questions with passages. A killed run goes on."""
    with failures_reported():
        from specrag.evaluation.data import load_questions
        from specrag.training import TrainingSettings

        if full and method is Method.lora:
            raise InvalidInputError("--full and --method lora contradict each other: give one of them")
        chosen = "full" if full else method.value if method is not None else None
        given: dict[str, Any] = {
            "method": chosen,
            "rank": rank,
            "alpha": None if rank is None else 2 * rank,
            "learning_rate": learning_rate,
            "checkpoint_steps": checkpoint_every,
            "seed": seed,
        }
        changed = {name: value for name, value in given.items() if value is not None}
        check_there(data)
        records = load_questions(data)
        if len(records) <= held + 1:
            raise InvalidInputError(f"{data} has {len(records)} records, of which {held} are held back: give more data")
        used, kept = _divide(records, held)
        used = used[:count]
        card = {"data": source or data.name, "licence of the data": licence or "not given"}
        if reader:
            writers = {
                "--adapter": adapter,
                "--micro-batch-size": micro_batch_size,
                "--rationales": rationales,
                "--verdict": verdict,
            }
            for option, value in writers.items():
                if value not in (None, False):
                    raise InvalidInputError(f"{option} is of no use to a reader: leave it out, or leave --reader out")
            if batch_size is not None:
                changed["rows"] = batch_size
            training = ReaderTraining(
                used=used,
                held=kept,
                base=base or "minilm",
                changed=changed,
                mixed={} if substitute is None else {"substituted": substitute},
                rounds=epochs,
                evaluate_every=evaluate_every,
                models=models,
            )
            training.run(output, card)
        else:
            size = batch_size or TrainingSettings.batch_size
            small = min(micro_batch_size or TrainingSettings.micro_batch_size, size)
            drafter = DrafterTraining(
                used=used,
                held=kept,
                base=base or "smollm2",
                adapter=adapter,
                settings=TrainingSettings(
                    batch_size=size, micro_batch_size=small, evaluation_steps=evaluate_every, **changed
                ),
                substituted=substitute or 0.0,
                rationales=rationales,
                rounds=epochs,
                verdict=verdict,
                models=models,
            )
            drafter.run(output, card)
        out.print((output / "README.md").read_text(encoding="utf-8"), markup=False)


def _divide(records: Sequence[Question], held: int) -> tuple[list[Question], list[Question]]:
    """The records to train on and the ``held`` ones to evaluate with, which are spread over the whole file."""
    step = max(1, len(records) // held) if held else len(records) + 1
    kept = list(records[::step][:held]) if held else []
    known = {record.id for record in kept}
    return [record for record in records if record.id not in known], kept


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
    api_key: ApiKeyOption = None,
    per_passage: Annotated[int, typer.Option(min=1, help="Asked for; fewer come through.")] = 3,
    count: Annotated[int | None, typer.Option("--passages", min=1, help="Ask about only this many passages.")] = None,
    words: WordsOption = 100,
    models: ModelsOption = None,
) -> None:
    """Have a strong LM write the questions to train on. A killed run goes on when repeated."""
    with failures_reported():
        from specrag.evaluation.data import save_questions
        from specrag.models import bundled
        from specrag.training import synthesize_questions

        check_there(docs)
        check_file_target(to)
        check_servers(server)
        passages = _passages(docs, words)[:count]
        with working("loading models"):
            lm, embedder = load_model(model, server, api_key, None, models), bundled("minilm", folder=models)
        replies = to.with_suffix(".replies.jsonl")
        with counting("asking about passages") as progress:
            made = synthesize_questions(passages, lm, embedder, replies, per_passage=per_passage, progress=progress)
        if not made:
            raise SpecRAGError(
                f"{model} wrote no question whose answer stands in its passage: look at {replies}, "
                "give a stronger --model"
            )
        save_questions(made, to)
        out.print(f"{len(made)} questions about {len(passages)} passages in {to}")


def _passages(docs: Path, words: int) -> list[Passage]:
    """The gold passages of a file of questions, or the passages of documents."""
    from specrag.evaluation.data import load_questions
    from specrag.retrieval import read_passages

    if docs.suffix == ".jsonl":
        return [record.passages[i] for record in load_questions(docs) for i in record.gold]
    notes: list[str] = []
    passages = read_passages(docs, words, notes=notes)
    show_notes(notes)
    return passages
