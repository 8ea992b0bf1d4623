"""The text of a generation, given out as soon as it is certain, and the decision to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specrag.errors import InvalidInputError
from specrag.models.tokenization import IncrementalDecoder, StopStrings


@dataclass(frozen=True)
class Limits:
    """What ends a generation.

    Args:
        max_tokens: The number of tokens that ends it.
        stop: Strings that end the text. They are not part of it.
        end_tokens: Tokens that end it.

    Raises:
        InvalidInputError: ``max_tokens`` is less than 1, or a stop string is empty.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        StopStrings(self.stop)  # checks them


class Output:
    """Turns tokens into text. It holds back incomplete characters, and text that may become a stop string.

    Args:
        tokenizer: From tokens to text.
        limits: What ends the text.

    Attributes:
        tokens: What was added so far, up to the end.
        finish: ``None`` until the end, then ``"stop"`` or ``"length"``, or what the caller sets.
    """

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self._decoder, self._stop, self._limits = IncrementalDecoder(tokenizer), StopStrings(limits.stop), limits
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._shown = 0  # characters that were given out
        self._until: int | None = None  # where the text ends, once a stop string was found

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain after ``tokens``. Tokens after the end are dropped."""
        for token in tokens:
            self.tokens.append(token)
            if token in self._limits.end_tokens:
                self.finish = "stop"
                break
            known = len(self._decoder.text)
            self._decoder.add(token)
            self._until = self._stop.find(self._decoder.text, known)
            if self._until is not None:
                self.finish = "stop"
                break
            if len(self.tokens) == self._limits.max_tokens:
                self.finish = "length"
                break
        if self.finish is not None:
            return ""
        return self._take(len(self._decoder.text) - self._stop.held_back(self._decoder.text))

    def rest(self) -> str:
        """What is left to give out at the end."""
        if self._until is None:
            self._decoder.flush()
        return self._take(len(self._decoder.text) if self._until is None else self._until)

    def _take(self, end: int) -> str:
        piece = self._decoder.text[self._shown : max(end, self._shown)]
        self._shown += len(piece)
        return piece
