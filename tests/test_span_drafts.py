"""Span drafts: what a reader finds as drafts, alone, verified by another reader, and pooled with a language model."""

from __future__ import annotations

import math

import pytest

from specrag import Passage, Scoring, SpeculativeRAG
from specrag.errors import DraftingError, InvalidInputError
from specrag.models.base import Reading, Span
from specrag.schema import AnswerReady, DraftDone, SubsetsChosen, VerdictReady
from specrag.speculative.reading import SpanDrafter, distinct_spans, span_evidence
from specrag.speculative.routing import Routing, asks_yes_or_no, needs_language_model
from tests.fakes import HashEmbedder, ScriptedLM, ScriptedReader

TOWER = Passage("Work began in 1887. The tower was finished in March 1889, to the day.", title="Eiffel Tower")
PARIS = Passage("Paris has a tower since 1889. It has a river.", title="Paris")
RIVER = Passage("The Seine is a river.")
PASSAGES = [RIVER, TOWER, PARIS]


def reader(**options) -> ScriptedReader:
    return ScriptedReader({"March 1889": 0.4, "1889": 0.1, "1887": 0.2, "Paris": 0.05}, **options)


async def drafts_of(**options):
    drafter = SpanDrafter(reader(), **options)
    return await drafter.read("when was the tower finished", dict(enumerate(PASSAGES)), first_index=7)


async def test_spans_become_drafts_with_sentence_citations_and_probability():
    first, second, third = await drafts_of(drafts=3)
    assert (first.index, first.text, first.subset) == (7, "March 1889", (1,))
    assert first.rationale == "Eiffel Tower: The tower was finished in March 1889, to the day."
    assert first.log_answer == pytest.approx(math.log(0.4))
    assert first.passages == (TOWER,) and first.drafter == "scripted-reader"
    assert (second.index, second.text, second.log_answer) == (8, "1887", pytest.approx(math.log(0.2)))
    assert third.text == "1889" and third.subset == (2,)  # in TOWER it is part of "March 1889", a better span
    assert first.usage.prompt_tokens == 30 and second.usage.prompt_tokens == 0
    assert first.log_no_answer == pytest.approx(math.log(1 - 0.4 - 0.2 - 2 * 0.1 - 0.05))


async def test_the_same_answer_in_several_passages_is_one_draft_that_cites_all():
    passages = {3: Passage("He was born in Ulm."), 5: Passage("Ulm, his town."), 9: Passage("He was in Bern.")}
    drafter = SpanDrafter(ScriptedReader({"Ulm": 0.3, "Bern": 0.35}))
    first, second = await drafter.read("where", passages)
    assert (first.text, set(first.subset)) == ("Ulm", {3, 5})
    assert first.log_answer == pytest.approx(math.log(0.6))
    assert (second.text, second.subset) == ("Bern", (9,))
    assert [passages[at] for at in first.subset] == list(first.passages)
    for which, start, end in first.places:
        assert first.passages[which].text[start:end] == "Ulm"


async def test_at_most_so_many_drafts_and_of_each_perspective():
    assert [draft.text for draft in await drafts_of(drafts=2)] == ["March 1889", "1887"]
    drafter = SpanDrafter(reader(), drafts=5, per_perspective=1)
    made = await drafter.read("when", dict(enumerate(PASSAGES)), perspectives={0: 0, 1: 0, 2: 1})
    assert [draft.text for draft in made] == ["March 1889", "1889"]
    with pytest.raises(InvalidInputError, match="per_perspective must be at least 1"):
        SpanDrafter(reader(), per_perspective=0)


def test_a_span_of_the_title_has_the_first_sentence_as_evidence():
    assert span_evidence(TOWER, 0, len("Eiffel Tower")) == "Eiffel Tower: Work began in 1887."


def test_spans_without_words_are_no_drafts():
    assert distinct_spans(Reading((Span(0, 2, 3, -0.1),), -2.0), ["a . b"]) == []


# --- the pipeline ---------------------------------------------------------------------------------------


