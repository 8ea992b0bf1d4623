"""Corrective RAG: grades, actions, knowledge strips, the second retriever, and the three evaluators."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from specrag.baselines import CorrectiveRAG, LMEvaluator, NLIEvaluator, PassageEvaluator, SimilarityEvaluator
from specrag.baselines.corrective import action_for, knowledge_strips
from specrag.baselines.evaluators import RELEVANCE, filled
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models.base import GenerationRequest, Turn
from specrag.models.bundled import located
from specrag.retrieval import PassageIndex
from specrag.schema import Passage, Usage
from specrag.text import passage_text
from tests.fakes import HashEmbedder, ScriptedLM

LONG = "Ada won the race. It rained. Eve came second. The crowd went home. Ada got a cup. It was gold."


class Words(PassageEvaluator):
    """Grades a text by the words in it."""

    def __init__(self, grades: dict[str, float]) -> None:
        self.by_word, self.seen = grades, []

    async def agrade(self, question: str, texts: Sequence[str]) -> tuple[list[float], Usage]:
        self.seen += texts
        return [max([v for w, v in self.by_word.items() if w in t], default=0.0) for t in texts], Usage(len(texts), 0)


class Model(ScriptedLM):
    """Answers "Ada", and keeps what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        super().__init__(self._said)

    def _said(self, prompt: str) -> tuple[str, str]:
        self.prompts.append(prompt)
        return "", "Ada"


def corrective(grades: dict[str, float], **settings) -> CorrectiveRAG:
    return CorrectiveRAG(model=Model(), evaluator=Words(grades), **settings)


# --- grading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grades", "action"),
    [
        ([0.1, 0.7], "correct"),
        ([0.1, 0.6], "ambiguous"),  # not above the upper threshold
        ([0.1, 0.3], "ambiguous"),
        ([0.1, 0.2], "incorrect"),
        ([], "incorrect"),
    ],
)
def test_the_action_follows_from_the_best_grade(grades, action):
    assert action_for(grades, 0.2, 0.6) == action


def test_the_grades_and_the_action_are_told():
    answer = corrective({"Ada": 0.9, "Eve": 0.4}).answer("who won", ["Ada won.", "Eve lost.", "Rain."])
    graded = [row for row in answer.critiques if "verdict" in row]
    assert [(row["passage"], row["grade"], row["verdict"]) for row in graded] == [
        (0, 0.9, "correct"),
        (1, 0.4, "ambiguous"),
        (2, 0.0, "incorrect"),
    ]
    assert "corrective RAG takes the passages as correct" in answer.notes
    assert answer.timings.grade > 0 and answer.timings.draft > 0
    assert answer.verifier_usage.prompt_tokens == 3  # a passage of one strip is graded once


# --- strips -----------------------------------------------------------------------------------------------


def test_a_passage_is_split_into_strips_and_a_short_one_is_not():
    assert knowledge_strips(LONG, 2) == [
        "Ada won the race. It rained.",
        "Eve came second. The crowd went home.",
        "Ada got a cup. It was gold.",
    ]
    assert knowledge_strips("One. Two.", 1) == ["One. Two."] and knowledge_strips(" ", 2) == []


def test_strips_are_dropped_and_the_others_recomposed_in_their_order():
    rag = corrective({"Ada got": 0.9, "Ada won": 0.8, "Bob": 0.3})
    answer = rag.answer("who won", [Passage(LONG, title="Race"), "Bob slept.", "Rain."])
    prompt = rag.model.prompts[0]
    assert "Race: Ada won the race. It rained. Ada got a cup. It was gold." in prompt
    assert "Eve" not in prompt and "Bob slept." in prompt and "Rain." not in prompt
    assert answer.subset == (0, 1) and answer.passages[0].text == LONG
    assert [row["strip"] for row in answer.critiques if "strip" in row] == [
        "Ada won the race. It rained.",
        "Ada got a cup. It was gold.",
        "Bob slept.",
    ]


