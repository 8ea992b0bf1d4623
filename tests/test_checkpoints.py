"""Checkpoints: which a repeated run goes on from, whose they are, and what kills and damage do to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from specrag import _files
from specrag.errors import InvalidInputError, ModelNotFoundError, SpecRAGError
from specrag.training import TrainingSettings, train
from specrag.training.checkpoints import SealCheckpoints, claimed, results
from tests.kills import kill_training
from tests.test_files import on_a_full_disk
from tests.test_training import SETTINGS, tiny
from tests.towers import made

RUN = b"settings and examples"


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    """What transformers' Trainer leaves of a checkpoint, and the seal."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (made / "optimizer.pt").write_bytes(b"numbers" * step)
    if sealed:
        SealCheckpoints().on_save(SimpleNamespace(output_dir=str(folder)), SimpleNamespace(global_step=step), None)
    return made


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that has begun."""
    with claimed(tmp_path / "checkpoints", RUN) as resumed:
        assert resumed is None
    return tmp_path / "checkpoints"


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_removes_half_ones(folder):
    for step, sealed in ((2, True), (4, True), (10, False)):
        checkpoint(folder, step, sealed=sealed)
    with claimed(folder, RUN) as resumed:
        assert Path(resumed).name == "checkpoint-4"
        assert sorted(os.listdir(folder)) == ["checkpoint-2", "checkpoint-4", "run.json"]
    assert os.listdir(folder.parent) == ["checkpoints"]


@pytest.mark.parametrize("damage", [b"numbers" * 3 + b"nvmbers", b"", None])
def test_a_checkpoint_that_changed_on_the_disk_is_passed_over(folder, damage):
    checkpoint(folder, 2)
    file = checkpoint(folder, 4) / "optimizer.pt"
    file.unlink() if damage is None else file.write_bytes(damage)
    with claimed(folder, RUN) as resumed:
        assert Path(resumed).name == "checkpoint-2"


def test_checkpoints_of_others_are_left_alone(tmp_path, folder):
    checkpoint(folder, 2)
    with pytest.raises(InvalidInputError, match="run with other examples or settings"), claimed(folder, b"other"):
        pass
    foreign = checkpoint(tmp_path / "foreign", 500, sealed=False)  # of another program, without run.json
    with pytest.raises(InvalidInputError, match="holds other files"), claimed(foreign.parent, RUN):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="is a file"), claimed(tmp_path / "file", RUN):
        pass
    assert foreign.exists() and (folder / "checkpoint-2").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest"', "\ufffd"])
def test_a_damaged_mark_of_the_run_is_one_clear_error(folder, content):
    (folder / "run.json").write_text(content)
    with claimed(folder, RUN) as resumed:  # nothing to lose
        assert resumed is None
    checkpoint(folder, 2)
    (folder / "run.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"run.json is damaged.*: remove .*, or choose"), claimed(folder, RUN):
        pass


def test_two_processes_do_not_train_with_the_same_checkpoints(folder):
    busy = pytest.raises(InvalidInputError, match="another process is training with checkpoints in")
    with claimed(folder, RUN), busy, claimed(folder, RUN):
        pass
    with claimed(folder, RUN):
        pass


def test_results_come_into_their_folder_at_the_end_and_the_weights_last(tmp_path, monkeypatch):
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (moved.append(path.name), replace(path, to))[1])
    (tmp_path / "mine.txt").write_text("x")
    with results(tmp_path, last="adapter_model") as part:
        for name in ("adapter_model.safetensors", "prompts.json", "adapter_config.json"):
            (part / name).write_text("x")
        assert "prompts.json" not in os.listdir(tmp_path)
    assert moved == ["adapter_config.json", "prompts.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == [*sorted(moved[:1]), "adapter_model.safetensors", "mine.txt", "prompts.json"]


def test_a_full_disk_is_one_clear_error_for_checkpoints_and_results(tmp_path):
    def fill(folder: Path) -> None:
        with _files.writing(folder), results(folder, last="x") as part:
            (part / "x").write_bytes(b"0" * 100_000)

    on_a_full_disk(lambda: fill(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_training_onto_a_full_disk_or_a_file_is_one_clear_error(smollm2, tmp_path):
    settings = TrainingSettings(**SETTINGS)
    on_a_full_disk(lambda: train(tiny(smollm2), made(24), tmp_path / "out", settings=settings))
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecRAGError, match="could not be written"):
        train(tiny(smollm2), made(4), tmp_path / "file", settings=settings)
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter could be read"):
        train(tiny(smollm2), made(4), tmp_path / "new", settings=settings, adapter=tmp_path / "none")


@pytest.mark.slow
def test_killed_trainings_lose_no_checkpoint_and_leave_nothing(tmp_path):
    outcome = kill_training(tmp_path, 3)
    assert outcome.killed >= 3 and not outcome.lost and not outcome.refused and not outcome.left, outcome
