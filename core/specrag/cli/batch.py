"""``specrag batch``: a file of questions answered into a file of answers. A run that was killed goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specrag._extras import require
from specrag._files import check_file_target, turn_of, whole, writing
from specrag.cli.console import counting, failures_reported, out, show_notes, working
from specrag.cli.loading import ModelOptions, note_confidence
from specrag.cli.options import (
    ApiKeyOption,
    CalibrationOption,
    DrafterOption,
    EmbedderOption,
    EmbedderServerOption,
    EscalateOption,
    MinConfidenceOption,
    ModelsOption,
    ServerOption,
    TokenizerOption,
    VerifierOption,
    VerifierServerOption,
    check_index,
    check_there,
)
from specrag.errors import InvalidInputError, said

if TYPE_CHECKING:
    from specrag.retrieval import PassageIndex
    from specrag.schema import Passage
    from specrag.speculative.pipeline import SpeculativeRAG


@dataclass(frozen=True)
class Row:
    """A question to answer. ``passages``: its own; ``None``: those that the index finds."""

    id: str
    question: str
    passages: Sequence[Passage] | None


def batch(
    questions: Annotated[
        Path, typer.Argument(help="JSON lines: question; and, where they have them, id and passages.")
    ],
    output: Annotated[Path, typer.Option("--out", help="JSON lines: one answer per question. Repeat to go on.")],
    docs: Annotated[
        Path | None, typer.Option(help="An index made by `specrag index`, for questions without passages.")
    ] = None,
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
    top: Annotated[int, typer.Option(min=1, help="How many passages to retrieve.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions that are worked on at once.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="In several processes of Ray Data (extra ray).")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: how many processes load the models; by default 2.")
    ] = None,
    worker_gpus: Annotated[
        float | None, typer.Option(min=0, help="With --ray: GPUs of each of them; by default 0.")
    ] = None,
    models: ModelsOption = None,
) -> None:
    """Answer a file of questions. A killed run goes on when it is repeated: what is answered is not asked again."""
    with failures_reported():
        from specrag import _blocking

        if ray:
            require("ray", "ray", "specrag batch --ray")
        elif workers is not None or worker_gpus is not None:
            raise InvalidInputError("--workers and --worker-gpus are those of --ray: give --ray too")
        check_there(questions)
        check_file_target(output)
        rows = read_questions(questions)
        if docs is None:
            check_passages(questions, rows)
        else:
            check_index(docs)
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
            models=models,
        )
        chosen.check_models()
        if ray:  # the models load in processes that have their own working folders
            chosen = chosen.with_whole_paths()
        load = partial(load_parts, chosen, docs.expanduser().absolute() if docs is not None else None)
        answer = partial(answer_all, top=top, concurrency=concurrency)
        if not ray:
            with working("loading models"):
                rag, index = load()
            note_confidence(rag)
        with appending(output) as (done, append), counting("answering") as progress:
            left = [row for row in rows if row.id not in done]
            before = len(rows) - len(left)
            if ray:
                from specrag.cli.batch_ray import answer_on_ray

                block, many, gpus = max(8, 2 * concurrency), workers or 2, worker_gpus or 0.0
                answer_on_ray(load, answer, left, append, progress, before, block=block, workers=many, gpus=gpus)
            else:
                _blocking.run(answer(rag, index, left, append=append, progress=progress, before=before))
            failed = sum(row.get("error") is not None for row in done.values())
        say_done(output, before, len(left), failed)


def load_parts(chosen: ModelOptions, docs: Path | None) -> tuple[SpeculativeRAG, PassageIndex | None]:
    """The pipeline, and the index at ``docs``, which is read first: another embedder's is refused at once."""
    from specrag.retrieval import PassageIndex

    used = chosen.load_embedder()
    index = PassageIndex.load(docs, used) if docs is not None else None
    return chosen.load_pipeline(embedder=used), index


