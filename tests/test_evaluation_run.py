"""A run of an evaluation: systems by name, the loop, its figures and its plots."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from specrag.baselines import StandardRAG
from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import wilson_interval
from specrag.evaluation.records import Question
from specrag.evaluation.report import plot, summary_tables
from specrag.evaluation.run import evaluate
from specrag.evaluation.runs import ANSWERS_FILE, AnswerRow, Run, RunInfo, writing_run
from specrag.evaluation.scoring import asked_text, check_questions, measured
from specrag.evaluation.summary import SUMMARY_FILE, summarize
from specrag.evaluation.systems import Parts, build, split_names
from specrag.schema import Passage, Usage
from tests.fakes import ScriptedLM, first_passage_lm, shortened

RACE = Question("q", "who won", ("Ada",), (Passage("Ada won."),))


@pytest.fixture(scope="module")
def short(questions):
    """Real questions with the passage that answers and the beginnings of two others."""
    made = []
    for question in [question for question in questions if question.gold][:5]:
        at = question.gold[0]
        others = [p for i, p in enumerate(question.passages) if i != at][:2]
        made.append(replace(question, passages=(question.passages[at], *shortened(others)), gold=(0,)))
    return made


@pytest.fixture
def parts(reader, minilm) -> Parts:
    return Parts(drafter=reader, verifier=reader, embedder=minilm)


# --- names ------------------------------------------------------------------------------------------------


def test_names_carry_settings_over_commas():
    assert split_names("standard, speculative:subsets=random,drafts=10 ,drafter") == [
        "standard",
        "speculative:subsets=random,drafts=10",
        "drafter",
    ]
    with pytest.raises(InvalidInputError, match="stands before any system"):
        split_names("drafts=3,standard")
    with pytest.raises(InvalidInputError, match="name at least one system of standard, corrective"):
        split_names(" , ")


def test_settings_in_a_name_reach_the_system(parts):
    made = build(["speculative:subsets=random,drafts=10,scores=draft+span,seed=3", "drafter:drafts=2"], parts)
    rag = made["speculative:subsets=random,drafts=10,scores=draft+span,seed=3"].system
    assert (rag.subsets, rag.drafts, rag.scoring.scores, rag.seed) == ("random", 10, ("draft", "span"), 3)
    assert made["drafter:drafts=2"].about["drafts"] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("oracle", "unknown system 'oracle'; known are: standard, corrective, self-reflective, drafter, extractive"),
        ("speculative:m=3", "expected settings as name=value of drafts, passages_per_draft"),
        ("speculative:drafts=0", "speculative:drafts=0: drafts must be at least 1, got 0"),
        ("speculative:verifier=other", "verifier must be 'given' or 'own'"),
        ("speculative:statement=9", "statement must be 1 to 4"),
        ("standard", "standard: this system needs a language model"),
    ],
)
def test_what_a_name_asks_wrongly_is_said_before_anything_is_computed(parts, name, said):
    with pytest.raises(InvalidInputError) as raised:
        build([name], parts)
    assert said in str(raised.value)


def test_a_model_without_log_probabilities_is_refused_where_they_are_needed():
    silent = ScriptedLM(lambda prompt: ("", "x"), log_probs=False)
    for name in ("corrective", "self-reflective"):
        with pytest.raises(InvalidInputError, match="gives no log-probabilities"):
            build([name], Parts(drafter=silent))
    assert build(["standard"], Parts(drafter=silent))["standard"].about["model"] == "scripted"
    with pytest.raises(InvalidInputError, match="needs a reader as the drafter"):
        build(["extractive-pair"], Parts(drafter=silent))
    with pytest.raises(InvalidInputError, match="named twice"):
        build(["standard", "standard"], Parts(drafter=silent))


# --- what is right ----------------------------------------------------------------------------------------


def test_the_measure_fits_the_question():
    assert measured(RACE, "It was Ada.", abstained=False) == (
        True,
        {"contains": 1.0, "exact_match": 0.0, "f1": pytest.approx(0.5)},
    )
    assert measured(RACE, "", abstained=True)[0] is False
    nothing = replace(RACE, answers=(), unanswerable=True)
    assert measured(nothing, "", abstained=True)[0] is True
    assert measured(nothing, "Ada", abstained=False)[0] is False
    choice = replace(RACE, answers=(), choices=("Ada", "Eve"), correct=(1,))
    assert asked_text(choice) == "who won\nA. Ada\nB. Eve"
    assert measured(choice, "B", abstained=False) == (True, {"choice": 1.0})


def test_an_answer_that_is_a_whole_text_is_compared_by_rouge_too():
    summary = replace(RACE, answers=(" ".join(f"word{i}" for i in range(30)),))
    _, metrics = measured(summary, " ".join(f"word{i}" for i in range(0, 30, 2)), abstained=False)
    assert metrics["rouge_l"] == pytest.approx(2 / 3) and metrics["contains"] == 0.0
    assert "rouge_l" not in measured(RACE, "Ada", abstained=False)[1]


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([], "the data set is empty"),
        ([replace(RACE, answers=())], "lack answers; the first is 'q'"),
        ([replace(RACE, passages=())], "lack passages"),
        ([replace(RACE, choices=("a", "b"))], "lack choices with the right one marked"),
        ([RACE, RACE], "two questions have the id 'q'"),
    ],
)
def test_a_bad_data_set_is_refused_before_a_folder_is_made(tmp_path, questions, said):
    with pytest.raises(InvalidInputError, match=said):
        evaluate({"standard": StandardRAG(model=first_passage_lm())}, questions, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_questions([RACE])


def test_what_is_no_system_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="'mine' must have answer, aanswer, stream and astream"):
        evaluate({"mine": lambda question: "x"}, [RACE], tmp_path / "run")
    with pytest.raises(InvalidInputError, match="no system to evaluate"):
        evaluate({}, [RACE], tmp_path / "run")


# --- the loop ---------------------------------------------------------------------------------------------


def test_real_systems_answer_real_questions_and_nothing_is_asked_twice(tmp_path, parts, short):
    systems = build(["drafter", "extractive-pair"], parts)
    seen = []
    run = evaluate(systems, short, tmp_path / "run", source="demo", progress=lambda *numbers: seen.append(numbers))
    assert seen == [(i, 10) for i in range(1, 11)]
    assert {row.system for row in run.answers} == {"drafter", "extractive-pair"}
    rows = run.of_system("extractive-pair")
    assert sum(row.right for row in rows.values()) >= 4
    first = rows[short[0].id]
    assert first.answer["drafts"][0]["answer"] == first.text and first.answer["drafts"][0]["right"] is first.right
    assert first.usage["drafter"].prompt_tokens > 0 and first.timings["draft"] > 0
    again = evaluate(systems, short, tmp_path / "run", progress=lambda *numbers: seen.append(numbers))
    assert again.answers == run.answers and len(seen) == 10


def test_an_error_of_one_question_is_a_row_and_can_be_asked_again(tmp_path):
    away = [True]

    def reply(prompt: str) -> object:
        return RuntimeError("away") if away and "second" in prompt else ("", "Ada")

    questions = [RACE, replace(RACE, id="r", question="who came second", answers=("Eve",))]
    systems = {"standard": StandardRAG(model=ScriptedLM(reply))}
    run = evaluate(systems, questions, tmp_path / "run")
    assert [(row.id, row.right, "away" in (row.error or "")) for row in run.answers] == [
        ("q", True, False),
        ("r", False, True),
    ]
    assert summarize(run).systems[0].errors == 1
    away.clear()
    assert evaluate(systems, questions, tmp_path / "run").answers == run.answers
    assert [row.error for row in evaluate(systems, questions, tmp_path / "run", retry=True).answers] == [None, None]


def test_another_order_begins_each_question(tmp_path):
    systems = {name: StandardRAG(model=first_passage_lm()) for name in "abc"}
    passages = (Passage("passage 1 won."),)
    questions = [replace(RACE, id=str(i), passages=passages) for i in range(3)]
    evaluate(systems, questions, tmp_path / "run")
    lines = (tmp_path / "run" / ANSWERS_FILE).read_text().splitlines()
    assert "".join(json.loads(line)["system"] for line in lines) == "abcbcacab"


def test_a_run_that_was_killed_goes_on_with_nothing_lost_or_doubled(tmp_path):
    code = f"""