def test_only_so_many_strips_are_kept_and_never_none():
    one = corrective({"Ada got": 0.9, "Ada won": 0.8}, strips=1)
    one.answer("who won", [LONG])
    assert "Ada got a cup" in one.model.prompts[0] and "Ada won" not in one.model.prompts[0]
    strict = corrective({"Ada got": 0.9, "Ada won": 0.8}, strip_threshold=0.99)
    strict.answer("who won", [LONG])
    assert "Ada got a cup" in strict.model.prompts[0] and "Ada won" not in strict.model.prompts[0]


# --- the second retriever ---------------------------------------------------------------------------------


def test_nothing_correct_and_no_second_retriever_is_an_abstention():
    rag = corrective({"Ada": 0.1})
    answer = rag.answer("who won", ["Ada won."])
    assert answer.abstained and answer.reason == "no passage is relevant: the best grade is 0.10"
    assert rag.model.prompts == [] and answer.critiques


def test_nothing_correct_asks_the_second_retriever_and_discards_the_first():
    rag = corrective({"Ada": 0.1, "Found": 0.5}, second=lambda question: [f"Found for {question}.", "Rain."])
    answer = rag.answer("who won", ["Ada won."])
    assert "Found for who won." in rag.model.prompts[0] and "Ada won." not in rag.model.prompts[0]
    assert answer.text == "Ada" and answer.subset == () and [p.text for p in answer.passages] == ["Found for who won."]
    assert "the second retriever found 2 passages" in answer.notes and answer.timings.retrieve > 0


def test_an_ambiguous_case_reads_both_and_a_correct_one_asks_nobody():
    async def second(question: str) -> list[str]:
        return ["Found it."]

    both = corrective({"Ada": 0.4, "Found": 0.5}, second=second)
    answer = both.answer("who won", ["Ada won."])
    assert "Ada won." in both.model.prompts[0] and "Found it." in both.model.prompts[0]
    assert answer.subset == (0,) and len(answer.passages) == 2

    def never(question: str) -> list[str]:
        raise AssertionError("asked although the passages are correct")

    assert corrective({"Ada": 0.9}, second=never).answer("who won", ["Ada won."]).text == "Ada"


def test_an_index_can_be_the_second_retriever(minilm):
    index = PassageIndex(minilm)
    index.add(["Ada won the race in 1890.", "Bread is made of flour."])
    rag = corrective({"Ada won the race": 0.9}, second=index)
    assert rag.answer("who won the race", []).text == "Ada"
    assert "Ada won the race in 1890." in rag.model.prompts[0] and "Bread" not in rag.model.prompts[0]


@pytest.mark.parametrize(
    ("evaluator", "given", "message"),
    [
        ("model", {"lower": -0.99, "upper": 0.59}, r"lower=-0.99 is outside the grades of LMEvaluator, .* \[0, 1\]"),
        ("embedder", {"upper": 1.2}, r"upper=1.2 is outside the grades of SimilarityEvaluator, .* \[-1, 1\]"),
        ("embedder", {"strip_threshold": -2}, "strip_threshold=-2 is outside the grades of SimilarityEvaluator"),
        ("embedder", {"lower": 0.7}, "lower must be at most upper, got lower=0.7 and upper=0.64"),
    ],
)
def test_a_threshold_that_its_evaluator_never_reaches_is_refused(evaluator, given, message):
    with pytest.raises(InvalidInputError, match=message):
        CorrectiveRAG(model=Model(), evaluator={"model": None, "embedder": HashEmbedder()}[evaluator], **given)


def test_a_users_own_evaluator_may_grade_on_any_scale():
    rag = corrective({"Ada": 7.0}, lower=-3.0, upper=5.0)
    assert "corrective RAG takes the passages as correct" in rag.answer("who won", ["Ada won."]).notes


def test_by_default_similarity_tells_a_passage_that_answers_from_the_nearest_others(minilm, questions):
    evaluator = SimilarityEvaluator(minilm)
    lower, upper = CorrectiveRAG(model=Model(), evaluator=evaluator).thresholds
    assert (lower, upper) == evaluator.thresholds
    question = next(question for question in questions if question.gold)
    (gold,) = question.gold
    graded = minilm.embed([question.question, *map(passage_text, question.passages)])
    grades = list(map(float, graded[1:] @ graded[0]))
    assert action_for(grades, lower, upper) == "correct" and grades[gold] > upper


