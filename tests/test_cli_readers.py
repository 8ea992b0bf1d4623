"""`specrag ask`, `demo` and `calibrate` with span readers: by name, by folder, pooled, with confidence."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from specrag.cli import ABSTAINED, app
from specrag.evaluation.calibration import calibration_examples, held_out_error
from specrag.evaluation.data import Question, save_questions
from specrag.models.bundled import load_reader
from specrag.models.reader import load_encoder
from specrag.schema import Passage
from specrag.speculative.confidence import Calibration
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.training import ReaderSettings, make_reader_examples, train_reader
from tests.fakes import HashEmbedder, ScriptedLM, ScriptedReader
from tests.reader_parts import reader_in_place, records, tiny_base

run = CliRunner().invoke


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for record in records(6):
        (folder / f"{record.id}.txt").write_text(record.passages[0].text)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A reader that was trained a little: right on some records."""
    folder = tmp_path_factory.mktemp("own")
    base = tiny_base(folder / "tiny-encoder")
    rounds = make_reader_examples(records(), HashEmbedder(), rounds=8)
    settings = ReaderSettings(learning_rate=3e-3, rows=16, max_tokens=64)
    return train_reader(*load_encoder(base), rounds, folder / "own-reader", settings=settings, base=str(base))


def asked(docs: Path, *more: str, question: str = "who built tower 4") -> dict:
    result = run(app, ["ask", question, "--docs", str(docs), "--json", *more])
    assert result.exit_code in (0, ABSTAINED), result.output
    return json.loads(result.stdout)


# --- ask and demo ---------------------------------------------------------------------------------------


def test_the_bundled_reader_answers_by_its_name(docs, tmp_path, monkeypatch):
    reader_in_place(tmp_path, monkeypatch)
    answer = asked(docs, "--drafter", "minilm-reader", "--drafts", "3")
    assert answer["text"] and {v["draft"]["drafter"] for v in answer["verdicts"]} == {"minilm-reader"}
    assert len(answer["verdicts"]) <= 3 and answer["scores_used"] == ["draft"]
    shown = run(app, ["demo", "--questions", "1", "--drafter", "minilm-reader"])
    assert shown.exit_code == 0 and "of 1 right" in shown.stdout
    assert "log ρ_draft" in shown.stdout and "log ρ_SC" not in shown.stdout


def test_a_readers_folder_and_any_question_answering_encoder_are_drafters(docs, own):
    trained = asked(docs, "--drafter", str(own))
    assert trained["verdicts"][0]["draft"]["drafter"] == "own-reader"
    untrained = asked(docs, "--drafter", str(own.parent / "tiny-encoder"))
    assert untrained["verdicts"] and untrained["scores_used"] == ["draft"]
    pair = asked(docs, "--drafter", str(own.parent / "tiny-encoder"), "--verifier", str(own))
    assert pair["scores_used"] == ["draft", "span"]


def test_several_drafters_are_pooled(docs, own, tiny_path):
    both = ["--drafter", str(own), "--drafter", str(tiny_path), "--drafts", "2"]
    answer = asked(docs, *both, question="which is taller, tower 4 or tower 3")  # no span says so: both draft
    assert {v["draft"]["drafter"] for v in answer["verdicts"]} >= {str(tiny_path), "own-reader"}
    shown = run(app, ["ask", "is tower 4 tall", "--docs", str(docs), "--explain", *both])
    assert shown.exit_code in (0, ABSTAINED) and "log ρ_SC" in shown.stdout


def calibrated(file: Path, drafter: str, verifier: str = "", mode: str = "pointwise", bias: float = 0.0) -> str:
    Calibration((drafter,), verifier, mode, {"draft": 0.0}, bias, 100, 0.5).save(file)
    return str(file)


def test_confidence_is_shown_and_decides(docs, own, tmp_path):
    file = calibrated(tmp_path / "mine.json", "own-reader")
    answer = asked(docs, "--drafter", str(own), "--calibration", file)
    assert answer["confidence"] == 0.5 and not answer["abstained"]
    unsure = asked(docs, "--drafter", str(own), "--calibration", file, "--min-confidence", "0.6")
    assert unsure["abstained"] and "the confidence is too low: 0.50 < 0.60" in unsure["reason"]
    command = ["ask", "who built tower 4", "--docs", str(docs), "--drafter", str(own), "--calibration", file]
    assert "confidence of this answer: 0.50" in run(app, command).stdout


