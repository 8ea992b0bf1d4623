"""Listwise verification: one prompt, two orders, equal answers once, and what a server lists."""

from __future__ import annotations

import math

import pytest

from specrag import Passage, Scoring
from specrag.errors import InvalidInputError, LogProbsUnavailableError
from specrag.models import Capabilities, Completion, GeneratedText
from specrag.schema import Draft, Usage
from specrag.speculative.listwise import ListwiseVerifier, label_log_prob
from specrag.speculative.selection import scores_counting
from tests.fakes import ScriptedLM


def draft(index: int, text: str, log_answer: float = -1.0, rationale: str = "") -> Draft:
    return Draft(index, (index,), (Passage(f"passage {index}"),), text, rationale, log_answer=log_answer)


class Labeller(ScriptedLM):
    """Gives each candidate line a probability by its text and, when ``bias`` says so, by its place."""

    def __init__(self, worth, bias=lambda place: 1.0, **options):
        super().__init__(lambda text: ("", ""), **options)
        self.worth, self.bias, self.asked = worth, bias, []

    @property
    def capabilities(self):
        return Capabilities(None, True, True, True)

    def _complete(self, request, top_log_probs):
        prompt = request.turns[-1].text
        self.asked.append((prompt, top_log_probs))
        lines = [line for line in prompt.splitlines() if line[1:3] == ". "]
        weights = {line[0]: self.worth(line[3:]) * self.bias(i) for i, line in enumerate(lines)}
        total = sum(weights.values())
        top = {label: math.log(weight / total) for label, weight in weights.items()}
        return Completion((GeneratedText("A", (-0.1,), 1, top_log_probs=(top,)),), Usage(20, 1))


def worth(line: str) -> float:
    return 8.0 if line.startswith("Rome") else 1.0 if line.startswith("Oslo") else 0.5


async def test_all_drafts_stand_in_one_prompt_with_their_evidence_and_none_of_them_last():
    lm = Labeller(worth)
    drafts = [draft(0, "Oslo", -2, "Oslo is\na city."), draft(1, "Rome", -1), draft(2, "Rome!", -3)]
    made = await ListwiseVerifier(lm, scoring=Scoring(mode="listwise", second_order_below=0)).verify("where?", drafts)
    (prompt, count), *more = lm.asked
    assert not more and count == 20
    assert (
        "A. Rome\nB. Oslo (Oslo is a city.)\nC. None of these" in prompt
    )  # the best by itself first, equal answers once
    total = 8 + 1 + 0.5
    assert [verdict.log_listwise for verdict in made.outcomes] == pytest.approx(
        [math.log(1 / total), math.log(8 / total), math.log(8 / total)]
    )
    assert [verdict.log_none for verdict in made.outcomes] == pytest.approx([math.log(0.5 / total)] * 3)
    assert made.usage == Usage(20, 1)


async def test_the_opposite_order_removes_the_models_preference_for_a_place():
    drafts = [draft(i, f"city {i}") for i in range(4)]
    first_place = lambda place: 10.0 if place == 0 else 1.0  # noqa: E731
    lm = Labeller(lambda line: 1.0, first_place)
    made = await ListwiseVerifier(lm, scoring=Scoring(mode="listwise", second_order_below=None)).verify("q", drafts)
    logs = [verdict.log_listwise for verdict in made.outcomes]
    assert logs[0] == pytest.approx(logs[3]) and logs[1] == pytest.approx(logs[2]) and len(lm.asked) == 2
    assert made.usage == Usage(40, 2)


async def test_the_second_order_is_asked_for_only_where_the_first_is_unsure():
    sure, unsure = Labeller(worth), Labeller(lambda line: 1.0)
    for lm in (sure, unsure):
        verifier = ListwiseVerifier(lm, scoring=Scoring(mode="listwise", second_order_below=1.5))
        await verifier.verify("q", [draft(0, "Rome"), draft(1, "Oslo")])
    assert (len(sure.asked), len(unsure.asked)) == (1, 2)


async def test_more_drafts_than_labels_leave_out_the_least_likely():
    lm = Labeller(worth)
    drafts = [draft(i, f"city {i}", -float(i)) for i in range(30)]
    made = await ListwiseVerifier(lm, scoring=Scoring(mode="listwise", second_order_below=0)).verify("q", drafts)
    logs = [verdict.log_listwise for verdict in made.outcomes]
    assert all(-math.inf < log <= 0 for log in logs[:25]) and logs[25:] == [-math.inf] * 5
    assert scores_counting(made.outcomes, ("draft", "listwise")) == ("draft", "listwise")
    assert "30 different drafts: the 25" in made.notes[0]


async def test_evidence_is_cut_to_the_window_and_answers_that_exceed_it_are_refused():
    lm = Labeller(worth, window=200)
    drafts = [draft(i, f"city {i}", rationale="word " * 80) for i in range(4)]
    made = await ListwiseVerifier(lm, scoring=Scoring(mode="listwise", second_order_below=0)).verify("q", drafts)
    assert "evidence cut to fit the verifier's window of 200 tokens" in made.notes
    assert len(lm.asked[0][0].split()) < 200 and "city 3 (word" in lm.asked[0][0]
    with pytest.raises(InvalidInputError, match="4 answers exceed the verifier's window of 200 tokens"):
        await ListwiseVerifier(lm).verify("q", [draft(i, f"{i} " + "long " * 80) for i in range(4)])


async def test_a_model_that_lists_no_tokens_is_named():
    lm = ScriptedLM(lambda text: ("A",))
    with pytest.raises(LogProbsUnavailableError, match="scripted does not list likely tokens"):
        await ListwiseVerifier(lm).verify("q", [draft(0, "a"), draft(1, "b")])


def test_a_label_counts_in_all_its_spellings():
    top = {"A": math.log(0.2), " A": math.log(0.1), "a": math.log(0.1), "B": math.log(0.05)}
    assert label_log_prob(top, "A") == pytest.approx(math.log(0.4))
    assert label_log_prob(top, "B") == pytest.approx(math.log(0.05))
    assert label_log_prob(top, "C") == pytest.approx(math.log(0.05))  # not listed: at most the lowest that is


async def test_a_real_model_compares_drafts_in_one_forward_pass(quick_smollm2, forward_passes):
    counts = forward_passes(quick_smollm2.model)
    drafts = [
        draft(0, "Paris", -1, "Paris is the capital of France."),
        draft(1, "a river", -2, "The Seine is a river."),
    ]
    verifier = ListwiseVerifier(quick_smollm2, scoring=Scoring(mode="listwise", second_order_below=0))
    made = await verifier.verify("what is the capital of france", drafts)
    assert len(counts) == 1
    logs = [verdict.log_listwise for verdict in made.outcomes] + [made.outcomes[0].log_none]
    assert sum(map(math.exp, logs)) == pytest.approx(1, abs=1e-5)