def test_a_reader_alone_answers_without_embedder_or_verifier():
    rag = SpeculativeRAG(drafter=reader())
    events = list(rag.stream("when was the tower finished", PASSAGES))
    answer = events[-1].answer
    assert isinstance(events[-1], AnswerReady) and answer.text == "March 1889"
    assert answer.subset == (1,) and answer.passages == (TOWER,)
    assert answer.scores_used == ("draft",) and answer.embedding_source == "none" and answer.confidence is None
    assert [v.draft.text for v in answer.verdicts] == ["March 1889", "1887", "1889", "Paris"]
    assert sum(isinstance(e, DraftDone) for e in events) == sum(isinstance(e, VerdictReady) for e in events) == 4
    assert [e for e in events if isinstance(e, SubsetsChosen)] == [SubsetsChosen((), "none")]
    assert answer.to_dict()["drafter_usage"] == {"prompt_tokens": 30, "completion_tokens": 0}


def test_two_readers_are_the_extractive_pair_the_larger_one_verifies():
    larger = ScriptedReader({"March 1889": 0.05, "1887": 0.6, "1889": 0.1, "Paris": 0.01})
    answer = SpeculativeRAG(drafter=reader(), verifier=larger).answer("when did it begin", PASSAGES)
    assert answer.text == "1887" and answer.scores_used == ("draft", "span")
    best = answer.verdicts[0]
    assert best.log_span == pytest.approx(math.log(0.6))
    assert best.log_score == pytest.approx(math.log(0.2) + math.log(0.6))
    only = SpeculativeRAG(drafter=reader(), verifier=larger, scoring=Scoring(weights={"draft": 0.0}))
    assert only.answer("when did it begin", PASSAGES).verdicts[0].log_score == pytest.approx(math.log(0.6))


def test_a_written_draft_is_scored_by_a_reader_where_its_answer_stands():
    writer = ScriptedLM(lambda text: ("because", "march 1889!") if "Eiffel" in text else ("because", "never"))
    verifier = ScriptedReader({"March 1889": 0.5})
    rag = SpeculativeRAG(drafter=writer, verifier=verifier, embedder=HashEmbedder(), passages_per_draft=1)
    answer = rag.answer("when", PASSAGES)
    by_text = {v.draft.text: v.log_span for v in answer.verdicts}
    assert by_text == {"march 1889!": pytest.approx(math.log(0.5)), "never": None}
    assert answer.scores_used == ("draft",) and "left out: span" in answer.notes[-1]


def test_nothing_to_copy_is_an_abstention_not_an_error():
    answer = SpeculativeRAG(drafter=ScriptedReader({})).answer("when", PASSAGES)
    assert answer.abstained and answer.reason == "no passage holds a span that could answer"
    assert answer.verdicts == () and answer.text == ""


def test_a_failing_reader_costs_its_drafts_alone():
    broken = ScriptedReader({}, name="broken", error=RuntimeError("away"))
    answer = SpeculativeRAG(drafter=[broken, reader()]).answer("when", PASSAGES)
    assert answer.text == "March 1889" and answer.failures[0].error == "broken: RuntimeError: away"
    with pytest.raises(DraftingError, match="all 1 drafts failed; the first: broken: RuntimeError: away"):
        SpeculativeRAG(drafter=broken).answer("when", PASSAGES)


# --- pools ----------------------------------------------------------------------------------------------


def writer(answer: str = "march 1889") -> ScriptedLM:
    return ScriptedLM(lambda text: ("It says so.", answer))


def test_the_language_model_is_asked_only_where_a_span_cannot_answer():
    lm = writer()
    rag = SpeculativeRAG(drafter=[reader(), lm], embedder=HashEmbedder(), scoring=Scoring(("draft",)))
    assert rag.answer("when was the tower finished", PASSAGES).text == "March 1889"
    assert lm.generate_calls == []
    asked = rag.answer("why was the tower built in march", PASSAGES)
    assert lm.generate_calls and len(asked.verdicts) == 4  # "march 1889" of both is one draft
    assert asked.verdicts[0].same and asked.verdicts[0].log_agreement is not None


