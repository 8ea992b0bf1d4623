"""`specrag batch`: a file of questions into a file of answers; a killed run loses nothing and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import specrag.models
from specrag.cli import app, loading
from specrag.errors import ModelError
from specrag.retrieval import PassageIndex
from tests.fakes import HashEmbedder, ScriptedLM
from tests.serving_parts import RADIUM, index_of

run = CliRunner().invoke
QUESTIONS = ["when was radium discovered", "where did the radium institute open", "who discovered radioactivity"]


@pytest.fixture
def loaded(monkeypatch, minilm, reader):
    """Models loaded once in place of a new load for each command."""
    models = {"minilm": minilm, "minilm-reader": reader}
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: models[name])


@pytest.fixture
def index(tmp_path, minilm):
    index_of(RADIUM, minilm).save(tmp_path / "index")
    assert PassageIndex.is_saved_at(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def questions(tmp_path):
    rows = [{"id": f"q{at}", "question": question} for at, question in enumerate(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_each_question_gets_its_answer_once(loaded, index, questions, tmp_path):
    to = tmp_path / "answers.jsonl"
    made = run(app, ["batch", str(questions), "--out", str(to), "--docs", str(index)])
    assert made.exit_code == 0, made.output
    answers = rows(to)
    assert [row["id"] for row in answers] == ["q0", "q1", "q2"] and all(row["error"] is None for row in answers)
    assert answers[0]["text"] == "December 1898" and "Curie" in answers[0]["passages"][0]["text"]
    before = to.read_bytes()
    again = run(app, ["batch", str(questions), "--out", str(to), "--docs", str(index)])
    assert "3 were there, 0 are new" in again.output and to.read_bytes() == before


def test_a_half_written_line_is_cut_off_and_asked_again(loaded, index, questions, tmp_path):
    to = tmp_path / "answers.jsonl"
    options = ["batch", str(questions), "--out", str(to), "--docs", str(index)]
    run(app, options)
    whole = to.read_bytes()
    lines = whole.splitlines(keepends=True)
    to.write_bytes(lines[0] + lines[1][:50])
    made = run(app, options)
    assert made.exit_code == 0 and "1 were there, 2 are new" in made.output
    kept = ("id", "text", "abstained", "passages")
    assert [[row[name] for name in kept] for row in rows(to)] == [
        [json.loads(line)[name] for name in kept] for line in lines
    ]


def test_questions_may_bring_their_passages_and_one_that_cannot_be_answered_stops_nothing(loaded, tmp_path):
    given = [{"question": QUESTIONS[0], "passages": [{"text": RADIUM[0]}]}, {"question": " ", "passages": ["x"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    made = run(app, ["batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert made.exit_code == 0 and "1 questions could not be answered" in made.output
    answers = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in answers] == ["1", "2"]
    assert answers[0]["text"] == "December 1898" and answers[1]["error"] == "the question is empty"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json}\n", "line 1: not JSON"),
        ('{"text": "x"}\n', 'expected an object with "question"'),
        ('{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}\n', "line 2: two questions have the id '1'"),
        ('{"question": "a", "passages": [5]}\n', "passages[0]"),
        ("\n", "holds no question"),
        ('{"question": "a"}\n', "has no passages: give --docs"),
    ],
)
def test_a_file_that_is_no_questions_names_its_line(tmp_path, text, said):
    (tmp_path / "in.jsonl").write_text(text)
    made = run(app, ["batch", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert made.exit_code == 1 and said in made.output and not (tmp_path / "out.jsonl").exists()


def test_without_ray_the_option_says_which_extra_to_install(index, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    to = tmp_path / "answers.jsonl"
    made = run(app, ["batch", str(questions), "--out", str(to), "--docs", str(index), "--ray"])
    assert made.exit_code == 1 and "pip install 'specrag[ray]'" in made.output and not to.exists()


@pytest.mark.parametrize("option", ["--workers", "--worker-gpus"])
def test_options_of_ray_alone_are_refused_without_it(questions, tmp_path, option):
    made = run(app, ["batch", str(questions), "--out", str(tmp_path / "answers.jsonl"), option, "1"])
    assert made.exit_code == 1 and "give --ray too" in made.stderr


def test_another_file_is_not_overwritten(loaded, index, questions):
    made = run(app, ["batch", str(questions), "--out", str(questions), "--docs", str(index)])
    assert made.exit_code == 1 and "line 1: not an answer" in made.output
    assert [row["question"] for row in rows(questions)] == QUESTIONS


def test_failing_models_stop_the_run_and_what_is_answered_stays(loaded, monkeypatch, index, questions, tmp_path):
    calls = []

    def reply(prompt):
        calls.append(prompt)
        return ("It says so.", "1898") if len(calls) == 1 else ModelError("the server is away")

    monkeypatch.setattr(loading, "load_drafting_model", lambda *given: ScriptedLM(reply))
    to = tmp_path / "answers.jsonl"
    options = ["batch", str(questions), "--out", str(to), "--docs", str(index), "--drafter", "smollm2"]
    made = run(app, [*options, "--top", "1"])
    assert made.exit_code == 1 and "the server is away" in made.output
    assert [row["id"] for row in rows(to)] == ["q0"]


@pytest.mark.parametrize(
    "command",
    [
        "batch {asked} --out {to} --docs {index}",
        "ask who? --docs {index}",
        "eval {asked} --out {to} --retrieve {index}",
        "eval {asked} --out {to} --retrieve {own} --second {index} --systems corrective",
    ],
)
def test_an_index_of_another_embedder_is_refused_before_a_drafter_loads(index, tmp_path, monkeypatch, command):
    other = {"minilm": HashEmbedder(16)}
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: other[name])
    (tmp_path / "asked.jsonl").write_text(json.dumps({"id": "1", "question": "who?", "answers": ["x"]}) + "\n")
    index_of(RADIUM, other["minilm"]).save(tmp_path / "own")
    places = {"asked": tmp_path / "asked.jsonl", "to": tmp_path / "to", "index": index, "own": tmp_path / "own"}
    made = run(app, [part.format(**places) for part in command.split()])
    assert made.exit_code == 1 and "use the same embedder or index again" in " ".join(made.output.split())


def test_a_folder_without_an_index_is_refused_with_the_command_that_makes_one(index, questions, tmp_path):
    gone = run(app, ["batch", str(questions), "--out", str(tmp_path / "answers.jsonl"), "--docs", str(tmp_path)])
    assert gone.exit_code == 1 and f"`specrag index DOCUMENTS --to {tmp_path}`" in " ".join(gone.output.split())


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_repeats_nothing(loaded, index, tmp_path):
    many = [{"id": f"q{at}", "question": f"{QUESTIONS[at % 3]} {at}"} for at in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    to = tmp_path / "out.jsonl"
    # With one passage, the rows are smaller than a file's buffer: one that is not flushed is lost.
    command = ["batch", str(tmp_path / "in.jsonl"), "--out", str(to), "--docs", str(index), "--top", "1"]
    child = [sys.executable, "-c", _KILLED, *command]
    killed = subprocess.run(child, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = to.read_bytes()
    assert kept.count(b"\n") == 3 and kept.endswith(b"\n")
    again = run(app, command)
    assert again.exit_code == 0 and "3 were there, 3 are new" in again.output
    assert to.read_bytes().startswith(kept)
    assert sorted(row["id"] for row in rows(to)) == sorted(row["id"] for row in many)


_KILLED = """
import contextlib, os, signal, sys
from specrag.cli import app, batch
appending = batch.appending
@contextlib.contextmanager
def killing(file):
    with appending(file) as (done, append):
        def killed(row):
            append(row)
            if len(done) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        yield done, killed
batch.appending = killing
app(sys.argv[1:])
"""
