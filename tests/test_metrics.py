import math

import numpy as np
import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import (
    abstention_rate,
    calibration_error_by_chance,
    contains_answer,
    draft_coverage,
    exact_match,
    expected_calibration_error,
    f1,
    normalize_squad,
    percentiles,
    read_choice,
    right_choice,
    rouge_l,
    selective_accuracy,
    selective_area,
    selective_curve,
    separation,
    verifier_efficiency,
)

# --- exact match and F1: SQuAD's published evaluation (evaluate-v2.0.py), case by case -------------
# Worked out by hand from its steps: lower case; delete string.punctuation; replace \b(a|an|the)\b by a space; split.

SQUAD_CASES = [
    # prediction, answers, exact match, F1
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"], 1, 1.0),
    ("the DENVER broncos.", ["Denver Broncos"], 1, 1.0),  # case, article and full stop
    ("Denver", ["Denver Broncos"], 0, 2 / 3),
    ("Denver Broncos Denver", ["Denver Broncos"], 0, 0.8),  # a repeated token counts once
    ("in Denver", ["Denver Broncos", "Denver"], 0, 2 / 3),  # the best answer counts
    ("an apple a day", ["apple day"], 1, 1.0),
    ("theatre", ["atre"], 0, 0.0),  # an article inside a word is none
    ("the", ["a"], 1, 1.0),  # no words on either side: both empty, as for an unanswerable question
    ("U.S.A.", ["USA"], 1, 1.0),  # punctuation is deleted, so the letters join
    ("Eiffel-Tower", ["Eiffel Tower"], 0, 0.0),  # and so do hyphenated words: "eiffeltower"
    ("Paris/London", ["London"], 0, 0.0),
    ("a-b", ["ab"], 1, 1.0),  # punctuation goes before the articles: no "a" is left
    ("it's", ["its"], 1, 1.0),
    ("it’s", ["its"], 0, 0.0),  # the typographic apostrophe is not in string.punctuation
    ("“Help!”", ["Help"], 0, 0.0),  # nor are typographic quotation marks: only "!" goes
    ("1939–1945", ["1939"], 0, 0.0),  # nor is the en dash
    ("$5,000", ["5000"], 1, 1.0),
    ("café", ["CAFÉ"], 1, 1.0),
    ("cafe", ["café"], 0, 0.0),  # accents stay
    ("Straße", ["strasse"], 0, 0.0),  # lower case, not case folding
    ("東京", ["東京"], 1, 1.0),
    ("東京 タワー", ["東京"], 0, 2 / 3),
    ("a\u00a0b\tc", ["b c"], 1, 1.0),  # any white space separates words
    ("snake_case", ["snakecase"], 1, 1.0),
    ("", [], 1, 1.0),  # an unanswerable question, and no answer
    ("Denver", [], 0, 0.0),
    ("", ["Denver"], 0, 0.0),
    ("", ["..."], 1, 1.0),  # an answer without words counts as none
    ("", ["...", "Denver"], 0, 0.0),  # unless another has words: then it is left out
    ("the.", [], 1, 1.0),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "score"), SQUAD_CASES)
def test_exact_match_and_f1_agree_with_squads_evaluation(prediction, answers, exact, score):
    assert exact_match(prediction, answers) is bool(exact)
    assert f1(prediction, answers) == pytest.approx(score)


def test_squads_normalisation():
    assert normalize_squad("  The  Cat, a DOG & an Owl! ") == "cat dog owl"


# --- containment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("It opened in Paris/London.", "London", True),  # punctuation separates, where SQuAD's evaluation joins
        ("in 1939–1945", "1939", True),
        ("the “Help!” album", "Help", True),
        ("STRASSE", "Straße", True),
        ("the Eiffel-Tower", "Eiffel Tower", True),
        ("USA", "U.S.A.", False),  # the price of it
        ("in 19815", "1981", False),
        ("", "x", False),
        ("anything", "the", False),
    ],
)
def test_containment_takes_whole_words_and_separates_at_punctuation(text, answer, held):
    assert contains_answer(text, [answer]) is held


# --- multiple choice -------------------------------------------------------------------------------

PLANETS = ("Density will decrease.", "Years will become longer.", "Days will become shorter.", "Gravity will grow.")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("C", 2),
        ("c", 2),
        ("(C)", 2),
        ("[C]", 2),
        ("C.", 2),
        (" C: ", 2),
        ("**C**", 2),
        ('"C"', 2),
        ("C) Days will become shorter.", 2),
        ("(B) because years grow", 1),
        ("b. longer years\nbecause of the impact", 1),
        ("**B.** longer", 1),
        ("The answer is (D).", 3),
        ("The correct answer is D", 3),
        ("answer: b", None),  # a small letter without brackets may be a word
        ("Answer: (b)", 1),
        ("The answer is option B.", 1),
        ("I first thought the answer is A, but the answer is B.", 1),
        ("Answer: B. Option A is wrong.", 1),  # what is said of the answer goes before what is said of options
        ("I choose option D", 3),
        ("Days will become shorter.", 2),
        ("days will become shorter", 2),
        ("Because it spins faster, days will become shorter, not longer.", 2),
        ("Days will become shorter. It is not true that gravity will grow.", 2),  # it begins with the choice
        ("It must be (C)", 2),
        ("(A) is wrong, so it is (C)", 0),  # begins with a letter in brackets
        ("Both (B) and (C)", None),
        ("A planet that spins faster has something else.", None),  # an article
        ("The answer is a faster planet.", None),
        ("E", None),
        ("E.", None),
        ("Bananas", None),
        ("U.S. troops", None),
        ("", None),
    ],
)
def test_a_choice_is_read_from_what_a_model_writes(text, choice):
    assert read_choice(text, PLANETS) == choice


