"""The text of a generation, given out as soon as it is certain, and the decision to end."""

from __future__ import annotations

from collections.abc import Sequence

from specrag.models.tokenization import IncrementalDecoder, StopStrings


class Output:
    """Tokens in, text out: no half characters, and nothing that may become a stop string.

    Args:
        decoder: From tokens to text.
        stop: The strings that end the text. They are not part of it.
        end_tokens: The tokens that end it.
        limit: The number of tokens that ends it.

    Attributes:
        tokens: What was added so far, up to the end.
        finish: ``None`` until the end, then ``"stop"`` or ``"length"``, or what the caller sets.
    """

    def __init__(self, decoder: IncrementalDecoder, stop: StopStrings, end_tokens: frozenset[int], limit: int) -> None:
        self._decoder, self._stop, self._end, self._limit = decoder, stop, end_tokens, limit
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._shown = 0  # characters that were given out
        self._until: int | None = None  # where the text ends, once a stop string was found

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain after ``tokens``. Tokens after the end are dropped."""
        for token in tokens:
            self.tokens.append(token)
            if token in self._end:
                self.finish = "stop"
                break
            known = len(self._decoder.text)
            self._decoder.add(token)
            self._until = self._stop.find(self._decoder.text, known)
            if self._until is not None:
                self.finish = "stop"
                break
            if len(self.tokens) == self._limit:
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
