"""Passages that fit a model's window: each is cut as little as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from specrag.errors import InvalidInputError
from specrag.models.base import GenerationRequest, LanguageModel
from specrag.schema import Passage

# Tokens that a chat template and the passages' delimiters may add to what was counted.
_MARGIN = 64


def fitted(
    lm: LanguageModel,
    passages: Sequence[Passage],
    request: Callable[[Sequence[Passage]], GenerationRequest],
    role: str = "drafter",
) -> tuple[tuple[Passage, ...], bool]:
    """``passages``, cut where together they exceed the window of ``lm``, and whether they were cut.

    Args:
        lm: The model that reads them.
        passages: What it shall read.
        request: What it is asked with given passages.
        role: What the model is, for the error.

    Raises:
        InvalidInputError: The question alone does not fit.
    """
    window = lm.context_window
    kept = tuple(passages)
    if window is None:
        return kept, False
    whole = request(kept)
    if sum(len(turn.text.encode()) for turn in whole.turns) + whole.max_tokens + _MARGIN <= window:
        return kept, False  # no tokenizer makes more tokens than bytes: nothing to count
    bare = request([replace(p, text="", embedding=None) for p in kept])
    fixed = sum(lm.count_tokens(turn.text) for turn in bare.turns)
    room = window - fixed - bare.max_tokens - _MARGIN
    if room < len(kept):
        raise InvalidInputError(
            f"the question leaves no room for passages in the {role}'s window of {window} tokens: shorten it"
        )
    sizes = [lm.count_tokens(passage.text) for passage in kept]
    if sum(sizes) <= room:
        return kept, False
    allowed = share(room, sizes)
    return tuple(
        replace(p, text=_cut(lm, p.text, size, limit)) for p, size, limit in zip(kept, sizes, allowed, strict=True)
    ), True


def _cut(lm: LanguageModel, text: str, size: int, limit: int) -> str:
    """The beginning of ``text``, which has ``size`` tokens, in at most ``limit`` tokens."""
    while size > limit and text:
        text = text[: min(len(text) - 1, int(len(text) * limit / size))]
        size = lm.count_tokens(text)
    return text


def share(room: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``room`` tokens among texts of ``sizes`` tokens: short texts get all they need, the others equal parts."""
    allowed = [0] * len(sizes)
    left = list(range(len(sizes)))
    while left:
        part = room // len(left)
        short = [i for i in left if sizes[i] <= part]
        for i in short or left:
            allowed[i] = min(sizes[i], part)
            room -= allowed[i]
        if not short:
            break
        left = [i for i in left if i not in short]
    return allowed