# --- evaluators -------------------------------------------------------------------------------------------


async def test_similarity_is_the_cosine(minilm):
    texts = ["Ada won the race.", "Bread is made of flour."]
    grades, usage = await SimilarityEvaluator(minilm).agrade("who won the race", texts)
    vectors = minilm.embed(["who won the race", *texts])
    assert grades == pytest.approx([float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])], abs=1e-5)
    assert grades[0] > grades[1] and usage == Usage()


async def test_p_yes_is_that_of_the_models_next_token(smollm2):
    text, question = "Ada won the race.", "who won the race"
    (grade,), usage = await LMEvaluator(smollm2).agrade(question, [text])
    prompt = GenerationRequest((Turn.of("user", filled(RELEVANCE, text=text, question=question)),))
    ids = smollm2.encoder.encode_generation(prompt)
    with torch.inference_mode():
        values = smollm2.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    top = {int(i): float(v) for v, i in zip(*values.topk(20), strict=True)}
    words = {i: smollm2.tokenizer.decode([i]).strip(" .,").casefold() for i in top}
    yes, no = (sum(v for i, v in top.items() if words[i] == w) or min(top.values()) for w in ("yes", "no"))
    assert grade == pytest.approx(yes / (yes + no), abs=1e-3) and usage.prompt_tokens == len(ids)


@pytest.fixture(scope="module")
def classifier():
    """A sequence classifier of three classes with random weights, and a real tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(located("minilm"))
    names = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval(), tokenizer


async def test_an_nli_models_grade_is_its_probability_of_entailment(classifier):
    model, tokenizer = classifier
    texts = ["Ada won the race.", "Bread is made of flour, water and salt."]
    grades, usage = await NLIEvaluator(model, tokenizer, batch_size=1).agrade("who won", texts)
    for text, grade in zip(texts, grades, strict=True):
        pair = tokenizer(text, "This answers the question: who won", return_tensors="pt")
        with torch.inference_mode():
            assert grade == pytest.approx(float(model(**pair).logits.softmax(-1)[0, 1]), abs=1e-5)
    assert usage.prompt_tokens > 20
    together, _ = await NLIEvaluator(model, tokenizer).agrade("who won", texts)
    assert together == pytest.approx(grades, abs=1e-4)
    neutral, _ = await NLIEvaluator(model, tokenizer, label="neutral").agrade("who won", texts)
    assert neutral != pytest.approx(grades)


def test_an_nli_model_loads_from_a_folder_and_bad_ones_are_named(classifier, tmp_path):
    model, tokenizer = classifier
    model.save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    assert NLIEvaluator(tmp_path / "nli").name.endswith("nli")
    with pytest.raises(InvalidInputError, match="has no class 'agrees'; it has contradiction, entailment, neutral"):
        NLIEvaluator(model, tokenizer, label="agrees")
    with pytest.raises(InvalidInputError, match="needs its tokenizer"):
        NLIEvaluator(model)
    with pytest.raises(ModelNotFoundError):
        NLIEvaluator(tmp_path / "nothing")


def test_braces_in_a_text_stay_as_they_are():
    assert filled("{text} of {question}", text="{question}", question="{x}") == "{question} of {x}"


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lower": 0.9}, "lower must be at most upper, got lower=0.9 and upper=0.6"),
        ({"upper": "high"}, "upper must be a number"),
        ({"strips": 0}, "strips must be a whole number of at least 1"),
        ({"second": 3}, "second must be a callable"),
        ({"evaluator": "nli"}, "evaluator must be a PassageEvaluator"),
        ({"evaluator": ScriptedLM(lambda prompt: ("", "x"), log_probs=False)}, "gives no log-probabilities"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(InvalidInputError, match=said):
        CorrectiveRAG(**{"model": Model(), "evaluator": Words({}), **settings})


def test_a_second_retriever_that_returns_no_passages_is_named():
    with pytest.raises(InvalidInputError, match=r"the second retriever's passages\[0\]"):
        corrective({}, second=lambda question: [3]).answer("who won", ["Ada won."])
