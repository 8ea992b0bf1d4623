"""``specrag eval``: a run from the command line, and what is refused before a model loads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import specrag.models
from specrag.cli import app
from specrag.cli.evaluate import NAMES, show_comparisons
from specrag.evaluation.data import save_questions
from specrag.evaluation.runs import Run
from specrag.evaluation.statistics import Comparison
from specrag.evaluation.systems import SYSTEMS
from specrag.retrieval import PassageIndex
from tests.fakes import shortened

run = CliRunner().invoke


@pytest.fixture
def loaded(monkeypatch, minilm, reader):
    """Models loaded once in place of a new load for each command."""
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: {"minilm": minilm}.get(name, reader))


@pytest.fixture(scope="module")
def data(tmp_path_factory, questions):
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    save_questions([replace(q, passages=tuple(shortened(q.passages[:3])), gold=()) for q in questions[:4]], file)
    return file


def test_the_help_names_every_system():
    assert list(SYSTEMS) == NAMES.split(", ")


def test_systems_are_measured_side_by_side_and_the_run_goes_on(loaded, data, tmp_path, questions):
    asked = ["eval", str(data), "--systems", "drafter,speculative:drafts=2", "--skip", "1", "--limit", "2"]
    result = run(app, [*asked, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for shown in ("drafter", "speculative:drafts=2", "of answered", "McNemar p =", "2 questions"):
        assert shown in result.stdout
    made = Run.load(tmp_path / "run")
    assert [question.id for question in made.questions] == [question.id for question in questions[1:3]]
    assert len(made.answers) == 4
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["systems"]) == 2
    assert {"accuracy.png", "stages.png"} <= {file.name for file in (tmp_path / "run").iterdir()}
    more = run(app, [*asked, "--out", str(tmp_path / "run"), "--seed", "1"])
    assert more.exit_code == 1 and "holds another run" in more.stderr and "seed: 0 there, 1 now" in more.stderr
    again = run(app, [*asked, "--out", str(tmp_path / "run"), "--rescore", "draft", "--rescore", "listwise"])
    assert again.exit_code == 0 and Run.load(tmp_path / "run").answers == made.answers
    shown = [system["system"] for system in json.loads((tmp_path / "run" / "summary.json").read_text())["systems"]]
    assert shown[2:] == ["speculative:drafts=2 by draft"]
    assert "listwise left out" in again.stderr and "have no score listwise" in again.stderr


def test_of_many_pairs_of_systems_those_that_differ_are_shown(capsys):
    def pair(number, p):
        return Comparison(("first", f"other-{number}"), 0.1, 0.0, 0.2, p, "McNemar", 9, 1, 50)

    few, many = [pair(i, 0.5) for i in range(6)], [pair(i, 0.01 if i == 3 else 0.5) for i in range(10)]
    show_comparisons(few)
    shown = capsys.readouterr().out
    assert all(f"other-{i}" in shown for i in range(6))
    show_comparisons(many)
    shown = " ".join(capsys.readouterr().out.split())
    assert "first is better" in shown and "other-3" in shown and "other-4" not in shown
    assert "9 of 10 pairs of systems differ by noise: see summary.json" in shown


def test_passages_come_from_an_index(loaded, data, minilm, questions, tmp_path):
    index = PassageIndex(minilm)
    index.add(questions[0].passages)
    index.save(tmp_path / "index")
    asked = ["eval", str(data), "--systems", "drafter", "--limit", "1", "--out", str(tmp_path / "run")]
    result = run(app, [*asked, "--retrieve", str(tmp_path / "index"), "--top", "3"])
    assert result.exit_code == 0, result.output
    (question,) = Run.load(tmp_path / "run").questions
    assert len(question.passages) == 3 and question.passages[0].score is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.jsonl"], "no file or folder at /nowhere.jsonl"),
        (["DATA", "--systems", "oracle"], "unknown system 'oracle'; known are: standard"),
        (["DATA", "--systems", "drafter:speed=1"], "expected settings as name=value"),
        (["DATA", "--format", "squad"], "line 1"),
        (["DATA", "--format", "excel"], "unknown format 'excel'"),
        (["DATA", "--skip", "9"], "--skip 9 leaves no question"),
        (["DATA", "--retrieve", "/tmp"], "no index at /tmp"),
        (["DATA", "--tokenizer", "smollm2"], "--tokenizer is that of a model on --server: leave it out"),
        (["DATA", "--rescore", "beauty"], "unknown scores ['beauty']: choose among draft"),
        (["DATA", "--systems", "drafter", "--rescore", "draft"], "--rescore chooses among the drafts of a speculative"),
        (["DATA", "--systems", "standard"], "standard: this system needs a language model"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_asked(loaded, data, tmp_path, arguments, message):
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    result = run(app, ["eval", *given, "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_record_without_answers_and_an_empty_file_are_refused(loaded, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "question": "who?", "answers": ["Ada"]}\n')
    result = run(app, ["eval", str(file), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "lack passages (retrieve some for them first)" in result.stderr
    file.write_text("")
    assert "no questions" in run(app, ["eval", str(file), "--out", str(tmp_path / "run")]).stderr
