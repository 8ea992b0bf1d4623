import math
from dataclasses import replace

import pytest

from specrag.errors import InvalidInputError
from specrag.models import Completion
from specrag.schema import Draft, DraftFailure, Passage, Usage, Verdict
from specrag.speculative.affirmation import yes_log_probability
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import (
    SUBSTITUTE_NOTE,
    RawScores,
    Scoring,
    Verifier,
    draft_score,
)
from tests.fakes import ScriptedLM, part

P = Passage("the evidence")


def draft(text="x", rationale="because", subset=(0, 1), **changes) -> Draft:
    values = {"log_rationale": -4.0, "log_answer": -1.0, "rationale_tokens": 4, "answer_tokens": 2} | changes
    return Draft(0, subset, (P,), text, rationale, **values)


def test_the_draft_score_is_the_papers_sum_of_two_probabilities():
    assert draft_score(draft()) == pytest.approx(math.log(math.exp(-4) + math.exp(-1)))
    assert draft_score(draft(), "mean") == pytest.approx(math.log(math.exp(-4 / 4) + math.exp(-1 / 2)))


def test_the_draft_score_survives_extremes():
    assert draft_score(draft(log_rationale=-2000.0, log_answer=-2001.0)) == pytest.approx(
        -2000 + math.log(1 + math.exp(-1))
    )
    assert draft_score(draft(log_rationale=-math.inf, log_answer=-math.inf)) == -math.inf


def test_a_draft_without_rationale_is_scored_by_its_answer_alone():
    assert draft_score(draft(rationale="", log_rationale=0.0)) == -1.0


def test_without_log_probabilities_there_is_no_draft_score():
    assert draft_score(draft(log_rationale=None, log_answer=None)) is None


def test_the_conversation_is_q_answer_rationale_r_yes():
    turns = Verifier(ScriptedLM(lambda _: None)).conversation("who?", draft("Ann", "She did."))
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[0].text == "Question: who?"
    assert turns[1].text == "Answer: Ann\nRationale: She did."
    assert [s.text for s in turns[1].segments if s.name == "self_contain"] == ["Ann", "She did."]
    assert turns[2].text == Prompts().statement
    assert [s.name for s in turns[3].segments] == ["self_reflect"] and turns[3].text == "Yes"


def test_normalization_says_which_scores_are_means_a_token():
    raw = RawScores(self_contain=(-1.0, -2.0, -6.0), self_reflect=(-0.5, -0.25))
    total, mean = math.log(math.exp(-4) + math.exp(-1)), math.log(math.exp(-1) + math.exp(-0.5))
    for kind, expected in (("sum", (total, -9.0)), ("mean", (mean, -3.0)), ("mixed", (total, -3.0))):
        made = Verifier(ScriptedLM(lambda _: None), scoring=Scoring(normalization=kind)).verdict(draft(), raw)
        assert (made.log_draft, made.log_self_contain, made.log_self_reflect) == pytest.approx((*expected, -0.75))
    assert Scoring().normalization == "mixed"


def test_scores_that_are_switched_off_are_not_asked_for():
    lm = ScriptedLM(lambda _: None)
    only_reflect = Verifier(lm, scoring=Scoring(("self_reflect",))).conversation("q", draft())
    assert all(s.name is None for s in only_reflect[1].segments)
    assert len(Verifier(lm, scoring=Scoring(("self_contain",))).conversation("q", draft())) == 2
    assert not Verifier(lm, scoring=Scoring(("draft",))).needed_for(draft())


@pytest.mark.parametrize(("evidence", "rationale", "passage"), [("passages", False, True), ("both", True, True)])
def test_passages_beside_or_in_place_of_the_rationale(evidence, rationale, passage):
    turns = Verifier(ScriptedLM(lambda _: None), scoring=Scoring(evidence=evidence)).conversation("q", draft())
    assert ("because" in turns[1].text) == rationale
    assert ("the evidence" in turns[0].text) == passage


def test_yes_is_the_sum_over_its_spellings():
    top = {"Yes": math.log(0.5), " Yes": math.log(0.2), "yes": math.log(0.1), "No": math.log(0.1)}
    assert yes_log_probability(top) == pytest.approx(math.log(0.8))
    assert yes_log_probability({"No": -0.1, "Maybe": -3.0}) == -3.0  # an upper bound
    assert yes_log_probability({}) is None
    assert math.isnan(yes_log_probability({"Yes": math.nan, "No": -1.0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": ("draft", "vibes")}, "unknown scores"),
        ({"scores": ("draft", "draft")}, "named twice"),
        ({"normalization": "max"}, "'mixed', 'sum' or 'mean'"),
        ({"evidence": "hearsay"}, "'rationale', 'passages' or 'both'"),
        ({"threshold": math.nan}, "NaN"),
    ],
)
def test_scoring_options_are_checked_at_construction(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        Scoring(**arguments)


async def test_a_batch_gets_a_verdict_or_a_failure_per_draft_in_order():
    lm = ScriptedLM(lambda _: None, scores=lambda text: math.nan if "bad" in text else -1.0)
    drafts = [replace(draft("good"), index=4), replace(draft("bad"), index=7)]
    made = await Verifier(lm).verify("q", drafts)
    good, bad = made.outcomes
    assert isinstance(good, Verdict) and good.draft is drafts[0] and good.log_self_reflect == -1.0
    assert isinstance(bad, DraftFailure) and bad.index == 7 and "NaN" in bad.error
    assert lm.score_calls == [2] and made.usage == Usage(prompt_tokens=14) and made.notes == ()


async def test_a_substitute_is_noted_once_per_batch():
    lm = ScriptedLM(lambda _: Completion((replace(part("Yes"), top_log_probs=({"Yes": -0.5},)),)), scores=None)
    made = await Verifier(lm).verify("q", [draft("a"), draft("b")])
    assert [v.log_self_reflect for v in made.outcomes] == [-0.5, -0.5] and made.notes == (SUBSTITUTE_NOTE,)