import time
from specrag.baselines import StandardRAG
from specrag.evaluation.run import evaluate
from tests.fakes import ScriptedLM
from tests.test_evaluation_run import twenty
evaluate({{"standard": StandardRAG(model=ScriptedLM(lambda prompt: ("", "Ada"), delay=lambda text: 0.05))}},
         twenty(), {str(tmp_path / "run")!r})
"""
    file = tmp_path / "run" / ANSWERS_FILE
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while (not file.exists() or file.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = Run.load(tmp_path / "run").answers
    assert 3 <= len(before) < 20
    asked = ScriptedLM(lambda prompt: ("", "Ada"))
    run = evaluate({"standard": StandardRAG(model=asked)}, twenty(), tmp_path / "run")
    assert run.answers[: len(before)] == before
    assert [row.id for row in run.answers] == [question.id for question in twenty()]
    assert len(asked.generate_calls) == 20 - len(before)


def twenty() -> list[Question]:
    return [replace(RACE, id=str(i)) for i in range(20)]


# --- figures ----------------------------------------------------------------------------------------------


def written(tmp_path) -> Run:
    """A run of two systems over four questions, with known rows."""
    questions = [replace(RACE, id=f"q{i}") for i in range(4)]

    def row(system, i, right, **given):
        drafts = [{"answer": "x", "right": right, "score": -1.0 * i}, {"answer": "y", "right": i == 3, "score": -9.0}]
        made = {"seconds": 1.0 + i, "timings": {"draft": 0.5}, "usage": {"drafter": Usage(100, 10)}}
        made |= {"metrics": {"f1": float(right)}, "answer": {"drafts": drafts}}
        return AnswerRow(system=system, id=f"q{i}", right=right, **(made | given))

    rows = [row("a", i, right) for i, right in enumerate((True, True, False, False))]
    rows += [row("b", i, i == 0, confidence=0.9 - i / 10) for i in range(2)]
    rows += [row("b", 2, False, abstained=True), row("b", 3, False, answer=None, error="away")]
    info = RunInfo.about(questions, {"a": {}, "b": {}})
    with writing_run(tmp_path / "run", info, questions) as log:
        for one in rows:
            log.append(one)
    return Run.load(tmp_path / "run")


def test_figures_of_known_rows(tmp_path):
    summary = summarize(written(tmp_path))
    a, b = summary.systems
    assert (a.system, a.questions, a.errors, a.accuracy, a.abstained) == ("a", 4, 0, 0.5, 0.0)
    assert a.interval[0] < 0.5 < a.interval[1]
    assert a.metrics == {"f1": 0.5}
    assert (a.draft_coverage, a.verifier_efficiency) == (0.75, pytest.approx(2 / 3))
    assert a.selective_area == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4)
    assert a.seconds == {"p50": 2.5, "p95": pytest.approx(3.85)}
    assert a.stages["draft"] == {"p50": 0.5, "p95": 0.5, "mean": 0.5}
    assert a.tokens == {"drafter": {"prompt": 100, "completion": 10}}
    assert (b.errors, b.accuracy, b.abstained, b.selective_accuracy) == (1, 0.25, 0.25, 0.5)
    # Most confident first, and the abstention and the failure last: right, wrong, wrong, wrong.
    assert b.selective_area == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    (pair,) = summary.comparisons
    assert (pair.names, pair.won, pair.lost, pair.p, pair.noise) == (("a", "b"), 1, 0, 1.0, True)
    assert "noise" in str(pair)


def test_where_no_answer_is_right_the_interval_still_has_a_width(tmp_path):
    questions = [replace(RACE, id=str(i)) for i in range(10)]
    with writing_run(tmp_path, RunInfo.about(questions, {"a": {}}), questions) as log:
        for question in questions:
            log.append(AnswerRow(system="a", id=question.id, right=False))
    (system,) = summarize(Run.load(tmp_path)).systems
    assert system.interval == wilson_interval(0, 10) and system.interval[1] > 0.2


def test_a_run_without_answers_has_no_figures(tmp_path):
    with writing_run(tmp_path, RunInfo.about([RACE], {"a": {}}), [RACE]):
        pass
    with pytest.raises(InvalidInputError, match="has no answer yet"):
        summarize(Run.load(tmp_path))


def test_the_figures_are_shown_written_and_drawn(tmp_path):
    run = written(tmp_path)
    summary = summarize(run)
    quality, cost = summary_tables(summary)
    assert quality.row_count == cost.row_count == 2
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(quality, cost)
    text = shown.export_text()
    assert "95 %" in text and "drafter tokens" in text and "(1 failed)" in text and "…" not in text
    summary.save(run.folder)
    told = json.loads((run.folder / SUMMARY_FILE).read_text())
    assert [one["system"] for one in told["systems"]] == ["a", "b"] and told["comparisons"][0]["noise"] is True
    for file in plot(summary, run.folder):
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5_000
