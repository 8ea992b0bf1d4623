"""Documents cut into passages at sentence ends."""

from __future__ import annotations

import re
from typing import Any

from specrag.errors import InvalidInputError
from specrag.retrieval.documents import Document
from specrag.schema import Passage


def split_passages(document: Document, words: int = 100, overlap: int = 0) -> list[Passage]:
    """``document`` in passages of at most ``words`` words, cut at sentence ends where there are any.

    ``overlap`` words of each passage's end are repeated at the beginning of the next.
    """
    if words < 1 or not 0 <= overlap < words:
        raise InvalidInputError(f"words must be at least 1 and overlap from 0 to words - 1, got {words} and {overlap}")
    passages: list[list[str]] = []
    current: list[str] = []
    fresh = 0  # words of ``current`` that no passage holds yet

    def close() -> None:
        nonlocal current, fresh
        if fresh:
            passages.append(current)
            current, fresh = current[len(current) - overlap :] if overlap else [], 0

    for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", document.text):
        remaining = sentence.split()
        while remaining:
            room = words - len(current)
            if len(remaining) > room and fresh and len(remaining) <= words - overlap:
                close()
                continue
            current = current + remaining[:room]
            fresh += len(remaining[:room])
            remaining = remaining[room:]
            if len(current) >= words:
                close()
    close()
    metadata: dict[str, Any] = {"source": document.source}
    if document.page is not None:
        metadata["page"] = document.page
    return [
        Passage(
            " ".join(text),
            title=document.title,
            id=f"{document.source}#{document.page or ''}{'-' if document.page else ''}{i}",
            metadata=metadata,
        )
        for i, text in enumerate(passages)
    ]
