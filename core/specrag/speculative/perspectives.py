"""Perspectives: cluster the retrieved passages, then choose diverse subsets (Speculative RAG, section 3.1).

The functions on passages ask an embedder. The functions on arrays are pure and implement Algorithm 1 of the paper (Wang
et al., arXiv 2407.08223). Every random choice comes from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from specrag import _blocking
from specrag.errors import InvalidInputError
from specrag.models.embedders import Embedder
from specrag.schema import Passage, passages_of
from specrag.speculative._pairs import paired_subsets
from specrag.text import passage_text

SubsetMode = Literal["coverage", "paper", "random", "single_cluster", "pairs"]
SUBSET_MODES: tuple[SubsetMode, ...] = get_args(SubsetMode)
#: Those that group no passages, and so need no embeddings.
WITHOUT_GROUPS: tuple[SubsetMode, ...] = ("random", "pairs")


# --- on passages ----------------------------------------------------------------------------------------


def select_perspectives(
    question: str,
    passages: Iterable[Any],
    count: int,
    *,
    embedder: Embedder | None = None,
    reuse_embeddings: bool = True,
    seed: int = 0,
) -> tuple[int, ...]:
    """Positions of ``count`` passages, the best ranked of each perspective, in retrieval order.

    Empty and repeated passages are left out.

    Args:
        question: What the passages were retrieved for.
        passages: Best first; each as in ``Passage.of``.
        count: How many perspectives.
        embedder, reuse_embeddings: As in ``SpeculativeRAG``.
        seed: Of K-means.

    Raises:
        InvalidInputError: ``count`` is below 1, or something that is not a passage.
    """
    return _blocking.run(
        aselect_perspectives(question, passages, count, embedder=embedder, reuse_embeddings=reuse_embeddings, seed=seed)
    )


async def aselect_perspectives(
    question: str,
    passages: Iterable[Any],
    count: int,
    *,
    embedder: Embedder | None = None,
    reuse_embeddings: bool = True,
    seed: int = 0,
) -> tuple[int, ...]:
    """``select_perspectives``, awaited."""
    _check_count(count)
    given = passages_of(passages)
    kept, _ = distinct_passages(given)
    if len(kept) <= count:
        return tuple(kept)
    members = [given[i] for i in kept]
    vectors = own_embeddings(members) if reuse_embeddings else None
    if vectors is None:
        vectors = await embed_passages(question, members, embedder)
    return tuple(kept[i] for i in one_of_each(vectors, count, seed=seed))


def distinct_passages(passages: Sequence[Passage]) -> tuple[list[int], list[str]]:
    """Positions of the passages that hold text, the first of equal texts, and notes on what was left out."""
    seen: dict[str, int] = {}
    empty = 0
    for i, passage in enumerate(passages):
        if passage.text.strip():
            seen.setdefault(" ".join(passage.text.split()), i)
        else:
            empty += 1
    notes = [f"{empty} empty passages were left out"] if empty else []
    repeated = len(passages) - empty - len(seen)
    return list(seen.values()), notes + ([f"{repeated} repeated passages were left out"] if repeated else [])


def own_embeddings(passages: Sequence[Passage]) -> np.ndarray | None:  # [passages, dim]
    """The passages' own embeddings where all have one, of one dimension, finite; else ``None``."""
    vectors = [passage.embedding for passage in passages if passage.embedding is not None]
    if len(vectors) < len(passages) or len({len(vector) for vector in vectors}) != 1 or not len(vectors[0]):
        return None
    stacked = np.stack(vectors)
    return stacked if np.isfinite(stacked).all() else None


async def embed_passages(
    question: str, passages: Sequence[Passage], embedder: Embedder | None = None
) -> np.ndarray:  # [passages, dim]
    """emb(d | Q): every passage embedded together with the question; by default with the bundled MiniLM."""
    if embedder is None:
        from specrag.models.bundled import bundled

        embedder = bundled("minilm")
    return await embedder.aembed(embedder.given_question(question, [passage_text(p) for p in passages]))


# --- on arrays: Algorithm 1 -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Perspectives:
    """``clusters[i]`` is the perspective of passage i; ``subsets[j]`` holds the passages of draft j, best first."""

    clusters: tuple[int, ...]
    subsets: tuple[tuple[int, ...], ...]


def sample_perspectives(
    embeddings: np.ndarray | None,  # [passages, dim]
    count: int,
    drafts: int,
    passages_per_draft: int,
    *,
    subsets: SubsetMode = "coverage",
    seed: int = 0,
) -> Perspectives:
    """Cluster ``count`` passages and choose ``drafts`` subsets of ``passages_per_draft`` (Algorithm 1).

    Args:
        embeddings: One vector per passage; not needed (and may be ``None``) for ``"random"`` and ``"pairs"``.
        count: How many passages there are.
        drafts: m, the number of subsets.
        passages_per_draft: k, the size of a subset and the number of clusters.
        subsets: How they are chosen. ``"coverage"``: one passage of every cluster, without replacement inside a cluster
            until it is exhausted; clusters are first evened out, so that the subsets together hold min(count, m · k)
            passages. ``"paper"``: one passage of every cluster, each subset drawn independently. ``"random"``: no
            clusters. ``"single_cluster"``: all of a subset from one cluster, as far as it has enough (the paper's
            ablation). ``"pairs"``: no clusters; as many pairs of passages as found stand together in some subset. For
            questions that need two passages: similar ones are often in one cluster, and then never read together.
        seed: Of K-means and of every draw.

    Returns:
        Subsets of min(count, k) passages each. Under ``"coverage"``, ``"random"`` and ``"pairs"`` they are distinct
        as long as distinct ones exist; after that they repeat.

    Raises:
        InvalidInputError: A number below 1, an unknown ``subsets``, or embeddings that do not fit.
    """
    for name, value in (("passages", count), ("drafts", drafts), ("passages_per_draft", passages_per_draft)):
        if value < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {value}")
    check_mode(subsets)
    size = min(passages_per_draft, count)
    rng = np.random.default_rng(seed)
    if subsets in WITHOUT_GROUPS or size == count:
        first = paired_subsets(count, size, drafts, rng) if subsets == "pairs" else []
        return Perspectives((0,) * count, _distinct(count, size, drafts, rng, first))
    if embeddings is None:
        others = " and ".join(map(repr, WITHOUT_GROUPS))
        raise InvalidInputError(f"subsets={subsets!r} needs embeddings; only {others} do without")
    vectors = check_embeddings(embeddings, count)
    labels = kmeans(vectors, size, seed)
    if subsets == "coverage":
        labels = even_out(vectors, labels, size, drafts)
        chosen: Sequence[Sequence[int]] = _deal(labels, size, drafts, rng)
    elif subsets == "paper":
        chosen = _independent(labels, size, drafts, rng)
    else:
        chosen = _from_one_cluster(labels, size, drafts, rng)
    return Perspectives(tuple(int(label) for label in labels), tuple(tuple(sorted(subset)) for subset in chosen))


