"""Readers of published question-answering data: ``load`` finds the format of a file by the fields of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from specrag._files import path_of
from specrag.errors import InvalidInputError
from specrag.evaluation.formats.base import Format
from specrag.evaluation.formats.choice import ARC_CHALLENGE, PUBHEALTH
from specrag.evaluation.formats.long_context import INFINITEBENCH, LONGBENCH_V2, MT_BENCH_101
from specrag.evaluation.formats.multihop import HOTPOTQA, MUSIQUE, TWO_WIKI
from specrag.evaluation.formats.own import SPECRAG
from specrag.evaluation.formats.reading import BOOLQ, CLAPNQ, SQUAD
from specrag.evaluation.formats.retrieved import FLASHRAG, LOST_IN_THE_MIDDLE, NQ_OPEN, POPQA, SELF_RAG
from specrag.evaluation.formats.rows import Row, read_rows
from specrag.evaluation.formats.triviaqa import TRIVIAQA
from specrag.evaluation.records import Question

__all__ = ["FORMATS", "Format", "formats", "load"]

#: Every format by its name. No row is another's; specrag's own, the most general, comes last.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        *(TRIVIAQA, MUSIQUE, HOTPOTQA, TWO_WIKI, POPQA, PUBHEALTH, ARC_CHALLENGE, SELF_RAG, LOST_IN_THE_MIDDLE),
        *(NQ_OPEN, SQUAD, CLAPNQ, BOOLQ, INFINITEBENCH, LONGBENCH_V2, MT_BENCH_101, FLASHRAG, SPECRAG),
    )
}


def formats() -> tuple[str, ...]:
    """The names of the formats that ``load`` reads."""
    return tuple(FORMATS)


def load(path: str | Path, format: str = "auto", *, limit: int | None = None) -> list[Question]:  # noqa: A002
    """Read the questions of a file, gzip or plain.

    Ids are made distinct: the second question with the id "x" becomes "x#2".

    Args:
        path: The file.
        format: One of ``formats()``, or "auto": the format that the fields of the first row belong to.
        limit: Read at most this many questions, the first ones.

    Raises:
        InvalidInputError: The format is unknown, the file is of another format, a row lacks what the format asks for,
            or the file holds no questions. The message names the line or entry.
    """
    path = path_of(path)
    if format != "auto" and format not in FORMATS:
        raise InvalidInputError(f"unknown format {format!r}; known are: auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit must be at least 1, got {limit}")
    questions: list[Question] = []
    seen: Counter[str] = Counter()
    for question in _questions(path, format):
        seen[question.id] += 1
        if seen[question.id] > 1:
            question = replace(question, id=f"{question.id}#{seen[question.id]}")
        questions.append(question)
        if len(questions) == limit:
            break
    if not questions:
        raise InvalidInputError(f"{path} holds no questions")
    return questions


def _questions(path: Path, name: str) -> Iterator[Question]:
    chosen = FORMATS.get(name)
    for row in read_rows(path):
        chosen = chosen or _detected(row)
        if not chosen.recognises(row.values):
            raise InvalidInputError(f"{row.where}: expected {chosen.name}: {chosen.expects}.{_looks_like(row)}")
        try:
            yield from chosen.read(row)
        except InvalidInputError as error:
            where = "" if str(error).startswith(row.where) else f"{row.where}: "
            raise InvalidInputError(f"{where}{error}. The format {chosen.name} has {chosen.expects}") from error


def _detected(row: Row) -> Format:
    for known in FORMATS.values():
        if known.recognises(row.values):
            return known
    raise InvalidInputError(f"{row.where}: no known format has such rows.{_looks_like(row)}")


def _looks_like(row: Row) -> str:
    """What the row is, in words for an error."""
    keys = ", ".join(sorted(map(str, row.values))[:12]) or "none"
    matching = [known.name for known in FORMATS.values() if known.recognises(row.values)]
    guess = f"; it looks like {matching[0]}" if matching else f"; known formats: {', '.join(FORMATS)}"
    return f" The row has the fields {keys}{guess}"
