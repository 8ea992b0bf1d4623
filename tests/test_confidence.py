"""Confidence: fitted probabilities, their file, and what the pipeline does with them: abstain, or escalate."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from specrag import Passage, Scoring, SpeculativeRAG
from specrag.errors import InvalidInputError, NotFoundError
from specrag.models.bundled import READERS
from specrag.schema import AnswerReady, Draft, ScoreName, Verdict
from specrag.speculative.confidence import (
    FEATURES,
    Calibration,
    calibration_for,
    features,
    fit_calibration,
    model_key,
)
from specrag.speculative.routing import Routing
from tests.fakes import HashEmbedder, ScriptedLM, ScriptedReader

PASSAGES = [Passage("The tower was finished in 1889."), Passage("It was begun in 1887."), Passage("Paris has a river.")]


def calibration(**changes) -> Calibration:
    """P(right) = P(draft) / (1 - P(draft)) squeezed: 0.5 where the draft has a probability of a half."""
    settings = {
        "drafters": ("scripted-reader",),
        "verifier": "",
        "mode": "pointwise",
        "weights": {"draft": 4.0},
        "bias": 4.0 * math.log(2),
        "questions": 100,
        "right": 0.6,
    }
    return Calibration(**(settings | changes))


def rag(share: float, **settings) -> SpeculativeRAG:
    drafter = ScriptedReader({"1889": share, "1887": 0.05})
    return SpeculativeRAG(**({"drafter": drafter, "calibration": calibration()} | settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafters": "reader"}, "drafters must be a list of names, got 'reader'"),
        ({"verifier": None}, "verifier must be a text, got None"),
        ({"weights": {"drafts": 1.0}}, r"unknown features \['drafts'\]: there are draft, .*margin"),
        ({"weights": {"draft": "4"}}, "the weight of draft is not a number: '4'"),
        ({"weights": [1.0]}, r"weights must map features to numbers, got \[1.0\]"),
        ({"bias": math.inf}, "bias is not a number: inf"),
        ({"right": True}, "right is not a number: True"),
        ({"questions": 1.5}, "questions must be a whole number, got 1.5"),
    ],
)
def test_a_calibration_is_checked_at_construction(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        calibration(**changes)


def test_every_score_may_be_a_feature_and_has_a_field():
    """What a new score needs; see CONTRIBUTING.md."""
    fields = {field.name for field in dataclasses.fields(Verdict)}
    for name in get_args(ScoreName):
        assert name in FEATURES and f"log_{name}" in fields


# --- the model ------------------------------------------------------------------------------------------


def test_a_fitted_calibration_gives_the_probabilities_that_made_the_data():
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(4000):
        x, y = rng.normal(-1, 2), rng.uniform(0, 1)
        p = 1 / (1 + math.exp(-(0.5 + 1.2 * x - 2 * y)))
        examples.append(({"draft": x, "agreement": y, "constant": 1.0}, bool(rng.random() < p)))
    made = fit_calibration(examples, ["a/b/Reader"], "x/Qwen.gguf", "listwise")
    assert made.weights["draft"] == pytest.approx(1.2, abs=0.15)
    assert made.weights["agreement"] == pytest.approx(-2, abs=0.4)
    assert "constant" not in made.weights and made.bias == pytest.approx(0.5, abs=0.3)
    assert made.fits(["other/place/reader"], "qwen", "listwise") and not made.fits(["reader"], "qwen", "pointwise")
    assert made.questions == 4000 and made.right == pytest.approx(np.mean([r for _, r in examples]))
    predicted = np.mean([made.probability(found) for found, _ in examples])
    assert predicted == pytest.approx(made.right, abs=1e-3)  # a fitted bias makes the mean exact
    assert made.probability({"draft": 1.0}) is None


def test_what_cannot_be_fitted_is_refused():
    some = [({"draft": float(i)}, i % 2 == 0) for i in range(60)]
    with pytest.raises(InvalidInputError, match="at least 50 questions with an answer, got 49"):
        fit_calibration(some[:49], ["a"], "", "pointwise")
    with pytest.raises(InvalidInputError, match="all 60 answers are right"):
        fit_calibration([(found, True) for found, _ in some], ["a"], "", "pointwise")


def test_a_calibration_survives_its_file_and_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "c.json"
    calibration().save(file)
    assert Calibration.load(file) == calibration()
    with pytest.raises(NotFoundError, match="specrag calibrate"):
        Calibration.load(tmp_path / "absent.json")
    content = json.loads(file.read_text())
    for damage, message in (
        ("[]", "is not a calibration"),
        ("{", "is not a calibration"),
        (json.dumps({**content, "format": "other"}), "does not say"),
        (json.dumps({**content, "version": 99}), "another version"),
        (json.dumps({**content, "bias": "much"}), "not a number"),
        (json.dumps({**content, "weights": {"draft": math.nan}}), "not a number"),
        (json.dumps({**content, "extra": 1}), "is not a calibration"),
    ):
        file.write_text(damage)
        with pytest.raises(InvalidInputError, match=message):
            Calibration.load(file)


def test_features_are_what_the_models_give_and_no_infinity():
    draft = Draft(0, (0,), (PASSAGES[0],), "1889", "", log_answer=-0.5, log_no_answer=-math.inf)
    best = Verdict(draft, log_draft=-0.5, log_listwise=-0.1, log_none=-3.0, log_score=-0.6, same=(3,))
    second = Verdict(draft, log_draft=-2.0, log_score=-2.6)
    away = Verdict(Draft(2, (0,), (), "no", "", abstained=True))
    found = features([best, second, away])
    assert found == pytest.approx(
        {
            "draft": -0.5, "listwise": -0.1, "none": -3.0, "no_answer": -20.0,
            "margin": 2.0, "agreement": 2 / 4, "abstaining": 1 / 4,
        }
    )  # fmt: skip
    assert features([best])["margin"] == 20.0


def test_a_models_key_is_its_name_wherever_it_lies():
    assert model_key("/a/b/Qwen2.5.gguf") == model_key("qwen2.5") == "qwen2.5"


# --- in the pipeline ------------------------------------------------------------------------------------


def test_an_answer_carries_its_confidence():
    assert rag(0.5).answer("when", PASSAGES).confidence == pytest.approx(0.5)
    high, low = (rag(share).answer("when", PASSAGES).confidence for share in (0.9, 0.2))
    assert high == pytest.approx(1 / (1 + math.exp(-4 * math.log(1.8)))) and high > 0.9 > 0.1 > low
    assert rag(0.5, calibration=None).answer("when", PASSAGES).confidence is None


def test_a_confidence_below_the_least_is_an_abstention_that_says_so():
    kept, dropped = rag(0.9, min_confidence=0.6), rag(0.4, min_confidence=0.6)
    assert kept.answer("when", PASSAGES).text == "1889"
    answer = dropped.answer("when", PASSAGES)
    assert answer.abstained and answer.text == "" and answer.passages == ()
    assert answer.reason.startswith("the confidence is too low: 0.29 < 0.60")
    assert answer.confidence == pytest.approx(1 / (1 + math.exp(-4 * math.log(0.8))))
    assert answer.verdicts[0].draft.text == "1889"  # to be looked at


def test_settings_that_need_a_calibration_say_so_and_another_models_is_refused():
    drafter = ScriptedReader({"1889": 0.5})
    for setting in ({"min_confidence": 0.5}, {"escalate": "passages", "verifier": answering("x")}):
        with pytest.raises(InvalidInputError, match="needs a calibration, and none ships for scripted-reader"):
            SpeculativeRAG(drafter=drafter, **setting)
    with pytest.raises(InvalidInputError, match="the calibration was made for other verified by nobody"):
        rag(0.5, calibration=calibration(drafters=("other",)))
    with pytest.raises(InvalidInputError, match=r"min_confidence must be a probability in \[0, 1\]"):
        rag(0.5, min_confidence=1.5)
    for name in ("min_confidence", "escalate_below", "deadline"):
        with pytest.raises(InvalidInputError, match=f"{name} must be a number, got '0.5'"):
            rag(0.5, **{name: "0.5"})
    for name in ("threshold", "second_order_below"):
        with pytest.raises(InvalidInputError, match=f"{name} must be a number, got 'x'"):
            Scoring(**{name: "x"})
    with pytest.raises(InvalidInputError, match="the weight of draft must be a number, got 'x'"):
        Scoring(weights={"draft": "x"})
    with pytest.raises(InvalidInputError, match="no_answer_above must be a number"):
        Routing(no_answer_above="x")
    with pytest.raises(InvalidInputError, match="escalate must be 'passages', 'standard' or None"):
        rag(0.5, escalate="always")
    with pytest.raises(InvalidInputError, match="escalate needs a verifier that is a language model"):
        rag(0.5, escalate="passages")
    with pytest.raises(InvalidInputError, match="calibration must be a Calibration, 'auto' or None"):
        rag(0.5, calibration="mine")


# --- escalation -----------------------------------------------------------------------------------------


def answering(text: object) -> ScriptedLM:
    """A verifier that gives its label to the first draft, and answers ``text`` itself."""
    return ScriptedLM(lambda prompt: text if isinstance(text, Exception) else (text,))


def escalating(share: float, lm: ScriptedLM, escalate: str = "passages", **settings) -> SpeculativeRAG:
    return rag(share, verifier=lm, escalate=escalate, **settings)


def test_a_doubtful_choice_is_answered_by_the_verifier_from_the_best_drafts_passages():
    prompts = []
    lm = ScriptedLM(lambda prompt: prompts.append(prompt) or ("in 1889 I think",))
    answer = escalating(0.3, lm).answer("when", PASSAGES)
    assert (answer.text, answer.escalated) == ("in 1889 I think", "passages")
    assert answer.subset == (0, 1) and [p.text for p in answer.passages] == [p.text for p in PASSAGES[:2]]
    assert "river" not in prompts[0] and answer.verdicts[0].draft.text == "1889"
    assert answer.confidence < 0.5 and answer.timings.escalate > 0 and answer.verifier_usage.prompt_tokens == 10


def test_standard_escalation_reads_everything_and_a_sure_choice_is_kept():
    lm = answering("1889, all of it")
    answer = escalating(0.3, lm, "standard").answer("when", PASSAGES)
    assert answer.subset == (0, 1, 2) and answer.escalated == "standard"
    sure = answering("never asked")
    answer = escalating(0.9, sure).answer("when", PASSAGES)
    assert (answer.text, answer.escalated, sure.generate_calls) == ("1889", None, [])


def test_nothing_found_is_escalated_too_and_the_verifier_may_abstain():
    lm = answering("not in the passages")
    made = SpeculativeRAG(
        drafter=ScriptedReader({}),
        verifier=lm,
        calibration=calibration(),
        escalate="passages",
    ).answer("when", PASSAGES)
    assert made.abstained and made.escalated == "passages" and made.passages == ()
    assert made.reason == "the verifier says that the passages do not answer"


def test_a_verifier_that_fails_leaves_the_draft_with_a_note():
    answer = escalating(0.3, answering(RuntimeError("away"))).answer("when", PASSAGES)
    assert (answer.text, answer.escalated) == ("1889", None)
    assert "the verifier could not answer itself: RuntimeError: away" in answer.notes


def test_escalation_comes_before_abstention_by_confidence():
    answer = escalating(0.3, answering("in 1889"), min_confidence=0.6).answer("when", PASSAGES)
    assert (answer.text, answer.abstained, answer.escalated) == ("in 1889", False, "passages")


def test_a_verifier_that_answers_in_doubt_scores_nothing_so_the_readers_own_calibration_holds():
    lm = answering("never asked")
    made = SpeculativeRAG(drafter=ScriptedReader({"1889": 0.9}, name="minilm-reader"), verifier=lm, escalate="passages")
    answer = made.answer("when", PASSAGES)  # no `calibration=`: the one that ships for the reader alone
    assert (answer.text, answer.scores_used) == ("1889", ("draft",)) and answer.confidence > 0.5
    assert lm.generate_calls == [] and lm.score_calls == []


@pytest.mark.parametrize("reader", READERS)
def test_every_bundled_reader_alone_has_a_calibration(reader):
    found = calibration_for([reader], "", "pointwise")
    assert found is not None and (found.drafters, found.questions) == ((reader,), 300)


def test_the_bundled_drafter_that_judges_itself_has_a_calibration(quick_drafter):
    rag = SpeculativeRAG(drafter=quick_drafter, embedder=HashEmbedder(), drafts=2)
    found = rag.roles.calibrated
    assert found is not None and found.weights["verdict"] > 0 and found.drafters == ("smollm2+smollm2-rag-drafter",)
    passages = ["The tower was completed in March 1889.", "The tower is made of iron.", "The river is long."]
    answer = rag.answer("when was the tower completed", passages)
    assert "1889" in answer.text and 0 < answer.confidence < 1
    # It was fitted on drafts that are scored by default.
    for other in (
        {"scores": ("draft",)},
        {"scores": ("verdict",)},
        {"normalization": "mean"},
        {"weights": {"draft": 2}},
    ):
        assert rag.replace(scoring=Scoring(**other)).roles.calibrated is None
        with pytest.raises(InvalidInputError, match="min_confidence needs a calibration"):
            rag.replace(scoring=Scoring(**other), min_confidence=0.5)


def test_a_calibration_for_compared_drafts_keeps_them_compared():
    compared = replace(calibration(verifier="scripted"), mode="listwise")
    made = rag(0.9, verifier=answering("x"), calibration=compared, escalate="passages")
    assert made.roles.settled.mode == "listwise" and made.roles.names == (("scripted-reader",), "scripted")
    with pytest.raises(InvalidInputError, match="not for scripted-reader verified by nobody"):
        rag(0.9, verifier=answering("x"), calibration=calibration(verifier="scripted"), escalate="passages")


def test_a_question_that_no_span_answers_is_escalated_however_sure_the_reader_is():
    asked = "was the tower finished in 1889"
    answer = escalating(0.9, answering("yes")).answer(asked, PASSAGES)
    assert (answer.text, answer.escalated) == ("yes", "passages")
    for routing in (None, Routing(forms=False)):
        assert escalating(0.9, answering("yes"), routing=routing).answer(asked, PASSAGES).escalated is None


async def test_the_stream_ends_with_the_escalated_answer():
    events = [e async for e in escalating(0.3, answering("in 1889")).astream("when", PASSAGES)]
    assert [type(e) for e in events].count(AnswerReady) == 1 and events[-1].answer.text == "in 1889"


def test_written_drafts_have_a_confidence_too():
    lm = ScriptedLM(lambda prompt: ("because", "1889"))
    made = calibration(drafters=("scripted",), verifier="scripted", weights={"agreement": 1.0}, bias=0.0)
    pipeline = SpeculativeRAG(drafter=lm, embedder=HashEmbedder(), calibration=made)
    answer = pipeline.answer("when", PASSAGES)
    assert answer.confidence is not None
