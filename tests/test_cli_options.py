"""Every option of a command that names a model reaches what loads the models."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from specrag.cli import app
from specrag.cli.loading import ModelOptions

COMMANDS = {
    "ask": ["who?", "--docs", "."],
    "demo": [],
    "index": [".", "--to", "index"],
    "batch": ["data.jsonl", "--out", "answers.jsonl"],
    "eval": ["data.jsonl", "--out", "run"],
    "calibrate": ["data.jsonl", "--out", "calibration.json"],
    "serve": ["--rapid", "smollm2"],
}
VALUES = {"min_confidence": 0.25, "escalate": "standard", "escalate_below": 0.75}
PATHS, LISTS = ("calibration", "models"), ("drafter", "server", "verifier_server", "embedder_server")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_reach_the_models(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"question": "when?", "answers": ["1889"], "passages": [{"text": "It opened in 1889."}]}
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row | {'id': str(i)})}\n" for i in range(50)))
    seen = []

    def check_models(self):
        seen.append({name: getattr(self, name) for name in fields_of(ModelOptions)})
        raise typer.Exit(0)

    monkeypatch.setattr(ModelOptions, "check_models", check_models)
    has = {option.name for option in typer.main.get_command(app).commands[command].params}
    given = {name: VALUES.get(name, f"the-{name}") for name in fields_of(ModelOptions) if name in has}
    assert {"embedder", "drafter"} & given.keys()
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, [command, *COMMANDS[command], *options])
    assert result.exit_code == 0, result.output
    wanted = {name: Path(v) if name in PATHS else [v] if name in LISTS else v for name, v in given.items()}
    assert seen == [dict.fromkeys(fields_of(ModelOptions)) | wanted]


def fields_of(kind) -> list[str]:
    return [field.name for field in fields(kind)]


def test_paths_are_whole_for_processes_with_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "smollm2", "on-server"):
        (tmp_path / name).mkdir()
    given = ModelOptions(
        drafter=("./mine", "smollm2", "org/from-a-hub"), verifier="on-server", verifier_server=("http://x/v1",),
        embedder="mine", calibration=Path("mine.json"), models=Path("mine"),
    )  # fmt: skip
    whole = given.with_whole_paths()
    here = str(tmp_path)
    assert whole.drafter == (f"{here}/mine", "smollm2", "org/from-a-hub")  # a bundled name is no folder
    assert (whole.verifier, whole.embedder) == ("on-server", f"{here}/mine")
    assert (whole.calibration, whole.models) == (tmp_path / "mine.json", tmp_path / "mine")
    assert whole.verifier_server == given.verifier_server and whole.server is None
    assert whole.with_whole_paths() == whole
    strange = ModelOptions(drafter=("~nobody-of-this-name/x", "x" * 300), tokenizer="mine")
    assert strange.with_whole_paths() == replace(strange, tokenizer=f"{here}/mine")


def test_a_reader_is_here_even_where_other_models_are_on_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reader", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "reader" / "reader.json").write_text("{}")
    given = ModelOptions(drafter=("reader", "model"), server=("http://x/v1",), embedder="mine", embedder_server=("u",))
    assert given.with_whole_paths() == replace(given, drafter=(str(tmp_path / "reader"), "model"))