def test_a_choice_inside_anothers_text_is_told_apart():
    assert read_choice("It was New York City.", ["New York", "New York City"]) == 1
    assert read_choice("It was New York.", ["New York", "New York City"]) == 0
    assert read_choice("either red or blue", ["red", "blue"]) is None
    assert read_choice("same", ["same", "same"]) is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Yes.", 0),
        ("No, it does not. Some say yes.", 1),
        ("I would say no", 1),
        ("yes or no", 0),
        ("Nobody knows", None),
    ],
)
def test_yes_and_no_are_choices_too(text, choice):
    assert read_choice(text, ("yes", "no")) == choice


def test_choice_accuracy_counts_any_correct_choice():
    assert right_choice("(B)", PLANETS, (1, 2)) and not right_choice("(A)", PLANETS, (1, 2))
    assert not right_choice("I cannot tell", PLANETS, (1,))
    with pytest.raises(InvalidInputError, match="marked as correct"):
        right_choice("A", PLANETS, ())
    with pytest.raises(InvalidInputError, match="27 choices"):
        read_choice("A", ["x"] * 27)


# --- ROUGE-L ---------------------------------------------------------------------------------------


def test_rouge_l_from_the_longest_common_subsequence():
    # Lin 2004, section 3: "police killed the gunman" against "police kill the gunman": LCS "police the gunman", 3 of 4.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(3 / 4)
    # and "the gunman kill police": LCS "the gunman", 2 of 4
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(2 / 4)
    assert rouge_l("the gunman", ["police", "The gunman!"]) == 1.0
    assert rouge_l("", ["police"]) == 0.0


def test_rouge_lsum_compares_line_by_line():
    # Lin 2004, section 3.2: reference w1..w5, candidates "w1 w2 w6 w7 w8" and "w1 w3 w8 w9 w5": union LCS w1 w2 w3 w5
    text, reference = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    recall, precision = 4 / 5, 4 / 10
    expected = 2 * recall * precision / (recall + precision)
    assert rouge_l(text, [reference], variant="rougeLsum") == pytest.approx(expected)
    # the order of the lines counts for rougeL alone
    assert rouge_l("w3 w4\nw1 w2", ["w1 w2\nw3 w4"], variant="rougeLsum") == 1.0
    assert rouge_l("w3 w4\nw1 w2", ["w1 w2\nw3 w4"]) == pytest.approx(2 / 4)


def test_rouge_l_refuses_what_it_cannot_measure():
    with pytest.raises(InvalidInputError, match="0 references"):
        rouge_l("x", [])
    with pytest.raises(InvalidInputError, match="'rouge1'"):
        rouge_l("x", ["y"], variant="rouge1")


# --- abstention and confidence ---------------------------------------------------------------------


def test_abstention_rate_and_selective_accuracy():
    assert abstention_rate([True, False, False, False]) == 0.25
    assert selective_accuracy([True, False, True, False], [True, True, False, False]) == 0.5
    assert selective_accuracy([False, False], [False, False]) is None
    with pytest.raises(InvalidInputError, match="abstained is empty"):
        abstention_rate([])
    with pytest.raises(InvalidInputError, match=r"\{'right': 1, 'answered': 2\}"):
        selective_accuracy([True], [True, False])


def test_the_selective_curve_answers_the_most_confident_first():
    coverage, accuracy = selective_curve([False, True, True, False], [0.1, 0.9, 0.8, -math.inf])
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(accuracy, [1, 1, 2 / 3, 1 / 2])
    assert selective_area([False, True, True, False], [0.1, 0.9, 0.8, -math.inf]) == pytest.approx(
        (1 + 1 + 2 / 3 + 0.5) / 4
    )


def test_separation_is_the_share_of_pairs_in_the_right_order():
    random = np.random.default_rng(0)
    right, score = random.random(60) < 0.4, random.integers(0, 8, 60).astype(float)
    score[:3] = -math.inf
    pairs = [(a > b) + 0.5 * (a == b) for a in score[right] for b in score[~right]]
    assert separation(right.tolist(), score.tolist()) == pytest.approx(np.mean(pairs))
    assert separation([True, False], [0.9, 0.1]) == 1.0 and separation([False, True], [0.9, 0.1]) == 0.0
    assert separation([True, True], [0.9, 0.1]) is None and separation([False], [0.9]) is None
    with pytest.raises(InvalidInputError, match="not a number"):
        separation([True, False], [math.nan, 0.1])


