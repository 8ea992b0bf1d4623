"""Batches for training a span reader: token spans of the answers, order of the examples, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrag.text import passage_text, whole_words
from specrag.training.reader_examples import ReaderExample

# Lengths and row counts are rounded up to multiples of these.
_LENGTHS, _ROWS = 32, 4


@dataclass(frozen=True)
class EncodedGroup:
    """The rows of one question.

    Attributes:
        gold: (row, first token, width - 1) of every right span. Empty when no span is right.
    """

    ids: list[list[int]]
    types: list[list[int]]
    inside: list[list[bool]]
    gold: list[tuple[int, int, int]]


def encode_group(example: ReaderExample, tokenizer: Any, max_tokens: int, longest: int) -> EncodedGroup:
    """``example`` as tokens, with the token spans of its answers."""
    texts = [passage_text(passage) for passage in example.passages]
    encoded = tokenizer(
        [example.question] * len(texts),
        texts,
        truncation="only_second",
        max_length=max_tokens,
        return_offsets_mapping=True,
    )
    patterns = [pattern for answer in example.answers if (pattern := whole_words(answer)) is not None]
    inside: list[list[bool]] = []
    gold: set[tuple[int, int, int]] = set()
    for row, text in enumerate(texts):
        offsets = encoded["offset_mapping"][row]
        kinds = encoded.sequence_ids(row)
        inside.append([kind == 1 and end > start for kind, (start, end) in zip(kinds, offsets, strict=True)])
        for match in (m for pattern in patterns for m in pattern.finditer(text)):
            first = next((i for i, (a, b) in enumerate(offsets) if inside[row][i] and a <= match.start() < b), None)
            last = next((i for i, (a, b) in enumerate(offsets) if inside[row][i] and a < match.end() <= b), None)
            if first is not None and last is not None and last - first < longest:
                gold.add((row, first, last - first))
    types = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
    return EncodedGroup(encoded["input_ids"], types, inside, sorted(gold))


def in_order(rounds: Sequence[Sequence[ReaderExample]], rows: int, seed: int = 0) -> list[list[ReaderExample]]:
    """All rounds in training order. A round has batches of at most ``rows`` passages of similar length, shuffled."""
    random = np.random.default_rng(seed)
    ordered: list[list[ReaderExample]] = []
    for examples in rounds:
        shuffled = [examples[int(i)] for i in random.permutation(len(examples))]
        batches: list[list[ReaderExample]] = []
        pool = 40 * rows
        for at in range(0, len(shuffled), pool):
            batch: list[ReaderExample] = []
            filled = 0
            for example in sorted(shuffled[at : at + pool], key=_length):
                if filled + len(example.passages) > rows:
                    batches.append(batch)
                    batch, filled = [], 0
                batch.append(example)
                filled += len(example.passages)
            batches.append(batch)
        ordered += [batches[int(i)] for i in random.permutation(len(batches))]
    return [batch for batch in ordered if batch]


def _length(example: ReaderExample) -> int:
    return len(example.question) + max(len(passage_text(p)) for p in example.passages)


@dataclass(frozen=True)
class ReaderCollator:
    """Makes one batch of tensors. Its rows are in parts of similar length, so there is little padding.

    oneDNN compiles and caches a kernel for each new shape, so lengths are rounded up to multiples of 32, and the rows
    of a part to multiples of 4; the added rows are ignored.
    """

    tokenizer: Any
    max_tokens: int
    longest: int

    def __call__(self, items: Sequence[list[ReaderExample]]) -> dict[str, Any]:
        (examples,) = items
        groups = [encode_group(e, self.tokenizer, self.max_tokens, self.longest) for e in examples]
        rows = [
            (-(-len(group.ids[i]) // _LENGTHS) * _LENGTHS, number, i)
            for number, group in enumerate(groups)
            for i in range(len(group.ids))
        ]
        rows.sort()
        tokens = rows[-1][0]
        place = {(number, i): at for at, (_, number, i) in enumerate(rows)}
        inside = torch.zeros(len(rows), tokens, dtype=torch.bool)
        for (number, i), at in place.items():
            own = groups[number].inside[i]
            inside[at, : len(own)] = torch.tensor(own)
        gold = [(place[n, row], first, width) for n, group in enumerate(groups) for row, first, width in group.gold]
        parts = []
        for length in sorted({length for length, *_ in rows}):
            members = [(number, i) for own, number, i in rows if own == length]
            parts.append(self._part([(groups[n].ids[i], groups[n].types[i]) for n, i in members], length))
        return {
            "parts": parts,
            "inside": inside,
            "questions": torch.tensor([number for _, number, _ in rows]),
            "gold": torch.tensor(gold, dtype=torch.long).reshape(-1, 3),
        }

    def _part(self, rows: Sequence[tuple[list[int], list[int]]], length: int) -> dict[str, Tensor]:
        count = -(-len(rows) // _ROWS) * _ROWS
        ids = torch.full((count, length), self.tokenizer.pad_token_id or 0)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        mask[len(rows) :, 0] = 1
        for i, (own, own_types) in enumerate(rows):
            ids[i, : len(own)] = torch.tensor(own)
            types[i, : len(own)] = torch.tensor(own_types)
            mask[i, : len(own)] = 1
        made = {"input_ids": ids, "attention_mask": mask, "rows": torch.tensor(len(rows))}
        return made | ({"token_type_ids": types} if "token_type_ids" in self.tokenizer.model_input_names else {})
