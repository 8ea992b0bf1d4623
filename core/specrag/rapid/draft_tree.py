"""Candidates as a tree: several continuations, which the target verifies in one forward pass with a tree mask.

At each node the target's distribution p decides which branch is taken, so that the text has exactly the law of p
(recursive rejection: SpecInfer, Miao et al., arXiv 2305.09781, section 4.3):

- Copied branches were not drawn from a distribution. One token is drawn from p; the branch with that token is taken.
- Drawn branches were drawn without replacement, x_i from q_i, which is q without x_1 ... x_(i-1), normalised. Beginning
  with r_1 = p, x_i is taken with probability min(1, r_i(x_i) / q_i(x_i)). Otherwise r_(i+1) = norm(max(r_i - q_i, 0)),
  from which the next token is drawn when no branch was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specrag.engine.trees import TreeShape, with_root
from specrag.rapid.acceptance import acceptance_probability, residual
from specrag.rapid.drawing import Drawing


@dataclass(frozen=True)
class DraftTree:
    """A tree of candidates.

    Attributes:
        tokens: The candidates, the nodes of the tree. Siblings differ.
        parents: Per node the earlier node that it follows; -1: the last token of the text.
        probabilities: The distribution that each was drawn from, without its earlier siblings; ``None``: the candidates
            are copied.
        catch_up_seconds: See ``Proposal``.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    probabilities: Tensor | None = None  # [nodes, vocabulary]
    catch_up_seconds: float = 0.0

    @cached_property
    def shape(self) -> TreeShape:
        """The tree with the last token of the text as its root: row 0. Node i is row i + 1."""
        return with_root(self.parents)

    @property
    def depth(self) -> int:
        """γ: the candidates of the longest path."""
        return max(self.shape.depths)

    @property
    def width(self) -> int:
        """Candidates per step of the longest path, rounded up."""
        return -(-len(self.tokens) // self.depth)

    def sibling(self, row: int) -> int:
        """How many branches of its parent were made before ``row``; 0 for the root."""
        return self.branches(self.shape.parents[row]).index(row) if row else 0

    @cached_property
    def _branches(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.shape.parents]
        for row, parent in enumerate(self.shape.parents[1:], start=1):
            found[parent].append(row)
        return found

    def branches(self, row: int) -> list[int]:
        """The rows that follow ``row``, in the order in which they were made."""
        return self._branches[row]

    def longest_from(self, row: int) -> list[int]:
        """The rows of the first branch below ``row``, and of the first below that, to the end."""
        found = []
        while branches := self.branches(row):
            row = branches[0]
            found.append(row)
        return found


@dataclass(frozen=True)
class Walk:
    """The result of verifying a tree.

    Attributes:
        rows: The path that was taken, from the root on.
        following: The token after it.
        from_target: Whether ``following`` was drawn from p itself, as nothing was proposed there.
    """

    rows: tuple[int, ...]
    following: int
    from_target: bool


def walk(
    tree: DraftTree,
    logits: Tensor,  # [nodes + 1, vocabulary], the target after each row
    drawing: Drawing,
) -> Walk:
    """Take branches from the root on as long as p allows, then draw the next token. It follows the law of p.

    At temperature 0, the branch with p's likeliest token is taken. Where there is none, that token is the next.
    """
    rows, row = [0], 0
    while True:
        p, branches = drawing.distribution(logits[row]), tree.branches(row)
        if tree.probabilities is None or drawing.sampling.greedy or not branches:
            following = int(drawing.draw(p))
            taken = next((branch for branch in branches if tree.tokens[branch - 1] == following), None)
        else:
            nodes = [branch - 1 for branch in branches]
            tokens = torch.tensor([tree.tokens[node] for node in nodes], device=p.device)
            kept, left = recursive_rejection(p, tree.probabilities[nodes].to(p.device), tokens)
            draws = torch.rand(len(nodes), generator=drawing.generator, device=p.device)
            taken = next((branch for branch, keep in zip(branches, (draws < kept).tolist(), strict=True) if keep), None)
            following = int(drawing.draw(left)) if taken is None else tree.tokens[taken - 1]
        if taken is None:
            return Walk(tuple(rows), following, from_target=not branches)
        rows.append(taken)
        row = taken


def recursive_rejection(
    p: Tensor,  # [vocabulary]
    q: Tensor,  # [branches, vocabulary], what each branch was drawn from
    tokens: Tensor,  # [branches]
) -> tuple[Tensor, Tensor]:  # [branches], [vocabulary]
    """Per branch the probability that it is taken when none before it was, and the law of the token if none is."""
    kept = []
    for row, token in zip(q, tokens, strict=True):
        kept.append(acceptance_probability(p, row, token))
        p = residual(p, row, p, "none")
    return torch.stack(kept), p


def draw_branches(
    q: Tensor,  # [vocabulary]
    width: int,
    drawing: Drawing,
) -> tuple[list[int], Tensor]:  # tokens, [tokens, vocabulary]
    """Up to ``width`` tokens drawn from q without replacement, and what each was drawn from.

    At temperature 0 they are the likeliest ones. They are fewer where q allows fewer.
    """
    tokens: list[int] = []
    rows: list[Tensor] = []
    for _ in range(width):
        token = int(drawing.draw(q))
        tokens.append(token)
        rows.append(q)
        rest = q.clone()
        rest[token] = 0
        mass = float(rest.sum())
        if mass <= 0:
            break
        q = rest / mass
    return tokens, torch.stack(rows)


def merged(continuations: Sequence[Sequence[int]], nodes: int, end: int = -1) -> tuple[list[int], list[int]]:
    """The ``nodes`` commonest beginnings of ``continuations`` as a tree (REST; arXiv 2311.08252, section 3.2).

    Args:
        continuations: Tokens; ``end`` ends one early.
        nodes: The most nodes of the tree.
        end: The id that stands for no token.

    Returns:
        Tokens and parents of the nodes. The commonest branch of a node comes first, and directly after it.
    """
    children: list[dict[int, int]] = [{}]  # per node, counted from the root: its branches
    counts, tokens = [len(continuations)], [end]
    for continuation in continuations:
        node = 0
        for token in continuation:
            if token == end:
                break
            below = children[node].get(token)
            if below is None:
                below = children[node][token] = len(tokens)
                children.append({})
                counts.append(0)
                tokens.append(token)
            counts[below] += 1
            node = below
    # A node is at least as common as what is below it, and stands before it: it is kept whenever that is.
    kept = set(sorted(range(1, len(tokens)), key=lambda node: -counts[node])[:nodes])
    made_tokens: list[int] = []
    made_parents: list[int] = []
    pending = [(0, -1)]
    while pending:
        node, parent = pending.pop()
        if node:
            made_tokens.append(tokens[node])
            made_parents.append(parent)
            parent = len(made_tokens) - 1
        branches = sorted((child for child in children[node].values() if child in kept), key=lambda n: -counts[n])
        pending += [(child, parent) for child in reversed(branches)]
    return made_tokens, made_parents
