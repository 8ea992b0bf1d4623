"""Texts as every part of the package reads and compares them."""

from __future__ import annotations

import re

from specrag.schema import Passage


def passage_text(passage: Passage) -> str:
    """A passage as models and embedders read it: title, then text."""
    return f"{passage.title}: {passage.text}" if passage.title else passage.text


def normalize_answer(text: str) -> str:
    """Case, punctuation, articles and spacing removed; close to SQuAD's evaluation, see ``evaluation.metrics``."""
    text = re.sub(r"[^\w\s]", " ", text.casefold())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))
