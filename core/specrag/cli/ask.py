"""``specrag ask`` and ``specrag demo``: questions answered by Speculative RAG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specrag._files import check_file_target, write_text
from specrag.cli.answers import follow, show, show_json
from specrag.cli.console import counting, failures_reported, out, show_notes, working
from specrag.cli.loading import ModelOptions, note_confidence, with_statement
from specrag.cli.options import (
    ApiKeyOption,
    CalibrationOption,
    DrafterOption,
    EmbedderOption,
    EmbedderServerOption,
    EscalateBelowOption,
    EscalateOption,
    MinConfidenceOption,
    ModelsOption,
    ServerOption,
    Statement,
    TokenizerOption,
    VerifierOption,
    VerifierServerOption,
    check_there,
)

if TYPE_CHECKING:
    from specrag.models.embedders import Embedder
    from specrag.retrieval import PassageIndex

ABSTAINED = 3  # the exit code of an answer that abstains
# What the demo says of its drafter, where none is given.
ABOUT = {
    "smollm2-rag-drafter": "The drafter is SmolLM2-135M, trained by `specrag train`: it writes answers, and judges "
    "them itself. For better\nanswers give a larger --verifier, or train a drafter on questions of your own.",
    "minilm-reader": "The drafter is MiniLM, 22 million parameters, trained by `specrag train --reader`: it copies "
    "answers, and nobody\nverifies them. For better answers give a --verifier, "
    "or train a reader on questions of your own.",
}
DEMO = Path(__file__).parent.parent / "data" / "demo.jsonl"


def ask(
    question: Annotated[str, typer.Argument(help="What to answer.")],
    docs: Annotated[
        Path, typer.Option(help="A file or folder (txt, md, html, pdf), or an index made by `specrag index`.")
    ],
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    server: ServerOption = None,
    verifier_server: VerifierServerOption = None,
    tokenizer: TokenizerOption = None,
    embedder: EmbedderOption = None,
    embedder_server: EmbedderServerOption = None,
    api_key: ApiKeyOption = None,
    calibration: CalibrationOption = None,
    min_confidence: MinConfidenceOption = None,
    escalate: EscalateOption = None,
    escalate_below: EscalateBelowOption = 0.5,
    drafts: Annotated[int, typer.Option(min=1, help="m: how many drafts.")] = 5,
    passages_per_draft: Annotated[int, typer.Option(min=1, help="k: how many passages each draft reads.")] = 2,
    top: Annotated[int, typer.Option(min=1, help="How many passages to retrieve.")] = 10,
    statement: Annotated[
        Statement | None,
        typer.Option(help="Self-reflection statement that the verifier answers; the first by default."),
    ] = None,
    seed: int = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON on stdout.")] = False,
    explain: Annotated[bool, typer.Option(help="A table of all drafts, their passages and scores.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the answer, its drafts and passages.")
    ] = None,
    models: ModelsOption = None,
) -> None:
    """Answer a question from your documents."""
    with failures_reported():
        from specrag.text import question_of

        question_of(question)
        check_there(docs)
        chosen = ModelOptions(
            drafter=drafter,
            verifier=verifier,
            server=server,
            verifier_server=verifier_server,
            tokenizer=tokenizer,
            embedder=embedder,
            embedder_server=embedder_server,
            api_key=api_key,
            calibration=calibration,
            min_confidence=min_confidence,
            escalate=escalate and escalate.value,
            escalate_below=escalate_below,
            models=models,
        )
        chosen.check_models()
        if html is not None:
            check_file_target(html)
        with working("loading the embedder"):
            used = chosen.load_embedder()
        index = _index_of(docs, used)
        with working("loading models"):
            rag = chosen.load_pipeline(embedder=used, drafts=drafts, passages_per_draft=passages_per_draft, seed=seed)
            rag = rag if statement is None else with_statement(rag, statement)
        note_confidence(rag)
        answer = follow(rag, question, index.search(question, top))
        if html is not None:
            write_text(html, answer.to_html())
        if as_json:
            show_json(answer)
        else:
            show(answer, explain=explain)
    raise typer.Exit(ABSTAINED if answer.abstained else 0)


def _index_of(docs: Path, embedder: Embedder) -> PassageIndex:
    """The index that is saved at ``docs``, or one of the documents there."""
    from specrag.retrieval import PassageIndex, index_documents

    if PassageIndex.is_saved_at(docs):
        return PassageIndex.load(docs, embedder)
    notes: list[str] = []
    with counting("indexing") as progress:
        index = index_documents(docs, embedder, notes=notes, progress=progress)
    show_notes(notes)
    return index


def demo(
    count: Annotated[int | None, typer.Option("--questions", min=1, help="How many of the sample's questions.")] = None,
    drafter: DrafterOption = None,
    verifier: VerifierOption = None,
    calibration: CalibrationOption = None,
    min_confidence: MinConfidenceOption = None,
    escalate: EscalateOption = None,
    models: ModelsOption = None,
) -> None:
    """Answer real questions from real passages, and show how each answer was chosen."""
    with failures_reported():
        from specrag.evaluation.data import load_questions
        from specrag.evaluation.metrics import contains_answer
        from specrag.models.bundled import DEFAULT_DRAFTER

        chosen = ModelOptions(
            drafter=drafter,
            verifier=verifier,
            calibration=calibration,
            min_confidence=min_confidence,
            escalate=escalate and escalate.value,
            models=models,
        )
        chosen.check_models()
        questions = load_questions(DEMO)[:count]
        with working("loading models"):
            rag = chosen.load_pipeline(embedder=chosen.load_embedder())
        note_confidence(rag)
        out.print(
            "Questions of Natural Questions with ten Wikipedia passages each (CC BY-SA 3.0). "
            "Every question gets several\n"
            "drafts from different passages; the drafts are scored, and the best one is the answer.\n"
        )
        right = 0
        for item in questions:
            answer = follow(rag, item.question, item.passages)
            show(answer, explain=True)
            correct = contains_answer(answer.text, item.answers) if item.answers else answer.abstained
            right += correct
            expected = " or ".join(item.answers) or "no answer: the passages do not hold one"
            out.print(f"expected: {expected} — {'[green]right' if correct else '[red]wrong'}[/]\n")
        out.print(f"{right} of {len(questions)} right.")
        if not drafter:
            out.print(f"[dim]{ABOUT[DEFAULT_DRAFTER]}[/]")
