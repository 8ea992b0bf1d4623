"""``specrag eval`` over long documents: the run, and what is refused before a model loads."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import specrag.models
from specrag.cli import app, evaluate_long
from specrag.evaluation.data import load, save_questions
from specrag.evaluation.runs import Run
from tests.fakes import HashEmbedder

run = CliRunner().invoke
MT_BENCH_101 = Path(__file__).parent / "data" / "formats" / "mt_bench_101.jsonl"
TARGET = ("--target", "smollm2")


@pytest.fixture
def loaded(monkeypatch, tiny, other):
    """Tiny models in place of the bundled ones."""
    models = {"smollm2": tiny, "smollm2-rag-drafter": other, "minilm": HashEmbedder()}
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: models[name])


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(specrag.models, "bundled", lambda *args, **options: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, questions):
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    save_questions([replace(question, context="") for question in questions if question.gold], file)
    return file


def test_documents_are_made_systems_measured_and_a_run_goes_on(loaded, data, tmp_path):
    names = "long-context,rapid-self-10:candidates=2,rapid-upward-0"
    asked = ["eval", str(data), "--systems", names, *TARGET, "--drafter", "smollm2-rag-drafter", "--max-tokens", "4"]
    asked += ["--documents", "900", "--documents", "1800", "--depth", "0.5", "--out", str(tmp_path / "run")]
    result = run(app, [*asked, "--limit", "1"])
    assert result.exit_code == 0, result.output
    for shown in ("tokens/s", "rescued", "rapid-upward-0", "2 questions", "length.png"):
        assert shown in result.stdout, shown
    made = Run.load(tmp_path / "run")
    short, long = made.questions
    assert (short.id, long.id) == tuple(f"{load(data)[0].id}@{tokens}" for tokens in (900, 1800))
    assert short.metadata["tokens"] <= 900 - 156 and long.metadata["depth"] == 0.5
    said = {row.key: row for row in made.answers}
    assert len(said) == 6 and not any(row.error for row in made.answers)
    assert said["rapid-upward-0", long.id].text == said["long-context", long.id].text
    read = said["long-context", long.id].rapid["document_tokens"]
    assert read == pytest.approx(long.metadata["tokens"], abs=2)  # the prompt may join its last token to others
    assert made.info.settings == {"seed": 0, "documents": [900, 1800], "depth": 0.5, "share": 1}
    assert made.info.systems["rapid-self-10:candidates=2"]["rapid"]["candidates"] == 2
    assert made.info.systems["long-context"]["embedder"] == HashEmbedder().name
    again = run(app, [*asked, "--limit", "1"])
    assert again.exit_code == 0 and Run.load(tmp_path / "run").answers == made.answers
    other = run(app, [*asked, "--limit", "1", "--seed", "1"])
    assert other.exit_code == 1 and "holds another run" in other.stderr


def test_a_run_that_goes_on_counts_the_answers_that_are_there(loaded, data, tmp_path, monkeypatch):
    asked = ["eval", str(data), *TARGET, "--max-tokens", "4", "--limit", "2"]
    asked += ["--documents", "900", "--out", str(tmp_path / "run"), "--systems"]
    assert run(app, [*asked, "rapid-self-0"]).exit_code == 0  # of another system, which does not count
    asked += ["long-context,rag"]
    assert run(app, asked).exit_code == 0
    answers = tmp_path / "run" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:3]))
    told = []
    monkeypatch.setattr(evaluate_long, "counting", lambda doing: nullcontext(lambda *counts: told.append(counts)))
    assert run(app, asked).exit_code == 0
    assert told == [(2, 4), (3, 4), (4, 4)]


def test_questions_about_a_file_and_a_dialogue_about_it(loaded, tmp_path):
    (tmp_path / "race.txt").write_text("Ada won the race. Eve came second. " * 20)
    rows = [{"id": "one", "question": "who won?", "answers": ["Ada"], "document": "race.txt"}]
    rows += [{"id": "two", "turns": [{"question": "who won?", "answers": ["Ada"]}, {"question": "and after her?",
             "reply": "Eve came second."}], "document": "race.txt"}]  # fmt: skip
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["eval", str(file), "--systems", "long-context,rag", *TARGET, "--max-tokens", "4"]
    result = run(app, [*asked, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    made = Run.load(tmp_path / "run")
    assert [question.id for question in made.questions] == ["one", "two/1", "two/2"]
    read = {row.id: row.usage["target"].prompt_tokens for row in made.answers if row.system == "long-context"}
    assert read["one"] == read["two/1"] < read["two/2"]  # the second turn comes after the first


def test_a_document_that_is_too_long_for_the_model_fails_alone(loaded, tmp_path):
    rows = [{"id": "long", "question": "who?", "answers": ["Ada"], "context": "Ada won. " * 4000}]
    rows += [{"id": "short", "question": "who?", "answers": ["Ada"], "context": "Ada won. " * 40}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["eval", str(file), "--systems", "long-context", *TARGET, "--max-tokens", "4"]
    result = run(app, [*asked, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0 and "1 of 2 answers failed" in result.stderr
    failed, made = Run.load(tmp_path / "run").answers
    assert failed.id == "long" and "8192 positions" in failed.error and made.id == "short" and made.error is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "rapid"], "unknown system 'rapid'; known are: standard"),
        (
            ["--systems", "rag,standard", *TARGET],
            "over passages (standard) and over long documents (rag) need two runs",
        ),
        (["--systems", "rag"], "need --target: the model that reads the document"),
        (["--systems", "rag", *TARGET], "questions lack a document (`context`, or the path of a file"),
        (["--systems", "rag-upward", *TARGET, "--documents", "900"], "these systems need a drafter: rag-upward"),
        (["--systems", "rapid-self-5:tail=x", *TARGET, "--documents", "900"], "rapid-self-5:tail=x: tail"),
        (["--systems", "rag", *TARGET, "--verifier", "m"], "--verifier: only for systems over passages"),
        (["--systems", "speculative", "--documents", "900"], "--documents: only for systems over long documents"),
        (["--systems", "rag", *TARGET, "--depth", "0.5"], "--depth and --share are those of documents that are made"),
        (["--systems", "rag", *TARGET, "--documents", "900", "--depth", "deep"], "--depth must be a number in [0, 1]"),
        (["--systems", "rag", *TARGET, "--documents", "900", "--depth", "2"], "--depth must be a number in [0, 1]"),
        (["--systems", "rag", *TARGET, "--documents", "10"], "10 tokens leave no room for a document"),
        (["--systems", "rag", *TARGET, "--documents", "900", "--sessions", __file__], "is a file: give a folder"),
        (["--systems", "rag", "--target", "minilm-reader", "--documents", "900"], "'minilm-reader' writes nothing"),
        (["--systems", "rag", "--target", "/nowhere", "--documents", "900"], "no target at /nowhere"),
        (["--systems", "rag", *TARGET, "--documents", "900", "--drafter", "a", "--drafter", "b"], "one drafter"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(unloaded, data, tmp_path, arguments, message):
    result = run(app, ["eval", str(data), *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_run_should_be_is_refused_before_a_model_is_loaded(unloaded, data):
    result = run(app, ["eval", str(data), "--systems", "rag", *TARGET, "--documents", "900", "--out", str(data)])
    assert result.exit_code == 1 and f"{data} is a file: give a folder" in " ".join(result.stderr.split())


def test_dialogues_of_mt_bench_101_need_a_document(unloaded, tmp_path):
    asked = ["eval", str(MT_BENCH_101), "--systems", "rag", *TARGET, "--out", str(tmp_path / "run")]
    result = run(app, asked)
    assert result.exit_code == 1 and "2 of 2 questions lack a document" in " ".join(result.stderr.split())