def test_a_doubtful_reader_asks_the_language_model_and_no_routing_always_does():
    doubtful, lm = ScriptedReader({"1889": 0.1}), writer("1889")
    settings = {"embedder": HashEmbedder(), "scoring": Scoring(("draft",))}
    SpeculativeRAG(drafter=[doubtful, lm], **settings).answer("when was the tower finished", PASSAGES)
    assert len(lm.generate_calls) == 1
    sure = writer("1889")
    SpeculativeRAG(drafter=[reader(), sure], routing=None, **settings).answer("when was it finished", PASSAGES)
    assert len(sure.generate_calls) == 1


def test_equal_answers_of_several_drafters_count_by_their_share():
    rag = SpeculativeRAG(
        drafter=[ScriptedReader({"1887": 0.5, "Paris": 0.4}), writer("Paris")],
        embedder=HashEmbedder(),
        routing=None,
        passages_per_draft=1,
        scoring=Scoring(("draft", "agreement"), weights={"draft": 0.1}),
    )
    answer = rag.answer("where", PASSAGES)
    assert answer.text == "Paris" and answer.scores_used == ("draft", "agreement")
    paris, other = answer.verdicts
    assert len(paris.same) == 3 and paris.log_agreement == pytest.approx(math.log(4 / 5))
    assert other.log_agreement == pytest.approx(math.log(1 / 5)) and other.same == ()


def test_two_language_models_draft_every_subset_side_by_side():
    rag = SpeculativeRAG(
        drafter=[writer("one"), writer("two")], embedder=HashEmbedder(), drafts=3, passages_per_draft=1
    )
    events = list(rag.stream("when", PASSAGES))
    chosen = next(e for e in events if isinstance(e, SubsetsChosen))
    made = [e.draft for e in events if isinstance(e, DraftDone)]
    assert len(chosen.subsets) == 6 and chosen.subsets[:3] == chosen.subsets[3:]
    assert sorted(d.index for d in made) == list(range(6))
    assert all(d.subset == chosen.subsets[d.index] for d in made)
    assert {d.text for d in made if d.index < 3} == {"one"}


@pytest.mark.parametrize(
    ("question", "needs"),
    [
        ("is the tower in paris", True),
        ("Isn't it true that he won?", True),
        ("did they finish the tower", True),
        ("why was the tower built", True),
        ("how do plants make sugar", True),
        ("which is older, the tower or the bridge", True),
        ("Are Giuseppe Verdi and Ambroise Thomas both Opera composers?", True),
        ("who built the tower", False),
        ("how many steps does it have", False),
        ("how long is the bridge", False),
        ("will smith was born when", False),
        ("when was the tower finished", False),
        ("name the first president", False),
    ],
)
def test_the_form_of_a_question_says_whether_a_span_can_answer(question, needs):
    assert needs_language_model(question) is needs


@pytest.mark.parametrize(
    ("question", "yes_or_no"),
    [
        ("did the tower open before 1900", True),
        ("is the tower open or not", True),
        ("Is the tower or the bridge older?", False),  # one of the two is the answer
        ("when did the tower open", False),
    ],
)
def test_yes_or_no_is_told_from_a_choice(question, yes_or_no):
    assert asks_yes_or_no(question) is yes_or_no


def test_a_span_does_not_compete_for_a_yes_or_a_no():
    lm = ScriptedLM(lambda prompt: ("It opened in 1889.", "yes"))
    pooled = SpeculativeRAG(drafter=[reader(), lm], drafts=1, embedder=HashEmbedder())
    answer = pooled.answer("did the tower open before 1900", PASSAGES)
    assert answer.text == "yes" and {v.draft.drafter for v in answer.verdicts} == {lm.name}
    always = pooled.replace(routing=None).answer("did the tower open before 1900", PASSAGES)
    assert len({v.draft.drafter for v in always.verdicts}) == 2


def test_what_a_pool_refuses():
    with pytest.raises(InvalidInputError, match=r"no_answer_above must lie in \[0, 1\]"):
        Routing(no_answer_above=2)
    with pytest.raises(InvalidInputError, match="drafter must be"):
        SpeculativeRAG(drafter=[])
    with pytest.raises(InvalidInputError, match=r"drafter\[1\] must be"):
        SpeculativeRAG(drafter=[reader(), "gpt"])
