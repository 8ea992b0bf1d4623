"""How every part of the package writes passages and compares answers."""

from __future__ import annotations

import re

from specrag.schema import Passage


def passage_text(passage: Passage) -> str:
    """A passage as models and embedders read it: the title, then the text."""
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


def normalize_answer(text: str) -> str:
    """``text`` without case, punctuation, articles and extra spaces; close to SQuAD's, see ``evaluation.metrics``."""
    text = re.sub(r"[^\w\s]", " ", text.casefold())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))
