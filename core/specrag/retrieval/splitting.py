"""Documents cut into passages at sentence ends, in any script.

Length is counted in words. Where a script puts no spaces between words, an ideograph or kana counts as a word, and so
do four letters of Thai, Lao, Khmer or Burmese: about what tokenizers make of them. A run of letters that is longer than
a word ever is, such as a link or encoded data, counts once for every twenty. So no passage is without an end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from specrag.errors import InvalidInputError
from specrag.retrieval.documents import Document
from specrag.schema import Passage

# A sentence ends after a mark that ends sentences in some script (Unicode's Sentence_Terminal), with the quotes and
# brackets that follow. Ideographic and full-width marks need no space after them. A blank line ends one too.
_QUOTES = r"[\p{Pe}\p{Pf}\"']*"
_SENTENCE_END = regex.compile(
    rf"(?<=\p{{Sentence_Terminal}}{_QUOTES})\s+|\n\s*\n"
    rf"|(?<=(?:[。！？｡]|．(?!\p{{Nd}})){_QUOTES})(?![\p{{Sentence_Terminal}}\p{{Pe}}\p{{Pf}}\"'\s]|$)"
)
_LONGEST = 20  # letters of one word
# What counts as a word, by Unicode's line-breaking classes: ID, CJ, EB are ideographs, kana and emoji; SA are the
# scripts of South East Asia that need a dictionary. A mark that opens or closes stays with what it belongs to.
_IDEOGRAPH, _COMPLEX = r"[\p{lb=ID}\p{lb=CJ}\p{lb=EB}]", r"\p{lb=SA}"
_CLOSING = r"[\p{lb=CL}\p{lb=CP}\p{lb=EX}\p{lb=NS}\p{lb=IS}\p{Pf}]"
_UNIT = regex.compile(
    rf"(?P<free>[\p{{Ps}}\p{{Pi}}]*(?={_IDEOGRAPH})\X{_CLOSING}*)|(?:(?={_COMPLEX})\X){{1,4}}{_CLOSING}*"
    rf"|(?:(?!{_IDEOGRAPH}|{_COMPLEX})\X){{1,{_LONGEST}}}"
)


@dataclass(frozen=True)
class _Unit:
    """What counts as one word. ``before``: the space before it, if any. ``free``: a passage may begin with it."""

    text: str
    before: str
    free: bool


def _sentences(text: str) -> Iterator[list[_Unit]]:
    start, before = 0, " "
    for end in _SENTENCE_END.finditer(text):
        yield _units(text[start : end.start()], before)
        start, before = end.end(), " " if end[0] else ""
    yield _units(text[start:], before)


def _units(sentence: str, before: str) -> list[_Unit]:
    """The words of a sentence; ``before`` stands before the first."""
    units = []
    for run in sentence.split():
        if len(run) <= _LONGEST and run.isascii():
            units.append(_Unit(run, before, free=True))
            before = " "
            continue
        for match in _UNIT.finditer(run):
            first = match.start() == 0
            units.append(_Unit(match[0], before if first else "", free=first or match["free"] is not None))
        before = " "
    return units


def split_passages(document: Document, words: int = 100, overlap: int = 0) -> list[Passage]:
    """``document`` in passages of at most ``words`` words, cut at sentence ends where there are any.

    ``overlap`` words of each passage's end are repeated at the beginning of the next.

    Raises:
        InvalidInputError: ``words`` is below 1, or ``overlap`` is not below ``words``.
    """
    if words < 1 or not 0 <= overlap < words:
        raise InvalidInputError(f"words must be at least 1 and overlap from 0 to words - 1, got {words} and {overlap}")
    metadata: dict[str, Any] = {"source": document.source}
    if document.page is not None:
        metadata["page"] = document.page
    return [
        Passage(
            "".join(unit.before + unit.text for unit in units).strip(),
            title=document.title,
            id=f"{document.source}#{document.page or ''}{'-' if document.page else ''}{i}",
            metadata=metadata,
        )
        for i, units in enumerate(_cut(document.text, words, overlap))
    ]


def _cut(text: str, words: int, overlap: int) -> list[list[_Unit]]:
    passages: list[list[_Unit]] = []
    current: list[_Unit] = []
    fresh = 0  # units of ``current`` that no passage holds yet

    def close() -> None:
        nonlocal current, fresh
        if fresh:
            passages.append(current)
            current, fresh = current[len(current) - overlap :] if overlap else [], 0

    for remaining in _sentences(text):
        while remaining:
            room = words - len(current)
            if len(remaining) > room and fresh and len(remaining) <= words - overlap:
                close()
                continue
            taken = _whole_words(remaining, room)
            if not taken and current:  # the next word does not fit
                if fresh:
                    close()
                else:  # nor beside what is repeated
                    current = []
                continue
            taken = taken or room
            current = current + remaining[:taken]
            fresh += len(remaining[:taken])
            remaining = remaining[taken:]
            if len(current) >= words or (remaining and taken < room):
                close()
    close()
    return passages


def _whole_words(units: list[_Unit], room: int) -> int:
    """How many of ``units`` fit into ``room`` so that no word is cut; 0 when the first word does not fit."""
    if len(units) <= room:
        return len(units)
    return next((at for at in range(room, 0, -1) if units[at].free), 0)
