"""Perspectives: group the retrieved passages, then deal diverse subsets (paper, section 3.1, Algorithm 1).

Pure functions on arrays. Every random choice comes from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from specrag.errors import InvalidInputError

SamplingMode = Literal["coverage", "paper", "random", "single_cluster"]
SAMPLING_MODES: tuple[SamplingMode, ...] = get_args(SamplingMode)


@dataclass(frozen=True)
class Perspectives:
    """``clusters[i]`` is the perspective of passage i; ``subsets[j]`` the passages of draft j, in retrieval order."""

    clusters: tuple[int, ...]
    subsets: tuple[tuple[int, ...], ...]


def sample_perspectives(
    embeddings: np.ndarray | None,  # [passages, dim]
    count: int,
    drafts: int,
    passages_per_draft: int,
    *,
    sampling: SamplingMode = "coverage",
    seed: int = 0,
) -> Perspectives:
    """Cluster ``count`` passages and choose ``drafts`` subsets of ``passages_per_draft``.

    Args:
        embeddings: One vector a passage; not needed (and ``None``) for ``sampling="random"``.
        sampling: ``"coverage"`` deals one passage of every cluster a subset, without replacement inside
            a cluster until it is exhausted, from clusters that are evened out so far that min(count,
            drafts · passages_per_draft) passages are read. ``"paper"`` draws each subset independently,
            one passage a cluster. ``"random"`` ignores the clusters. ``"single_cluster"`` takes each
            subset from one cluster as far as that reaches (the paper's ablation).

    Returns:
        Subsets of min(count, passages_per_draft) passages each. They are distinct as long as distinct
        ones exist (under ``"coverage"`` and ``"random"``), then they repeat.

    Raises:
        InvalidInputError: For counts below 1, an unknown ``sampling``, or embeddings that do not fit.
    """
    for name, value in (("passages", count), ("drafts", drafts), ("passages_per_draft", passages_per_draft)):
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    if sampling not in SAMPLING_MODES:
        raise InvalidInputError(f"sampling must be one of {', '.join(SAMPLING_MODES)}; got {sampling!r}")
    size = min(passages_per_draft, count)
    rng = np.random.default_rng(seed)
    if sampling == "random" or size == count:
        clusters = (0,) * count
        return Perspectives(clusters, _distinct(count, size, drafts, rng, []))
    if embeddings is None:
        raise InvalidInputError(f"sampling={sampling!r} needs embeddings; only 'random' does without")
    vectors = check_embeddings(embeddings, count)
    labels = kmeans(vectors, size, seed)
    if sampling == "coverage":
        labels = even_out(vectors, labels, size, drafts)
        subsets: list[Sequence[int]] = list(_deal(labels, size, drafts, rng))
    elif sampling == "paper":
        groups = _groups(labels, size)
        subsets = [
            _fill([int(rng.choice(group)) for group in groups if len(group)], count, size, rng) for _ in range(drafts)
        ]
    else:
        groups = [group for group in _groups(labels, size) if len(group)]
        subsets = []
        for j in range(drafts):
            group = groups[j % len(groups)]
            taken = rng.choice(group, size=min(size, len(group)), replace=False)
            subsets.append(_fill([int(i) for i in taken], count, size, rng))
    return Perspectives(tuple(int(label) for label in labels), tuple(tuple(sorted(subset)) for subset in subsets))


def one_of_each(
    embeddings: np.ndarray,  # [passages, dim]
    count: int,
    *,
    seed: int = 0,
) -> tuple[int, ...]:
    """Positions of ``count`` passages of different perspectives, each the best ranked of its own, in retrieval order.

    All of them, when there are no more than ``count``.

    Raises:
        InvalidInputError: ``count`` is below 1, or the embeddings do not fit.
    """
    if count < 1:
        raise InvalidInputError(f"the number of perspectives must be at least 1, got {count}")
    total = len(embeddings)
    if total <= count:
        return tuple(range(total))
    vectors = check_embeddings(embeddings, total)
    labels = even_out(vectors, kmeans(vectors, count, seed), count, total)
    return tuple(sorted(int(np.flatnonzero(labels == label)[0]) for label in range(count)))


def check_embeddings(embeddings: np.ndarray, count: int) -> np.ndarray:  # [passages, dim], float32, unit length
    """Embeddings as the clustering takes them.

    Raises:
        InvalidInputError: A wrong shape, or a value that is not finite.
    """
    vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count or vectors.shape[1] == 0:
        raise InvalidInputError(f"embeddings must have shape [{count}, dim], got {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        raise InvalidInputError("embeddings must be finite: the embedder returned NaN or infinity")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def kmeans(
    vectors: np.ndarray,  # [passages, dim], unit length
    clusters: int,
    seed: int,
) -> np.ndarray:  # [passages]
    """Cluster labels 0..clusters-1; a label may stay empty when vectors coincide."""
    if clusters == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    import faiss  # here: it takes a tenth of a second, and `import specrag` shall not

    model = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=25,
        nredo=3,
        seed=seed % (1 << 31),
        min_points_per_centroid=1,  # faiss warns on stderr below its default of 39
        max_points_per_centroid=max(256, len(vectors)),
        verbose=False,
    )
    model.train(vectors)
    _, labels = model.index.search(vectors, 1)
    return np.asarray(labels[:, 0])


def even_out(
    vectors: np.ndarray,  # [passages, dim]
    labels: np.ndarray,  # [passages]
    clusters: int,
    drafts: int,
) -> np.ndarray:  # [passages]
    """Move passages out of clusters with more than ``drafts`` members into ones with fewer, nearest first.

    A cluster gives each draft one passage, so members beyond ``drafts`` are never read while a smaller
    cluster repeats itself. Afterwards no cluster is empty, and none is above ``drafts`` while another is below: together the
    drafts read min(passages, drafts · clusters) different passages.
    """
    labels = labels.copy()
    while True:
        sizes = np.bincount(labels, minlength=clusters)
        largest, smallest = int(sizes.argmax()), int(sizes.argmin())
        if sizes[smallest] and (sizes[largest] <= drafts or sizes[smallest] >= drafts):
            return labels
        movable = np.flatnonzero(labels == largest)
        if sizes[smallest]:
            centre = vectors[labels == smallest].mean(axis=0)
            nearest = movable[int((vectors[movable] @ centre).argmax())]
        else:  # an empty cluster starts with the passage least like its own
            nearest = movable[int((vectors[movable] @ vectors[movable].mean(axis=0)).argmin())]
        labels[nearest] = smallest


def _groups(labels: np.ndarray, clusters: int) -> list[np.ndarray]:
    return [np.flatnonzero(labels == cluster) for cluster in range(clusters)]


def _deal(labels: np.ndarray, clusters: int, drafts: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """One passage of every cluster a subset; decks are shuffled anew only when they are used up."""
    groups = _groups(labels, clusters)
    combinations = math.prod(len(group) for group in groups)
    decks: list[list[int]] = [[] for _ in groups]
    subsets: list[tuple[int, ...]] = []
    used: set[tuple[int, ...]] = set()
    while len(subsets) < min(drafts, combinations):
        for i, group in enumerate(groups):
            if not decks[i]:
                decks[i] = [int(x) for x in rng.permutation(group)]
        subset = tuple(sorted(deck.pop() for deck in decks))
        while subset in used:
            # Only possible when every deck is in its second round: all passages were dealt, any new choice will do.
            subset = tuple(sorted(int(rng.choice(group)) for group in groups))
        used.add(subset)
        subsets.append(subset)
    return list(_distinct(len(labels), clusters, drafts, rng, subsets))


def _distinct(
    count: int, size: int, drafts: int, rng: np.random.Generator, subsets: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """``subsets`` and further random ones, new while there are new ones, then from the beginning again."""
    possible = math.comb(count, size)
    used = set(subsets)
    chosen = list(subsets)
    while len(chosen) < min(drafts, possible):
        subset = tuple(sorted(int(i) for i in rng.choice(count, size=size, replace=False)))
        if subset not in used:
            used.add(subset)
            chosen.append(subset)
    return tuple(chosen[j % len(chosen)] for j in range(drafts))


def _fill(taken: Sequence[int], count: int, size: int, rng: np.random.Generator) -> list[int]:
    """``taken`` with random other passages, up to ``size``."""
    missing = size - len(taken)
    if missing <= 0:
        return list(taken)
    others = [i for i in range(count) if i not in set(taken)]
    return [*taken, *(int(i) for i in rng.choice(others, size=missing, replace=False))]
