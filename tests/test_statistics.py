import numpy as np
import pytest
from scipy import stats

from specrag.errors import InvalidInputError
from specrag.evaluation.statistics import (
    bootstrap_interval,
    compare,
    mcnemar,
    randomization_test,
    wilson_interval,
)


def pairs(both, won, lost, neither):
    """Answers of two systems: right in both, in the first alone, in the second alone, in neither."""
    first = [True] * both + [True] * won + [False] * lost + [False] * neither
    second = [True] * both + [False] * won + [True] * lost + [False] * neither
    return first, second


# --- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_in_published_examples(successes, count, low, high):
    assert wilson_interval(successes, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_the_bootstrap_of_a_difference_is_close_to_the_normal_interval():
    random = np.random.default_rng(1)
    first = random.normal(1.0, 1.0, 2000)
    second = first - random.normal(0.2, 0.5, 2000)
    differences = first - second
    spread = 1.96 * differences.std() / np.sqrt(2000)
    low, high = bootstrap_interval(first, second)
    assert low == pytest.approx(differences.mean() - spread, abs=0.002)
    assert high == pytest.approx(differences.mean() + spread, abs=0.002)


@pytest.mark.parametrize("statistic", ["difference", "ratio"])
def test_the_bootstrap_agrees_with_scipys(statistic):
    random = np.random.default_rng(2)
    first, second = random.gamma(4.0, 1.0, 120), random.gamma(5.0, 1.0, 120)
    combine = {"difference": np.subtract, "ratio": np.divide}[statistic]
    theirs = stats.bootstrap(
        (first, second),
        lambda a, b, axis: combine(a.mean(axis=axis), b.mean(axis=axis)),
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval
    tolerance = 0.05 * (theirs.high - theirs.low)
    assert bootstrap_interval(first, second, statistic) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_pairing_narrows_the_interval_of_systems_that_agree():
    random = np.random.default_rng(4)
    ease = random.normal(0, 5, 300)
    first, second = ease + 1 + random.normal(0, 0.1, 300), ease + random.normal(0, 0.1, 300)
    low, high = bootstrap_interval(first, second)
    assert 0.9 < low < 1 < high < 1.1
    shuffled_low, shuffled_high = bootstrap_interval(first, random.permutation(second))
    assert shuffled_high - shuffled_low > 20 * (high - low)


def test_the_intervals_cover_the_true_difference_as_often_as_they_say():
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        first = random.random(80) < 0.6
        second = np.where(random.random(80) < 0.7, first, random.random(80) < 0.6)
        low, high = bootstrap_interval(first, second, samples=400)
        covered += low <= 0 <= high
    assert 0.91 < covered / 300 < 0.985


def test_a_bootstrap_depends_on_its_seed_alone_and_takes_large_data_in_parts():
    first, second = pairs(5000, 300, 200, 4500)
    interval = bootstrap_interval(first, second, samples=1000)
    assert interval == bootstrap_interval(first, second, samples=1000)
    assert interval != bootstrap_interval(first, second, samples=1000, seed=1)
    assert interval == pytest.approx((0.01 - 1.96 * 0.00223, 0.01 + 1.96 * 0.00223), abs=0.0008)


def test_a_degenerate_bootstrap_is_a_point():
    assert bootstrap_interval([1.0] * 9, [0.5] * 9) == (0.5, 0.5)
    assert bootstrap_interval([1.0] * 9, [0.5] * 9, "ratio") == (2.0, 2.0)


# --- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (6, 16, 0.052478790283203125),  # 2 P(X <= 6), X binomial(22, 1/2)
    ],
)
def test_mcnemars_exact_test_in_closed_form(won, lost, p):
    assert mcnemar(*pairs(40, won, lost, 17)) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (7, 12), (60, 90), (1000, 1100)])
def test_mcnemars_exact_test_agrees_with_scipys_binomial_test(won, lost):
    assert mcnemar(*pairs(3, won, lost, 3)) == pytest.approx(stats.binomtest(won, won + lost, 0.5).pvalue, rel=1e-9)


def test_the_randomisation_test_against_all_exchanges_of_small_data():
    random = np.random.default_rng(6)
    first, second = random.random(8), random.random(8) - 0.3
    theirs = stats.permutation_test(
        (first, second), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert randomization_test(first, second, samples=40_000) == pytest.approx(theirs, abs=0.01)
    assert randomization_test(first, first) == 1.0


def test_the_randomisation_test_never_says_that_a_chance_is_zero():
    assert randomization_test(np.ones(100), np.zeros(100), samples=999) == 1 / 1000


# --- in words --------------------------------------------------------------------------------------


def test_a_difference_beyond_noise_is_said_in_words():
    found = compare(*pairs(150, 30, 10, 110), names=("speculative", "standard"))
    assert (found.won, found.lost, found.count, found.test) == (30, 10, 300, "McNemar") and not found.noise
    assert found.difference == pytest.approx(20 / 300) and found.low < found.difference < found.high
    assert str(found).startswith("speculative less standard: +6.7 points (95% interval +")
    assert str(found).endswith(
        "McNemar p = 0.0022, better on 30 and worse on 10 of 300 questions): speculative is better"
    )


def test_a_worse_system_and_noise_are_said_in_words():
    assert str(compare(*pairs(150, 10, 30, 110), names=("a", "b"))).endswith(": b is better")
    noise = compare(*pairs(150, 12, 9, 129), names=("a", "b"))
    assert noise.noise and str(noise).endswith(": noise") and noise.low < 0 < noise.high


def test_scores_are_compared_by_randomisation():
    random = np.random.default_rng(7)
    second = random.random(100)
    found = compare(np.clip(second + 0.05, 0, 1), second, names=("a", "b"))
    assert found.test == "randomisation" and not found.noise and found.won > 90 and found.lost == 0
    assert "points" not in str(found) and str(found).endswith(": a is better")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare([], []), "at least one question"),
        (lambda: compare([1, 0], [1]), r"got shapes \(2,\) and \(1,\)"),
        (lambda: bootstrap_interval([1.0], [float("nan")]), "must be finite"),
        (lambda: bootstrap_interval([1.0], [0.0], "ratio"), "needs positive values"),
        (lambda: bootstrap_interval([1.0], [1.0], "product"), "'product'"),
        (lambda: bootstrap_interval([1.0], [1.0], level=95), r"level in \(0, 1\)"),
        (lambda: mcnemar([0.5], [1.0]), "use randomization_test"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(InvalidInputError, match=message):
        call()
