"""Which draft wins: pure functions over scored drafts."""

import pytest

from specrag.schema import Draft, Passage, Verdict
from specrag.speculative.selection import choose, combine, rank, scores_counting
from specrag.text import normalize_answer


def verdict(text="x", draft_=-1.0, contain=-1.0, reflect=-1.0, *, subset=(0, 1), abstained=False) -> Verdict:
    draft = Draft(0, subset, (Passage("the evidence"),), text, "because", abstained)
    return Verdict(draft, draft_, contain, reflect)


def test_a_score_that_one_draft_lacks_counts_for_none():
    verdicts = [verdict(), verdict(contain=None)]
    assert scores_counting(verdicts, ("draft", "self_contain", "self_reflect")) == ("draft", "self_reflect")


def test_the_total_is_the_product_of_what_counts():
    assert combine(verdict(draft_=-1, contain=-2, reflect=-4), ("draft", "self_reflect")).log_score == -5
    assert combine(verdict(), ()).log_score is None


def test_the_best_comes_first_and_abstaining_drafts_last():
    verdicts = [verdict("a", draft_=-3), verdict("no", draft_=9, abstained=True), verdict("b", draft_=-2)]
    ranked, used = rank(verdicts, ("draft",))
    assert [v.draft.text for v in ranked] == ["b", "a", "no"]
    assert used == ("draft",) and ranked[2].log_score is None


def test_an_abstaining_draft_without_scores_does_not_decide_what_counts():
    ranked, used = rank([verdict("a"), verdict("no", contain=None, abstained=True)], ("draft", "self_contain"))
    assert used == ("draft", "self_contain") and ranked[0].log_score == -2


def test_without_scores_agreement_then_rank_decides():
    verdicts = [
        verdict("Paris", None, None, None, subset=(3, 4)),
        verdict("Rome", None, None, None, subset=(0, 1)),
        verdict("the paris!", None, None, None, subset=(2, 5)),
    ]
    ranked, used = rank(verdicts, ("draft", "self_contain"))
    assert [v.draft.text for v in ranked] == ["the paris!", "Paris", "Rome"] and used == ()


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert normalize_answer("The  Eiffel-Tower.") == normalize_answer("an eiffel tower")


def test_the_best_draft_wins_with_the_scores_that_count():
    choice = choose([verdict("a", draft_=-3, contain=None), verdict("b", draft_=-2)], ("draft", "self_contain"))
    assert choice.winner.draft.text == "b" and choice.reason is None
    assert choice.scores_used == ("draft",)
    assert choice.notes == ("not available for every draft, so left out: self_contain",)


@pytest.mark.parametrize(
    ("verdicts", "threshold", "reason"),
    [
        ([], None, "no draft was verified in time"),
        ([verdict("no", abstained=True)], None, "every draft says that the passages do not answer"),
        ([verdict(draft_=-2.5), verdict("no", abstained=True)], -2.5, "above the threshold: -2.500 <= -2.500"),
    ],
)
def test_nothing_to_choose_is_an_abstention_with_its_reason(verdicts, threshold, reason):
    choice = choose(verdicts, ("draft",), threshold)
    assert choice.winner is None and reason in choice.reason and choice.notes == ()
    assert len(choice.ranked) == len(verdicts)


def test_a_threshold_needs_a_score():
    choice = choose([verdict(draft_=None)], ("draft",), threshold=-1.0)
    assert choice.winner is not None and "agreement among drafts" in choice.notes[0]
