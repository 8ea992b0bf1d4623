"""``specrag train`` and ``specrag questions``: a drafter of one's own, and the questions to train it on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrag.cli.console import counting, failures_reported, out, training_shown, working
from specrag.cli.loading import load_model
from specrag.cli.options import ApiKeyOption, ModelsOption, ServerOption, WordsOption, check_there
from specrag.errors import InvalidInputError, SpecRAGError

if TYPE_CHECKING:
    from specrag.evaluation.data import Question
    from specrag.models import TransformersLM
    from specrag.schema import Passage


# Longer than other functions: a third of it is the options of the command.
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
    count: Annotated[int | None, typer.Option(min=1, help="Use only this many records.")] = None,
    held: Annotated[int, typer.Option(min=0, help="Records kept back for evaluation.")] = 50,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: at the end only.")] = 0,
    rationales: Annotated[
        str | None, typer.Option(help="Model that writes them; by default a sentence of the passage.")
    ] = None,
    substitute: Annotated[
        float, typer.Option(min=0, max=1, help="Share of examples with another record's answer in the answer's place.")
    ] = 0.0,
    source: Annotated[str, typer.Option(help="Named in the model card.")] = "",
    licence: Annotated[str, typer.Option(help="Of the data; named in the model card.")] = "",
    seed: Annotated[int, typer.Option()] = 0,
    models: ModelsOption = None,
) -> None:
    """Make a drafter out of a small LM and questions with passages. A killed run goes on when repeated."""
    with failures_reported():
        from specrag.evaluation.data import load_questions
        from specrag.models import bundled
        from specrag.models.bundled import ADAPTERS, adapter_folder
        from specrag.training import Mixture, TrainingSettings, make_examples
        from specrag.training import train as run_training

        check_there(data)
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
        used, kept = _divide(records, held)
        used = used[:count]
        embedder = bundled("minilm", folder=models)
        written = _write_rationales(used, rationales, output / "rationales.jsonl") if rationales else {}
        with working("making examples"):
            mixture = Mixture(substituted=substitute)
            rounds = make_examples(used, embedder, variants=epochs, mixture=mixture, rationales=written, seed=seed)
            others = [passage for record in used for passage in record.passages]
            examined = make_examples(kept, embedder, corpus=others, seed=seed + 1)[0] if kept else []
            lm = _base_model(base, models)
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


def _base_model(name: str, models: Path | None) -> TransformersLM:
    from specrag.models import TransformersLM, bundled

    return bundled("smollm2", folder=models) if name == "smollm2" else TransformersLM(name)


def _divide(records: Sequence[Question], held: int) -> tuple[list[Question], list[Question]]:
    """The records to train on and the ``held`` ones to evaluate with, which are spread over the whole file."""
    step = max(1, len(records) // held) if held else len(records) + 1
    kept = list(records[::step][:held]) if held else []
    known = {record.id for record in kept}
    return [record for record in records if record.id not in known], kept


def _write_rationales(records: Sequence[Question], model: str, cache: Path) -> dict[str, str]:
    from specrag.models import TransformersLM
    from specrag.training import synthesize_rationales

    with counting("writing rationales") as update:
        return synthesize_rationales(records, TransformersLM(model), cache, progress=update)


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
        passages = _passages(docs, words)[:count]
        with working("loading models"):
            lm, embedder = load_model(model, server, api_key), bundled("minilm", folder=models)
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
    return read_passages(docs, words)