def say_done(output: Path, before: int, new: int, failed: int) -> None:
    """Print what is in ``output`` after a run."""
    out.print(f"{before + new} questions in {output}: {before} were there, {new} are new", soft_wrap=True)
    if failed:
        show_notes([f"{failed} questions could not be answered: see the field 'error' of their rows"])


def check_passages(questions: Path, rows: Sequence[Row]) -> None:
    """Raise InvalidInputError where one of ``rows`` needs an index."""
    bare = next((row.id for row in rows if row.passages is None), None)
    if bare is not None:
        raise InvalidInputError(f"{questions}: question {bare!r} has no passages: give --docs INDEX")


async def answer_all(
    rag: SpeculativeRAG,
    index: PassageIndex | None,
    rows: Sequence[Row],
    top: int,
    concurrency: int,
    append: Callable[[Mapping[str, Any]], None],
    progress: Callable[[int, int], None],
    before: int,
) -> None:
    """Answer ``rows``, ``concurrency`` at once. Each answer is written as soon as it is made.

    Raises:
        ModelError: The models failed. What is answered is written; the rest is asked when the command is repeated.
    """
    from specrag._abandoned import in_thread

    waiting, made = iter(rows), before

    async def work() -> None:
        nonlocal made
        for row in waiting:
            try:
                passages = row.passages
                if passages is None:
                    assert index is not None  # checked before
                    passages = await in_thread(index.search, row.question, top)
                answer = await rag.aanswer(row.question, passages)
                append({"id": row.id, **answer.to_dict(), "error": None})
            except InvalidInputError as error:  # of this question alone
                append({"id": row.id, "question": row.question, "text": "", "error": said(error)})
            made += 1
            progress(made, before + len(rows))

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def read_questions(file: Path) -> list[Row]:
    """The questions of a file of JSON lines. A question without an id has the number of its line, from 1.

    Raises:
        InvalidInputError: A line is no question, or two have one id; the message names the line.
    """
    from specrag.schema import passages_of

    found: dict[str, Row] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            content = json.loads(line)
        except ValueError as error:
            raise InvalidInputError(f"{where}: not JSON: {error}") from None
        question = content.get("question") if isinstance(content, dict) else None
        if not isinstance(question, str):
            raise InvalidInputError(f'{where}: expected an object with "question", a text')
        id = str(content.get("id", number))  # noqa: A001
        if id in found:
            raise InvalidInputError(f"{where}: two questions have the id {id!r}: each needs its own")
        given = content.get("passages")
        try:
            passages = None if given is None else passages_of(given)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from None
        found[id] = Row(id, question, passages)
    if not found:
        raise InvalidInputError(f"{file} holds no question")
    return list(found.values())


@contextlib.contextmanager
def appending(file: Path) -> Iterator[tuple[dict[str, Mapping[str, Any]], Callable[[Mapping[str, Any]], None]]]:
    """The rows that a file of JSON lines has, by their ids, and what appends one. One process at a time may do so.

    A last line that is half written is cut off. A row that is appended is there even if this process is killed right
    after; it is added to the rows too.

    Raises:
        InvalidInputError: The file holds other lines, or another process appends to it.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    target = whole(file)
    with writing(target), turn_of(target, busy=f"another process writes {file}: wait for it, or give another file"):
        content = target.read_bytes() if target.exists() else b""
        end = content.rfind(b"\n") + 1
        done: dict[str, Mapping[str, Any]] = {}
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                row = json.loads(line)
                _ = row["error"]  # a file of questions has ids too
                done[row["id"]] = row
            except (ValueError, KeyError, TypeError):
                raise InvalidInputError(f"{file}, line {number}: not an answer of `specrag batch`") from None
        with target.open("ab") as opened:
            opened.truncate(end)

            def append(row: Mapping[str, Any]) -> None:
                opened.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                opened.flush()
                done[row["id"]] = row

            yield done, append
