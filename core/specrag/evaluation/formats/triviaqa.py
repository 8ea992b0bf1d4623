"""TriviaQA as its authors publish it (Joshi et al., arXiv 1705.03551): questions in one folder, evidence in another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from specrag._encodings import decode
from specrag.evaluation.formats.base import Format, has
from specrag.evaluation.formats.rows import Row
from specrag.evaluation.records import Question
from specrag.schema import Passage

#: Where a question lists its evidence, and the folder of the texts.
_EVIDENCE = (("EntityPages", "wikipedia"), ("SearchResults", "web"))


def _read(row: Row) -> Iterator[Question]:
    """A question with its evidence.

    The passages are the pages in ``../evidence``, seen from the file, as the release lays them out. Without that
    folder a web question has the descriptions of its search results, and a Wikipedia question has no passages.
    """
    answer = row.row("Answer")
    texts = [answer.text("Value")]
    for key in ("Aliases", "HumanAnswers"):
        texts += answer.texts(key) if answer.get(key) else ()
    yield Question(
        row.name("QuestionId"),
        row.text("Question"),
        tuple(dict.fromkeys(texts)),
        tuple(_passages(row)),
        source="triviaqa",
        metadata=row.rest("QuestionId", "Question", "Answer", "EntityPages", "SearchResults")
        | {"answer_type": answer.get("Type")},
    )


def _passages(row: Row) -> Iterator[Passage]:
    """One passage per page of evidence; a search result without its page is its description."""
    folder = row.path.parent.parent / "evidence"
    for key, kind in _EVIDENCE:
        for page in row.rows(key) if row.get(key) else ():
            text = _page(folder / kind / page.text("Filename"))
            text = page.get("Description") if text is None else text
            if text:
                yield Passage(text, title=page.get("Title"), id=page.text("Filename"), metadata={"kind": kind})


def _page(path: Path) -> str | None:
    try:
        return decode(path.read_bytes()).text
    except OSError:  # the questions may be used without the evidence, which is several gigabytes
        return None


TRIVIAQA = Format(
    name="triviaqa",
    expects="an object with 'Data': a list of objects with 'QuestionId', 'Question' and 'Answer' (with 'Value' "
    "and 'Aliases')",
    recognises=has("QuestionId", "Question", "Answer"),
    read=_read,
)
