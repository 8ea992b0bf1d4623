"""Subsets in which many pairs of passages stand together, for questions that need two passages."""

from __future__ import annotations

import numpy as np

# Ties are broken by chance, so that a repetition may find better subsets. Ten passages take a millisecond each time.
_TRIES = 30


def paired_subsets(count: int, size: int, drafts: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Up to ``drafts`` different subsets of ``size`` of ``count`` passages that together hold as many pairs as found.

    This is the covering design of combinatorics, with pairs and a given number of blocks. The search is greedy: a
    subset grows by the passage that makes the most new pairs, among these by the one that is in the fewest subsets.
    So all passages are read about equally often. The first try takes the best ranked of what is equal.
    """
    best: list[tuple[int, ...]] = []
    most = -1
    for attempt in range(_TRIES):
        together = np.eye(count, dtype=bool)  # [passages, passages]
        uses = np.zeros(count, dtype=np.int64)
        subsets: list[tuple[int, ...]] = []
        for _ in range(drafts):
            subset: list[int] = []
            ties = rng.permutation(count) if attempt else np.arange(count)
            for _ in range(size):
                new = (~together[:, subset]).sum(axis=1)
                new[subset] = -1
                subset.append(int(np.lexsort((ties, uses, -new))[0]))
            together[np.ix_(subset, subset)] = True
            uses[subset] += 1
            subsets.append(tuple(sorted(subset)))
            if together.all():
                return subsets
        pairs = (int(together.sum()) - count) // 2
        if pairs > most:
            best, most = subsets, pairs
    return list(dict.fromkeys(best))
