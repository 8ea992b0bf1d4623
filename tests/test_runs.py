"""The folder of one run of an evaluation: rows are kept at once, and a killed run goes on with nothing doubled."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from specrag._files import turn_of
from specrag.errors import InvalidInputError, NotFoundError
from specrag.evaluation.records import Question
from specrag.evaluation.runs import ANSWERS_FILE, RUN_FILE, AnswerRow, Run, RunInfo, digest_of, writing_run
from specrag.schema import Passage, Usage

QUESTIONS = [
    Question(
        f"q{i}", f"who won race {i}", (f"Ada {i}",), (Passage(f"Ada {i} won race {i}.", title="Races"),), gold=(0,)
    )
    for i in range(3)
]
INFO = RunInfo.about(QUESTIONS, {"standard": {"model": "m"}}, source="races.jsonl", settings={"seed": 0})


def row(i: int = 0, system: str = "standard", **changes) -> AnswerRow:
    given = AnswerRow(
        system=system,
        id=f"q{i}",
        text=f"Ada {i}",
        right=True,
        metrics={"f1": 1.0},
        seconds=1.5,
        timings={"draft": 1.25},
        usage={"verifier": Usage(10, 3)},
        answer={"notes": []},
    )
    return replace(given, **changes)


def test_what_is_written_is_read_again(tmp_path):
    written = [row(0), row(1, error="ModelError: gone", answer=None, text="", right=False)]
    with writing_run(tmp_path / "run", INFO, QUESTIONS) as log:
        for one in written:
            log.append(one)
    run = Run.load(tmp_path / "run")
    assert list(run.answers) == written
    assert list(run.questions) == QUESTIONS and run.questions[0].passages == QUESTIONS[0].passages
    assert run.info == INFO
    assert run.of_system("standard") == {"q0": written[0], "q1": written[1]}


def test_a_row_of_a_long_context_has_its_own_part(tmp_path):
    made = row(answer=None, rapid={"pieces": [["Ada", "accepted"]], "acceptance": 0.5})
    assert "answer" not in made.to_row() and AnswerRow.of(made.to_row()) == made
    assert "rapid" not in row().to_row()


def test_a_number_that_json_lacks_becomes_null():
    made = row(confidence=float("-inf"), answer={"drafts": [{"score": float("nan")}]}).to_row()
    assert made["confidence"] is None and made["answer"] == {"drafts": [{"score": None}]}


def test_a_half_written_line_is_cut_off_and_the_run_goes_on(tmp_path):
    with writing_run(tmp_path, INFO, QUESTIONS) as log:
        log.append(row(0))
    with (tmp_path / ANSWERS_FILE).open("ab") as file:
        file.write(json.dumps(row(1).to_row()).encode()[:40])
    assert [r.id for r in Run.load(tmp_path).answers] == ["q0"]
    with writing_run(tmp_path, INFO, QUESTIONS) as log:
        assert set(log.done) == {("standard", "q0")}
        log.append(row(1))
    assert (tmp_path / ANSWERS_FILE).read_text().count("\n") == 2
    assert [r.id for r in Run.load(tmp_path).answers] == ["q0", "q1"]


def test_a_killed_writer_leaves_what_it_wrote(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(tmp_path)!r})
from tests.test_runs import INFO, QUESTIONS, row
from specrag.evaluation.runs import writing_run
with writing_run({str(tmp_path / "run")!r}, INFO, QUESTIONS) as log:
    log.append(row(0)); log.append(row(1))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with writing_run(tmp_path / "run", INFO, QUESTIONS) as log:
        assert set(log.done) == {("standard", "q0"), ("standard", "q1")}


def test_no_question_is_answered_twice_but_a_failed_one_may_be_asked_again(tmp_path):
    with writing_run(tmp_path, INFO, QUESTIONS) as log:
        log.append(row(0))
        with pytest.raises(InvalidInputError, match="has answered question 'q0' already"):
            log.append(row(0))
        log.append(row(1, error="gone"))
        log.append(row(1))
    assert [r.error for r in Run.load(tmp_path).answers] == [None, None]


def test_another_run_is_refused_with_what_differs(tmp_path):
    with writing_run(tmp_path, INFO, QUESTIONS):
        pass
    others = {
        "settings.seed: 0 there, 1 now": replace(INFO, settings={"seed": 1}),
        "standard.model: 'm' there, 'n' now": replace(INFO, systems={"standard": {"model": "n"}}),
        "data.questions: 3 there, 2 now": RunInfo.about(QUESTIONS[:2], INFO.systems, settings=INFO.settings),
    }
    for said, other in others.items():
        with pytest.raises(InvalidInputError, match="holds another run") as raised, writing_run(tmp_path, other, []):
            pass
        assert said in str(raised.value)
    changed = [replace(QUESTIONS[0], answers=("Eve",)), *QUESTIONS[1:]]
    assert digest_of(changed) != digest_of(QUESTIONS)


def test_a_run_that_does_not_tell_its_embedder_may_go_on(tmp_path):
    with writing_run(tmp_path, INFO, QUESTIONS):
        pass
    told = {name: {**INFO.systems["standard"], "embedder": name} for name in ("minilm", "mpnet")}
    with writing_run(tmp_path, replace(INFO, systems={"standard": told["minilm"]}), QUESTIONS) as log:
        log.append(row(0))
    other = tmp_path / "other"
    with writing_run(other, replace(INFO, systems={"standard": told["minilm"]}), QUESTIONS):
        pass
    another = replace(INFO, systems={"standard": told["mpnet"]})
    said = "standard.embedder: 'minilm' there, 'mpnet' now"
    with pytest.raises(InvalidInputError, match=said), writing_run(other, another, QUESTIONS):
        pass


def test_a_system_may_join_and_the_others_stay(tmp_path):
    with writing_run(tmp_path, INFO, QUESTIONS) as log:
        log.append(row(0))
    more = replace(INFO, systems={"drafter": {"model": "d"}})
    with writing_run(tmp_path, more, QUESTIONS) as log:
        log.append(row(0, system="drafter"))
    assert set(Run.load(tmp_path).info.systems) == {"standard", "drafter"}
    assert len(Run.load(tmp_path).answers) == 2


def test_one_writer_at_a_time(tmp_path):
    with turn_of(tmp_path / "run"), pytest.raises(InvalidInputError, match="another process writes the run"):
        writing_run(tmp_path, INFO, QUESTIONS).__enter__()


def test_wrong_folders_and_files_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no run of an evaluation"):
        Run.load(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"holds other files \(notes.txt\)"), writing_run(tmp_path, INFO, []):
        pass
    with pytest.raises(InvalidInputError, match="is a file"), writing_run(tmp_path / "notes.txt", INFO, []):
        pass
    with pytest.raises(InvalidInputError, match="two questions have the id 'q0'"):
        writing_run(tmp_path / "run", INFO, [QUESTIONS[0], QUESTIONS[0]]).__enter__()
    with writing_run(tmp_path / "run", INFO, QUESTIONS) as log:
        log.append(row(0))
        log.append(row(1))
    lines = (tmp_path / "run" / ANSWERS_FILE).read_text().splitlines()
    (tmp_path / "run" / ANSWERS_FILE).write_text("\n".join([lines[0][:30], lines[1], ""]))
    with pytest.raises(InvalidInputError, match=r"answers\.jsonl, line 1"):
        Run.load(tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text(
        '{"version": 9, "data": {}, "systems": {}, "settings": {}, "versions": {}}'
    )
    with pytest.raises(InvalidInputError, match="has version 9"):
        Run.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1], "expected a row of answers"),
        ({"system": "s", "id": "q"}, "lacks text, right"),
        ({"system": "s", "id": "q", "text": "", "right": True, "speed": 1}, "unknown fields speed"),
        ({"system": "s", "id": "q", "text": "", "right": True, "usage": {"drafter": 3}}, "'usage' must be roles"),
    ],
)
def test_a_row_that_is_none_is_named(given, said):
    with pytest.raises(InvalidInputError, match=said):
        AnswerRow.of(given)