def test_in_doubt_the_verifier_answers_itself(docs, own, tiny_path, tmp_path):
    file = calibrated(tmp_path / "mine.json", "own-reader", tiny_path.name, "listwise", bias=-9.0)
    with_verifier = ["--drafter", str(own), "--verifier", str(tiny_path), "--calibration", file]
    answer = asked(docs, *with_verifier, "--escalate", "passages")
    assert answer["escalated"] == "passages" and answer["read"] and answer["timings"]["escalate"] > 0
    assert asked(docs, *with_verifier, "--escalate", "passages", "--escalate-below", "0")["escalated"] is None
    command = ["ask", "who built tower 4", "--docs", str(docs), *with_verifier, "--escalate", "standard", "--explain"]
    shown = run(app, command)
    assert "the verifier answered itself, from passages 1, 2, 3, 4, 5, 6" in " ".join(shown.stdout.split())
    assert "log ρ_L" in shown.stdout and "escalate" in shown.stdout


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--min-confidence", "0.5"], 1, "min_confidence needs a calibration, and none ships for own-reader"),
        (["--escalate", "passages"], 1, "escalate needs a verifier that is a language model"),
        (["--escalate", "always"], 2, "is not one of 'passages', 'standard'"),
        (["--min-confidence", "2"], 2, "less than or equal to 1"),
        (["--calibration", "/nowhere.json"], 1, "no calibration at /nowhere.json: make one with `specrag calibrate`"),
        (
            ["--calibration", "OTHER"],
            1,
            "the calibration was made for other verified by nobody (pointwise), not for own",
        ),
        (["--calibration", "DATA"], 1, "is not a calibration"),
        (["--tokenizer", "some/model"], 1, "--tokenizer is that of a model on --server: leave it out"),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_line(docs, own, tmp_path, more, code, message):
    calibrated(tmp_path / "other.json", "other")
    (tmp_path / "data.json").write_text('{"question": "who"}')
    files = {"OTHER": str(tmp_path / "other.json"), "DATA": str(tmp_path / "data.json")}
    command = ["ask", "who?", "--docs", str(docs), "--drafter", str(own), *(files.get(word, word) for word in more)]
    result = run(app, command)
    assert result.exit_code == code and message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_answers_without_a_confidence_say_so_on_stderr(docs, own, tmp_path):
    """A second reader, or one that verifies, has no calibration: the default abstention is off."""
    said = "no confidence, and no abstention in doubt: no calibration for"
    command = ["ask", "who built tower 4", "--docs", str(docs), "--json", "--drafter", str(own)]
    for more in ([], ["--drafter", str(own)], ["--verifier", str(own)]):
        result = run(app, [*command, *more])
        assert said in " ".join(result.stderr.split()) and json.loads(result.stdout)["confidence"] is None
    calibrated(tmp_path / "own.json", own.name)
    assert said not in run(app, [*command, "--calibration", str(tmp_path / "own.json")]).stderr


# --- calibrate ------------------------------------------------------------------------------------------


def asked_about(count: int) -> list[Question]:
    """Records with three passages each, the gold one among them."""
    made = records(24)
    return [
        dataclasses.replace(
            made[i % 24], id=str(i), passages=tuple(made[(i + step) % 24].passages[0] for step in (0, 5, 1 + i % 3))
        )
        for i in range(count)
    ]


def test_a_calibration_of_ones_own_models_is_fitted_checked_and_used(own, docs, tmp_path):
    save_questions(asked_about(72), tmp_path / "questions.jsonl")
    file = tmp_path / "mine.json"
    command = ["calibrate", str(tmp_path / "questions.jsonl"), "--out", str(file), "--drafter", str(own)]
    result = run(app, command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "72 answers of own-reader, verified by nobody, pointwise" in said
    found = re.search(r"held-out half: 36 answers, ([\d.]+)% right, .* calibration error ([\d.]+) \(3 bins\)", said)
    assert found and 0 < float(found[1]) < 100 and 0 <= float(found[2]) < 0.35
    chance = re.search(r"chance alone causes an error of ([\d.]+) on average", said)
    assert chance and 0 < float(chance[1]) < 0.35
    made = Calibration.load(file)
    assert made.fits(["own-reader"], "", "pointwise") and made.questions == 72
    answer = asked(docs, "--drafter", str(own), "--calibration", str(file))
    assert 0 < answer["confidence"] < 1


@pytest.mark.parametrize(
    ("count", "more", "message"),
    [
        (49, [], "a calibration needs at least 50 questions, got 49"),
        (60, ["--count", "20"], "a calibration needs at least 50 questions, got 20"),
        (60, ["--out", "/nowhere/mine.json"], "no folder /nowhere to write mine.json to"),
        (60, ["--drafter", "/nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_calibrated_is_one_clear_line(tmp_path, count, more, message):
    save_questions(asked_about(count), tmp_path / "questions.jsonl")
    command = ["calibrate", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "mine.json"), *more]
    result = run(app, command)
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "mine.json").exists()


def test_questions_without_a_choice_are_left_out_and_those_without_answers_are_never_right():
    passages = (Passage("It opened in 1889."),)
    asked_ = [
        Question("1", "when", ("1889",), passages),
        Question("2", "when", (), passages, unanswerable=True),
        Question("3", "when", ("1889",), (Passage("Nothing."),)),
    ]
    steps = []
    rag = SpeculativeRAG(drafter=ScriptedReader({"1889": 0.5}), embedder=HashEmbedder())
    made = calibration_examples(rag, asked_, progress=lambda done, total: steps.append((done, total)))
    assert [right for _, right in made] == [True, False] and steps == [(1, 3), (2, 3), (3, 3)]
    assert made[0][0]["draft"] == pytest.approx(-0.6931, abs=1e-3)
    abstaining = SpeculativeRAG(
        drafter=ScriptedLM(lambda prompt: ("because", "not in the passages")), embedder=HashEmbedder()
    )
    assert calibration_examples(abstaining, asked_[:1]) == []


def test_the_error_of_the_held_out_half_is_that_of_a_fit_on_the_other():
    random = np.random.default_rng(5)
    scores = random.normal(size=2000)
    followed = [({"draft": float(score)}, bool(random.random() < 1 / (1 + np.exp(-score)))) for score in scores]
    held = held_out_error(followed)
    assert held is not None and held.questions == 1000 and held.bins == 10
    assert held.error < 0.06 and held.confidence == pytest.approx(held.right, abs=0.03)
    unlike = [({"draft": float(score)}, bool(abs(score) > 1)) for score in scores]  # no logistic curve is like this
    assert held_out_error(unlike).error > 0.2
    assert held_out_error([({"draft": 0.0}, True)] * 60) is None


def test_a_tiny_own_reader_is_loaded_as_it_was_trained(own):
    assert load_reader(own).longest == ReaderSettings.longest
