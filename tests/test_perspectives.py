import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.errors import InvalidInputError
from specrag.speculative.perspectives import even_out, kmeans, sample_perspectives


@st.composite
def cases(draw):
    count = draw(st.integers(1, 24))
    dimension = draw(st.integers(2, 8))
    kinds = draw(st.integers(1, count))  # few kinds: many equal vectors
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vectors = rng.standard_normal((kinds, dimension))[rng.integers(0, kinds, count)].astype(np.float32)
    return vectors, draw(st.integers(1, 12)), draw(st.integers(1, 7)), draw(st.integers(0, 1000))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_default_subsets_are_full_distinct_diverse_and_leave_nothing_out(case):
    vectors, drafts, k, seed = case
    count = len(vectors)
    made = sample_perspectives(vectors, count, drafts, k, seed=seed)
    size = min(k, count)
    assert len(made.subsets) == drafts
    assert all(len(set(subset)) == size for subset in made.subsets)
    assert len(set(made.subsets)) == min(drafts, math.comb(count, size))
    read = {i for subset in made.subsets for i in subset}
    assert len(read) == count if drafts * k >= count else len(read) == drafts * k
    # One passage of every cluster, while there are such subsets left.
    if size < count:
        sizes = np.bincount(made.clusters, minlength=size)
        if (sizes > 0).all():
            for subset in made.subsets[: math.prod(int(s) for s in sizes)]:
                assert len({made.clusters[i] for i in subset}) == size
    assert made == sample_perspectives(vectors, count, drafts, k, seed=seed)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["paper", "random", "single_cluster", "pairs"]))
def test_other_modes_give_full_subsets_and_repeat_under_a_seed(case, mode):
    vectors, drafts, k, seed = case
    made = sample_perspectives(vectors, len(vectors), drafts, k, subsets=mode, seed=seed)
    assert len(made.subsets) == drafts
    assert all(len(set(subset)) == min(k, len(vectors)) for subset in made.subsets)
    assert made == sample_perspectives(vectors, len(vectors), drafts, k, subsets=mode, seed=seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_paired_subsets_are_distinct_and_read_every_passage_about_equally_often(count, drafts, k, seed):
    size = min(k, count)
    made = sample_perspectives(None, count, drafts, k, subsets="pairs", seed=seed).subsets
    assert len(set(made)) == min(drafts, math.comb(count, size))
    read = {i for subset in made for i in subset}
    assert len(read) == (count if drafts * k >= count else drafts * k)


@pytest.mark.parametrize("count, k, drafts", [(10, 4, 10), (6, 2, 15), (9, 3, 16), (5, 5, 1)])
def test_each_pair_of_passages_is_read_together_where_the_drafts_suffice(count, k, drafts):
    made = sample_perspectives(None, count, drafts, k, subsets="pairs").subsets
    assert pairs_in(made) == math.comb(count, 2)


def test_more_pairs_are_read_together_than_by_chance_where_the_drafts_do_not_suffice():
    def pairs(mode):
        return [pairs_in(sample_perspectives(None, 10, 5, 4, subsets=mode, seed=seed).subsets) for seed in range(10)]

    assert min(pairs("pairs")) > max(pairs("random"))


def pairs_in(subsets):
    return len({pair for subset in subsets for pair in itertools.combinations(subset, 2)})


def test_the_seed_matters():
    vectors = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    made = {sample_perspectives(vectors, 20, 4, 2, seed=seed).subsets for seed in range(8)}
    assert len(made) > 1


def test_kmeans_finds_separate_groups_and_says_nothing(capfd):
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8, dtype=np.float32) * 10
    vectors = (np.repeat(centres, 4, axis=0) + rng.standard_normal((12, 8)) * 0.1).astype(np.float32)
    labels = kmeans(vectors, 3, seed=0)
    assert [len(set(labels[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(labels)) == 3
    assert capfd.readouterr() == ("", "")


def test_single_cluster_draws_from_one_group_and_coverage_from_all():
    centres = np.eye(2, 8, dtype=np.float32)
    vectors = (
        np.repeat(centres, 5, axis=0) + np.random.default_rng(1).standard_normal((10, 8)).astype(np.float32) * 0.01
    )
    group = [0] * 5 + [1] * 5
    single = sample_perspectives(vectors, 10, 6, 2, subsets="single_cluster", seed=3)
    assert all(len({group[i] for i in subset}) == 1 for subset in single.subsets)
    spread = sample_perspectives(vectors, 10, 5, 2, seed=3)
    assert all(len({group[i] for i in subset}) == 2 for subset in spread.subsets)


def test_evening_out_moves_the_nearest_passage_first():
    vectors = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0, 1]], dtype=np.float32)
    labels = even_out(vectors, np.array([0, 0, 0, 0, 1]), clusters=2, drafts=3)
    assert labels.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "passages must be at least 1"),
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"passages_per_draft": 0}, "passages_per_draft must be at least 1"),
        ({"subsets": "best"}, "subsets must be one of coverage, paper"),
        ({"embeddings": np.ones((3, 2))}, r"shape \[4, dim\]"),
        ({"embeddings": np.full((4, 2), np.nan)}, "must be finite"),
        ({"embeddings": None}, "needs embeddings"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_given(changes, message):
    arguments = {"embeddings": np.eye(4), "count": 4, "drafts": 2, "passages_per_draft": 2} | changes
    with pytest.raises(InvalidInputError, match=message):
        sample_perspectives(**arguments)