def check_mode(subsets: str) -> None:
    """Refuse what is not a ``SubsetMode``.

    Raises:
        InvalidInputError: The message lists what there is.
    """
    if subsets not in SUBSET_MODES:
        raise InvalidInputError(f"subsets must be one of {', '.join(SUBSET_MODES)}; got {subsets!r}")


def one_of_each(
    embeddings: np.ndarray,  # [passages, dim]
    count: int,
    *,
    seed: int = 0,
) -> tuple[int, ...]:
    """Positions of ``count`` passages, the best ranked of each perspective, in retrieval order.

    All of them where there are no more than ``count``.

    Raises:
        InvalidInputError: ``count`` is below 1, or the embeddings do not fit.
    """
    _check_count(count)
    total = len(embeddings)
    if total <= count:
        return tuple(range(total))
    vectors = check_embeddings(embeddings, total)
    labels = even_out(vectors, kmeans(vectors, count, seed), count, total)
    return tuple(sorted(int(np.flatnonzero(labels == label)[0]) for label in range(count)))


def _check_count(count: int) -> None:
    if count < 1:
        raise InvalidInputError(f"the number of perspectives must be at least 1, got {count}")


def check_embeddings(embeddings: np.ndarray, count: int) -> np.ndarray:  # [passages, dim], float32, unit length
    """Embeddings as the clustering needs them.

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
    """Cluster labels from 0 to ``clusters - 1``. A cluster may stay empty where vectors coincide."""
    if clusters == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    import faiss  # here: loading it takes a tenth of a second, which `import specrag` must not cost

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
    """Labels after passages moved from clusters with more than ``drafts`` members into smaller ones, nearest first.

    A cluster gives each draft one passage. Members beyond ``drafts`` would never be read, while a smaller cluster
    repeats itself. After this no cluster is empty, and none is above ``drafts`` while another is below: together the
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
        else:  # an empty cluster starts with the passage that is least like its own cluster
            nearest = movable[int((vectors[movable] @ vectors[movable].mean(axis=0)).argmin())]
        labels[nearest] = smallest


def _groups(labels: np.ndarray, clusters: int) -> list[np.ndarray]:
    return [np.flatnonzero(labels == cluster) for cluster in range(clusters)]


def _deal(labels: np.ndarray, clusters: int, drafts: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """For each subset one passage of every cluster. A cluster's deck is shuffled anew only when it is used up."""
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
            # Only possible after every deck was used up once: all passages were dealt, so any new choice will do.
            subset = tuple(sorted(int(rng.choice(group)) for group in groups))
        used.add(subset)
        subsets.append(subset)
    return list(_distinct(len(labels), clusters, drafts, rng, subsets))


def _distinct(
    count: int, size: int, drafts: int, rng: np.random.Generator, subsets: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """``subsets`` and further random ones, each new while new ones exist; then the same again from the first."""
    possible = math.comb(count, size)
    used = set(subsets)
    chosen = list(subsets)
    while len(chosen) < min(drafts, possible):
        subset = tuple(sorted(int(i) for i in rng.choice(count, size=size, replace=False)))
        if subset not in used:
            used.add(subset)
            chosen.append(subset)
    return tuple(chosen[j % len(chosen)] for j in range(drafts))


def _independent(labels: np.ndarray, clusters: int, drafts: int, rng: np.random.Generator) -> list[list[int]]:
    """For each subset one passage of every cluster, drawn anew."""
    groups = [group for group in _groups(labels, clusters) if len(group)]
    return [_fill([int(rng.choice(group)) for group in groups], len(labels), clusters, rng) for _ in range(drafts)]


def _from_one_cluster(labels: np.ndarray, clusters: int, drafts: int, rng: np.random.Generator) -> list[list[int]]:
    """For each subset passages of one cluster; the clusters take turns."""
    groups = [group for group in _groups(labels, clusters) if len(group)]
    chosen = []
    for j in range(drafts):
        group = groups[j % len(groups)]
        taken = rng.choice(group, size=min(clusters, len(group)), replace=False)
        chosen.append(_fill([int(i) for i in taken], len(labels), clusters, rng))
    return chosen


def _fill(taken: Sequence[int], count: int, size: int, rng: np.random.Generator) -> list[int]:
    """``taken`` with random other passages, up to ``size``."""
    missing = size - len(taken)
    if missing <= 0:
        return list(taken)
    others = [i for i in range(count) if i not in set(taken)]
    return [*taken, *(int(i) for i in rng.choice(others, size=missing, replace=False))]