def test_equal_confidence_gives_the_expectation_over_orders():
    assert selective_area([True, False, True, False], [0.5] * 4) == pytest.approx(0.5)
    _, accuracy = selective_curve([True, True, False], [0.9, 0.5, 0.5])
    np.testing.assert_allclose(accuracy, [1, (1 + 0.5) / 2, 2 / 3])


def test_the_best_order_of_the_questions_has_the_largest_area():
    right = [True] * 6 + [False] * 4
    best = selective_area(right, list(range(10, 0, -1)))
    assert best == pytest.approx((6 + sum(6 / k for k in range(7, 11))) / 10)
    assert selective_area(right, [0.5] * 10) == pytest.approx(0.6)
    assert selective_area(right, list(range(10))) < 0.6 < best


def test_calibration_error_in_closed_form():
    assert expected_calibration_error([True, False] * 10, [0.5] * 20, bins=2) == pytest.approx(0)
    assert expected_calibration_error([False] * 4, [1.0] * 4) == 1.0
    # two bins of two questions: confidence 0.2 and accuracy 0.5; confidence 0.9 and accuracy 1
    assert expected_calibration_error([True, False, True, True], [0.1, 0.3, 0.8, 1.0], bins=2) == pytest.approx(
        (0.3 * 2 + 0.1 * 2) / 4
    )


def test_calibration_bins_hold_equally_many_questions():
    # with bins of equal width, all five would share the bin [0.9, 1] and the error would be that of their means
    sure = [0.91, 0.92, 0.93, 0.94, 0.95]
    right = [False, True, True, True, True]
    assert expected_calibration_error(right, sure, bins=5) == pytest.approx(
        (0.91 + (1 - 0.92) + (1 - 0.93) + (1 - 0.94) + (1 - 0.95)) / 5
    )
    assert expected_calibration_error(right, sure, bins=1) == pytest.approx(0.93 - 0.8)
    with pytest.raises(InvalidInputError, match="confidences 0.91 to 1.5"):
        expected_calibration_error(right, [*sure[:4], 1.5])
    with pytest.raises(InvalidInputError, match="0 bins"):
        expected_calibration_error(right, sure, bins=0)


def test_calibration_error_by_chance_in_closed_form():
    # one bin of two coins: the shares 0, 1/2 and 1 have the gaps 1/2, 0 and 1/2, with probabilities 1/4, 1/2 and 1/4
    mean, most = calibration_error_by_chance([0.5, 0.5], bins=1, draws=20_000)
    assert mean == pytest.approx(0.25, abs=0.01) and most == 0.5
    assert calibration_error_by_chance([0.0, 1.0, 1.0], bins=3) == (0, 0)
    # of a fair coin, |share - 1/2| of 16 flips exceeds 0.1875 in 7.7 % and 0.25 in 2.1 % of all cases (binomial)
    assert calibration_error_by_chance([0.5] * 16, bins=1, draws=20_000)[1] == 0.25
    one, other = (calibration_error_by_chance([0.3] * 20, seed=seed) for seed in (0, 1))
    assert one != other and one == calibration_error_by_chance([0.3] * 20)
    # bins hold neighbours: two coins in one, and two certainties in the other
    assert calibration_error_by_chance([0.5, 1, 0.5, 1], bins=2, draws=20_000)[0] == pytest.approx(0.125, abs=0.01)
    # a bin per answer: E|right - p| = 2 p (1 - p)
    assert calibration_error_by_chance([0.2, 0.9], bins=10, draws=20_000)[0] == pytest.approx(
        (2 * 0.2 * 0.8 + 2 * 0.9 * 0.1) / 2, abs=0.01
    )
    for bad, message in (({"draws": 0}, "draws"), ({"bins": 0}, "0 bins")):
        with pytest.raises(InvalidInputError, match=message):
            calibration_error_by_chance([0.5], **bad)
    with pytest.raises(InvalidInputError, match="confidences 0.5 to 1.5"):
        calibration_error_by_chance([0.5, 1.5])


# --- drafts and times ------------------------------------------------------------------------------


def test_draft_coverage_and_the_verifiers_efficiency():
    drafts = [[True, False], [False, True], [False, False], [True, True], []]
    chosen = [True, False, False, True, False]
    assert draft_coverage(drafts) == 3 / 5
    assert verifier_efficiency(chosen, drafts) == pytest.approx(2 / 3)
    assert verifier_efficiency([False], [[False]]) is None


def test_percentiles_interpolate():
    assert percentiles([1.0, 2.0, 3.0, 4.0]) == {"p50": 2.5, "p95": pytest.approx(3.85)}
    assert percentiles([7.0], (0, 99.9)) == {"p0": 7.0, "p99.9": 7.0}
    with pytest.raises(InvalidInputError, match="values is empty"):
        percentiles([])
    with pytest.raises(InvalidInputError, match=r"ranks in \[0, 100\]"):
        percentiles([1.0], (101,))
