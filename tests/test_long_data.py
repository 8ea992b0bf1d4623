"""Questions over long documents: documents that are made, dialogues turn by turn, and names of systems."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.data import load
from specrag.evaluation.long_data import DocumentPlan, check_long_questions, filler_of, made_documents, turns_of
from specrag.evaluation.long_names import LongSystem, over_documents
from specrag.evaluation.records import Question, Turn
from specrag.models import Sampling
from specrag.rapid import RapidSettings
from specrag.schema import Passage
from tests.test_long_documents import CORPUS, QUESTION, words

MT_BENCH_101 = Path(__file__).parent / "data" / "formats" / "mt_bench_101.jsonl"
DIALOGUE = Question("d", "and who won?", (), turns=(Turn("who ran?", answers=("Ada",)), Turn("and who won?", "Eve")))
SECOND = replace(QUESTION, id="q2")


# --- documents ------------------------------------------------------------------------------------------


def test_documents_leave_room_for_what_is_asked_and_answered():
    (group,) = made_documents([QUESTION], CORPUS, words, DocumentPlan(tokens=(600,)), max_tokens=40)
    (made,) = group
    assert 600 - 40 - 152 - 12 < words(made.context) <= 600 - 40 - 152 and made.id == "q1"
    long = replace(QUESTION, question="where " * 300)
    (shorter,) = made_documents([long], CORPUS, words, DocumentPlan(tokens=(600,)), max_tokens=40)[0]
    assert words(shorter.context) + 300 + 40 <= 600


def test_each_length_has_its_documents_and_its_ids():
    groups = made_documents([QUESTION, SECOND], CORPUS, words, DocumentPlan(tokens=(300, 500)), max_tokens=8)
    assert [[question.id for question in group] for group in groups] == [["q1@300"], ["q2@300"], ["q1@500"], ["q2@500"]]
    lengths = [words(group[0].context) for group in groups]
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3]


def test_questions_may_share_a_document_with_all_evidence_at_the_depth_asked_for():
    plan = DocumentPlan(tokens=(400,), depth=0.0, share=2)
    second = replace(QUESTION, id="q2", passages=(Passage("the map lies in a chest"),), gold=(0,), answers=("a chest",))
    ((first, other),) = made_documents([QUESTION, second], CORPUS, words, plan, max_tokens=8)
    assert first.context == other.context and (first.gold, other.gold) == ((0,), (1,))


def test_a_length_without_room_for_a_document_is_refused():
    with pytest.raises(InvalidInputError, match="100 tokens leave no room .* more than 192 tokens"):
        made_documents([QUESTION], CORPUS, words, DocumentPlan(tokens=(100,)), max_tokens=40)
    with pytest.raises(InvalidInputError, match="100 tokens leave no room .* more than 192 tokens"):
        check_long_questions([QUESTION], DocumentPlan(tokens=(600, 100)), max_tokens=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ()}, "lengths of documents"),
        ({"tokens": (8, 8)}, "each once"),
        ({"tokens": (0,)}, "at least 1"),
        ({"depth": 1.5}, r"depth must be in \[0, 1\]"),
        ({"share": 0}, "share must be at least 1"),
    ],
)
def test_a_plan_out_of_range_is_refused(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        DocumentPlan(**{"tokens": (100,)} | changes)


# --- dialogues ------------------------------------------------------------------------------------------


def test_a_dialogue_is_asked_turn_by_turn_over_its_document():
    first, second = turns_of(replace(DIALOGUE, context="Ada ran."))
    assert (first.id, first.question, first.answers) == ("d/1", "who ran?", ("Ada",))
    assert (second.id, second.answers, second.context, second.turns) == ("d/2", ("Eve",), "Ada ran.", ())
    assert turns_of(QUESTION) == [QUESTION]
    with pytest.raises(InvalidInputError, match="turn 1 of the dialogue 'd' has neither answers nor a reply"):
        turns_of(replace(DIALOGUE, turns=(Turn("who?"),)))


def test_the_document_of_a_published_dialogue_is_made_of_other_dialogues():
    dialogues = load(MT_BENCH_101)
    check_long_questions(dialogues, DocumentPlan(tokens=(500,)))
    own, others = filler_of(dialogues[:1]), filler_of(dialogues[1:])
    assert own[0].text.startswith(f"User: {dialogues[0].turns[0].question}\nAssistant: ")
    corpus, contexts = [*own, *others, *CORPUS[:60]], []
    for seed in range(8):
        plan = DocumentPlan(tokens=(900,), seed=seed)
        ((made,),) = made_documents(dialogues[:1], corpus, words, plan, max_tokens=8)
        contexts.append(made.context)
    assert any(others[0].text in context for context in contexts)
    assert not any(own[0].text in context for context in contexts)
    asked = turns_of(made)
    assert [turn.question for turn in asked] == [turn.question for turn in dialogues[0].turns]
    assert [turn.answers for turn in asked] == [(turn.reply,) for turn in dialogues[0].turns]
    assert {turn.context for turn in asked} == {made.context}


# --- what is refused before a model is loaded -----------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "plan", "message"),
    [
        (QUESTION, None, "1 of 1 questions lack a document .* --documents TOKENS"),
        (replace(QUESTION, gold=()), DocumentPlan(tokens=(100,)), "lack evidence .* `gold`"),
        (replace(QUESTION, answers=(), context="x"), None, "lack answers"),
        (replace(DIALOGUE, turns=(Turn("who?"),), context="x"), None, "neither answers nor a reply"),
    ],
)
def test_questions_that_lack_something_are_named(question, plan, message):
    with pytest.raises(InvalidInputError, match=message):
        check_long_questions([question], plan)


def test_a_name_may_carry_settings():
    common = RapidSettings(candidates=5, sampling=Sampling(seed=3))
    own = LongSystem.named("rapid-upward-40-irrelevant:candidates=8,temperature=0.5")
    made = own.settings(common)
    assert own.upward and own.irrelevant and own.strength == 40
    assert (made.candidates, made.sampling) == (8, Sampling(temperature=0.5, seed=3))
    assert LongSystem.named("rest-self:datastore=texts").settings(common).datastore == "texts"
    wide, narrow = (LongSystem.named(f"magicdec-self:window={window}") for window in (1024, 256))
    assert wide.reading != narrow.reading, "drafters that see other tokens share no reading"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rapid-self-5:speed=3", "rapid-self-5:speed=3: expected settings as name=value of candidates"),
        ("long-context:candidates=3", "expected settings as name=value of temperature"),
        ("rapid-self-5:candidates=-1", "rapid-self-5:candidates=-1: candidates"),
        ("rest-self", "rest-self: proposer='rest' looks up a datastore"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_its_system(name, message):
    with pytest.raises(InvalidInputError, match=message):
        LongSystem.named(name).settings(RapidSettings(candidates=5))


def test_names_are_of_systems_over_passages_or_over_documents_and_not_mixed():
    assert over_documents(["long-context", "rapid-self-10:candidates=3"])
    assert not over_documents(["standard", "speculative:drafts=3"])
    with pytest.raises(InvalidInputError, match="unknown system 'oracle'; known are: standard.*rag-upward"):
        over_documents(["standard", "oracle"])
    with pytest.raises(
        InvalidInputError, match=r"over passages \(standard\) and over long documents \(rag\) need two runs"
    ):
        over_documents(["standard", "rag"])
