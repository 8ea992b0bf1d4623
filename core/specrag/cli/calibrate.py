"""``specrag calibrate``: what the confidence of a user's own models is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrag._files import check_file_target
from specrag.cli.console import counting, failures_reported, out, working
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
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from specrag.evaluation.calibration import HeldOut
    from specrag.speculative.confidence import Calibration


def calibrate(
    data: Annotated[
        Path, typer.Argument(help="JSON lines: question, answers, and the passages that are retrieved for it.")
    ],
    output: Annotated[Path, typer.Option("--out", help="The calibration: a JSON file.")],
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    server: ServerOption = None,
    verifier_server: VerifierServerOption = None,
    tokenizer: TokenizerOption = None,
    embedder: EmbedderOption = None,
    embedder_server: EmbedderServerOption = None,
    api_key: ApiKeyOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use only this many questions.")] = None,
    models: ModelsOption = None,
) -> None:
    """Fit the probability of being right to these models. Ask at least 50 questions, better several hundred."""
    with failures_reported():
        from specrag.evaluation.calibration import calibrate as fit
        from specrag.evaluation.calibration import calibration_examples, held_out_error
        from specrag.evaluation.data import load_questions
        from specrag.speculative.confidence import LEAST_QUESTIONS

        check_there(data)
        check_file_target(output)
        if not output.absolute().parent.is_dir():
            raise InvalidInputError(f"no folder {output.absolute().parent} to write {output.name} to")
        records = load_questions(data)[:count]
        if len(records) < LEAST_QUESTIONS:
            raise InvalidInputError(f"a calibration needs at least {LEAST_QUESTIONS} questions, got {len(records)}")
        chosen = ModelOptions(
            drafter=drafter,
            verifier=verifier,
            server=server,
            verifier_server=verifier_server,
            tokenizer=tokenizer,
            embedder=embedder,
            embedder_server=embedder_server,
            api_key=api_key,
            models=models,
        )
        chosen.check_models()
        with working("loading models"):
            rag = chosen.load_pipeline(embedder=chosen.load_embedder())
        with counting("asking") as progress:
            examples = calibration_examples(rag, records, progress=progress)
        made = fit(rag, examples)
        made.save(output)
        _report(made, held_out_error(examples), output)


def _report(made: Calibration, held: HeldOut | None, output: Path) -> None:
    names = f"{', '.join(made.drafters)}, verified by {made.verifier or 'nobody'}, {made.mode}"
    out.print(f"{output}: {made.questions} answers of {names}; {made.right:.1%} are right", highlight=False)
    if held is None:
        out.print("not checked: one half of the answers is all right or all wrong")
    else:
        out.print(
            f"held-out half: {held.questions} answers, {held.right:.1%} right, "
            f"mean confidence {held.confidence:.1%}, expected calibration error "
            f"{held.error:.3f} ({held.bins} bins)",
            highlight=False,
        )
        out.print(
            f"chance alone causes an error of {held.chance:.3f} on average with that many answers", highlight=False
        )
    out.print(f"use it: specrag ask ... --calibration {output} --min-confidence 0.5", highlight=False)
