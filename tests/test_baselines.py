"""Other systems over passages: one protocol, one result; standard RAG, the drafter alone, the extractive pair."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specrag import SpeculativeRAG
from specrag.baselines import (
    CorrectiveRAG,
    SelfReflectiveRAG,
    StandardRAG,
    System,
    drafter_alone,
    extractive_pair,
)
from specrag.errors import InvalidInputError, ModelError
from specrag.evaluation.metrics import contains_answer
from specrag.models import bundled
from specrag.schema import AnswerReady, Passage, Usage
from tests.fakes import ScriptedLM, first_passage_lm, shortened


@pytest.fixture(scope="module")
def examples(questions):
    """Five real questions, each with the passage that answers and the beginnings of two others."""
    made = []
    for question in [question for question in questions if question.gold][:5]:
        at = question.gold[0]
        others = [p for i, p in enumerate(question.passages) if i != at][:2]
        passages = (*shortened(others), *shortened([question.passages[at]], 80))
        made.append(replace(question, passages=passages, gold=(2,)))
    return made


SHORT = {"max_answer_tokens": 12}
SYSTEMS = {
    "standard": lambda models: StandardRAG(model=models("quick_smollm2"), **SHORT),
    "corrective, similarity": lambda models: CorrectiveRAG(
        model=models("quick_smollm2"), evaluator=models("minilm"), **SHORT
    ),
    "corrective, P(yes)": lambda models: CorrectiveRAG(model=models("quick_smollm2"), lower=0.0, **SHORT),
    "self-reflective": lambda models: SelfReflectiveRAG(model=models("quick_smollm2"), retrieve="always", **SHORT),
    "drafter alone": lambda models: drafter_alone(models("quick_drafter"), drafts=3, passages_per_draft=1),
    "reader alone": lambda models: drafter_alone(models("reader")),
    "extractive pair": lambda models: extractive_pair(models("reader"), bundled("mpnet-reader")),
    "speculative": lambda models: SpeculativeRAG(drafter=models("reader")),
}
QUICK = ("reader alone", "speculative")
# A language model of 135M parameters follows no instruction: what it answers is real, and seldom right.
AT_LEAST_RIGHT = {"reader alone": 3, "extractive pair": 3, "speculative": 3}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SYSTEMS]
)
def test_every_system_answers_real_questions_from_their_passages(name, request, examples):
    system = SYSTEMS[name](request.getfixturevalue)
    assert isinstance(system, System)
    right = 0
    for question in examples:
        events = list(system.stream(question.question, question.passages))
        assert isinstance(events[-1], AnswerReady)
        answer = events[-1].answer
        assert answer.question == question.question and answer.timings.total > 0
        assert answer.text and not answer.abstained
        assert answer.verdicts[0].draft.text == answer.text
        assert answer.passages == tuple(question.passages[at] for at in answer.subset) and answer.passages
        assert answer.drafter_usage.prompt_tokens > 0
        right += contains_answer(answer.text, question.answers)
    assert right >= AT_LEAST_RIGHT.get(name, 0), f"{right} of {len(examples)} right"


@pytest.mark.slow
def test_blocking_awaited_and_streamed_answers_are_one(quick_smollm2, examples):
    question = examples[0]
    system = StandardRAG(model=quick_smollm2, max_answer_tokens=4)
    answered = system.answer(question.question, question.passages)
    awaited = asyncio.run(system.aanswer(question.question, [passage.text for passage in question.passages]))
    assert answered.text and awaited.text
    assert answered.drafter_usage.prompt_tokens > awaited.drafter_usage.prompt_tokens  # the titles


def test_standard_rag_reads_all_passages_and_says_how_likely_its_answer_is():
    seen = []

    def reply(prompt: str) -> tuple[str, str]:
        seen.append(prompt)
        return "", "Ada Lovelace"

    answer = StandardRAG(model=ScriptedLM(reply)).answer("who?", ["passage 1", " ", "passage 2", "passage 1"])
    assert "passage 1" in seen[0] and "passage 2" in seen[0]
    assert answer.subset == (0, 2) and answer.text == "Ada Lovelace"
    assert answer.verdicts[0].log_score == answer.verdicts[0].log_draft == pytest.approx(-1.0)
    assert answer.drafter_usage == Usage(10, 5) and answer.notes


def test_standard_rag_abstains_where_the_model_says_the_marker_and_without_passages():
    system = StandardRAG(model=ScriptedLM(lambda prompt: ("", "Not in the passages.")))
    answer = system.answer("who?", ["passage 1"])
    assert answer.abstained and answer.text == "" and answer.passages == () and "do not answer" in answer.reason
    assert system.answer("who?", []).reason == "no passages were given"


def test_standard_rag_cuts_passages_to_the_models_window_and_says_so():
    answer = StandardRAG(model=first_passage_lm(window=160)).answer("who?", ["passage 1 " + "word " * 400])
    assert answer.text == "answer 1" and any("cut to fit the window of 160 tokens" in note for note in answer.notes)
    with pytest.raises(InvalidInputError, match="leaves no room for passages in the model's window"):
        StandardRAG(model=first_passage_lm(window=40)).answer("who? " * 40, ["passage 1 " + "word " * 400])


def test_a_model_that_fails_is_an_error_of_standard_rag():
    with pytest.raises(ModelError, match="away"):
        StandardRAG(model=ScriptedLM(lambda prompt: RuntimeError("away"))).answer("who?", ["passage 1"])
    with pytest.raises(ModelError, match="wrote no answer"):
        StandardRAG(model=ScriptedLM(lambda prompt: ("", " "))).answer("who?", ["passage 1"])


def test_the_drafter_alone_takes_its_best_draft_and_nobody_verifies():
    lm = first_passage_lm()
    answer = drafter_alone(lm, drafts=2, passages_per_draft=1, subsets="random").answer(
        "who?", ["passage 1 x", "passage 2 x"]
    )
    assert answer.scores_used == ("draft",) and answer.verifier_usage == Usage() and lm.score_calls == []
    with pytest.raises(InvalidInputError, match="has no verifier"):
        drafter_alone(lm, verifier=lm)


def test_the_extractive_pair_verifies_distinct_spans(reader):
    pair = extractive_pair(reader, reader, drafts=4)
    passages = [Passage("Marie Curie discovered radium in 1898. Pierre Curie helped her.", title="Radium")]
    answer = pair.answer("who discovered radium", passages)
    texts = [verdict.draft.text for verdict in answer.verdicts]
    assert len(set(texts)) == len(texts) >= 2 and "Marie Curie" in answer.text
    assert set(answer.scores_used) == {"draft", "span"}
    with pytest.raises(InvalidInputError, match="verifier must be a SpanReader"):
        extractive_pair(reader, first_passage_lm())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StandardRAG(model="smollm2"), "model must be a specrag LanguageModel"),
        (lambda: StandardRAG(model=first_passage_lm(), max_answer_tokens=0), "max_answer_tokens must be a whole"),
        (lambda: StandardRAG(model=first_passage_lm(), prompts="x"), "prompts must be a Prompts"),
        (lambda: StandardRAG(model=first_passage_lm()).answer(" ", ["x"]), "the question is empty"),
        (lambda: StandardRAG(model=first_passage_lm()).answer("who?", [3]), r"passages\[0\]: a passage is"),
    ],
)
def test_bad_input_is_refused(make, said):
    with pytest.raises(InvalidInputError, match=said):
        make()
