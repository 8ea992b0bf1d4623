"""Trees of tokens: several continuations of one text, which one forward pass reads with a mask (SpecInfer; Miao et al.,
arXiv 2305.09781, section 4).

The rows of the pass are the nodes. A row sees the text before the tree and its own ancestors, and it stands at the
position that it would have without its siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specrag.errors import InvalidInputError

#: The most rows of a tree, the root included. Wider steps leave the fast paths of attention and forward pass.
MAX_ROWS = 64


@dataclass(frozen=True)
class TreeShape:
    """The shape of a tree: which row follows which.

    Args:
        parents: Per row the row that it follows, an earlier one. The first row is the root; its parent is -1.

    Raises:
        InvalidInputError: There is no root, a row does not follow an earlier one, or there are too many rows.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parents) > MAX_ROWS:
            raise InvalidInputError(
                f"a tree of {len(self.parents)} rows is wider than the cache's room for one, {MAX_ROWS} rows: "
                "lower candidates or tree_width"
            )
        rooted = bool(self.parents) and self.parents[0] == -1
        if not rooted or not all(0 <= parent < row for row, parent in enumerate(self.parents[1:], start=1)):
            raise InvalidInputError(f"every row of a tree but the first follows an earlier one, got {self.parents}")

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Per row how many ancestors it has."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return tuple(found)

    @property
    def is_chain(self) -> bool:
        """Whether every row follows the one before it: then no mask is needed."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def path(self, row: int) -> list[int]:
        """The rows from the root to ``row``."""
        found = [row]
        while (row := self.parents[row]) >= 0:
            found.append(row)
        return found[::-1]

    def hidden(self, device: torch.device | str = "cpu") -> Tensor:
        """True where a row (first axis) must not see another one (second axis), [rows, rows], bool."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for row, parent in enumerate(self.parents[1:], start=1):
            seen[row] |= seen[parent]
        return (~seen).to(device)


def chain(rows: int) -> TreeShape:
    """The shape of a single continuation."""
    return TreeShape(tuple(range(-1, rows - 1)))


def with_root(parents: Sequence[int]) -> TreeShape:
    """The shape of a root and nodes below it. ``parents`` counts nodes from 0; -1 is the root."""
    return TreeShape((-1, *(parent + 1 for parent in parents)))
