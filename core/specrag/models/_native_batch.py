"""A batch of conversations for generation, over the native forward pass: no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specrag._abandoned import stop_if_abandoned
from specrag.engine.step import Conversation, NativeDecoder
from specrag.models.tokenization import shared_beginning

# Tokens of one pass: its activations are what memory holds beside weights and cache.
_PASS = 256


class NativeBatch:
    """What ``_generation.Batch`` is for torch. What the prompts share is read once. To drop a row copies nothing."""

    def __init__(self, native: NativeDecoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self._native = native
        self._cache = native.cache(max(map(len, prompts)) + new_tokens, len(prompts))
        self._places = [0]  # of each row, in the cache
        self._held = [0]  # tokens that the cache has of each row
        shared = shared_beginning(prompts) if len(prompts) > 1 else 0
        if shared:
            self._next: list[list[int]] = [list(prompts[0][:shared])]  # what each row is fed next
            self.logits()
            for layer in self._cache.layers:
                for buffer in (layer.key_buffer, layer.value_buffer):
                    buffer[1:, :, :shared] = buffer[:1, :, :shared]
        self._places, self._held = list(range(len(prompts))), [shared] * len(prompts)
        self._next = [list(prompt[shared:]) for prompt in prompts]

    def logits(self) -> Tensor:  # [rows, vocabulary]
        """Feed the tokens that are next; the logits after them."""
        logits = torch.empty(len(self._next), self._native.vocabulary)
        while any(self._next):
            self._one_pass(logits)
        return logits

    def _one_pass(self, logits: Tensor) -> None:
        stop_if_abandoned()
        tokens: list[int] = []
        positions: list[int] = []
        conversations: list[Conversation] = []
        ends: dict[int, int] = {}  # row -> where in the pass its last token stands
        for row, waiting in enumerate(self._next):
            some = waiting[: _PASS - len(tokens)]
            if not some:
                continue
            conversations.append(Conversation(self._places[row], self._held[row], len(some)))
            positions += range(self._held[row], self._held[row] + len(some))
            tokens += some
            self._held[row] += len(some)
            self._next[row] = waiting[len(some) :]
            if not self._next[row]:
                ends[row] = len(tokens) - 1
        made = self._native.run(
            torch.tensor(tokens), torch.tensor(positions), self._cache, conversations, list(ends.values())
        )
        logits[list(ends)] = made

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with ``rows`` alone."""
        self._places = [self._places[i] for i in rows]
        self._held = [self._held[i] for i in rows]

    def feed(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""
        self._next = [[token] for token in tokens]
