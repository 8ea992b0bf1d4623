"""Readers for users: the bundled one, and one that `specrag train --reader` makes out of a user's own file."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MPNetConfig, MPNetForQuestionAnswering
from typer.testing import CliRunner

from specrag import Passage, SpeculativeRAG
from specrag.cli import app
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.evaluation.data import Question, save_questions
from specrag.models import SpanReader, bundled, load_reader
from specrag.models.bundled import READER_SETTINGS, located
from specrag.models.reader import ADAPTER_FILE, load_encoder
from specrag.training import ReaderSettings, evaluate_reader
from tests.fakes import ScriptedReader
from tests.reader_parts import reader_in_place, records, tiny_base, word_tokenizer

run = CliRunner().invoke
_BUNDLED = importlib.import_module("specrag.models.bundled")  # `specrag.models.bundled` is the function
PASSAGES = [Passage("The tower opened in 1889.", title="Tower"), Passage("The river is long.", title="River")]


# --- the bundled reader ---------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    return reader_in_place(tmp_path, monkeypatch)


def test_the_bundled_reader_is_the_fetched_base_with_what_ships_in_the_package(shipped):
    reader = bundled("minilm-reader", batch_size=3)
    assert isinstance(reader, SpanReader)
    assert (reader.name, reader.longest, reader.batch_size, reader.max_tokens) == ("minilm-reader", 9, 3, 384)
    weights = load_file(shipped / ADAPTER_FILE)
    assert torch.equal(reader.model.qa_outputs.weight.half(), weights["qa_outputs.weight"])
    assert bundled("minilm-reader", longest=5).longest == 5
    answer = SpeculativeRAG(drafter=reader).answer("when did the tower open", PASSAGES)
    assert answer.text and all(verdict.draft.drafter == "minilm-reader" for verdict in answer.verdicts)
    assert answer.text in " ".join(f"{p.title}: {p.text}" for p in PASSAGES)


def test_without_its_base_the_reader_says_which_command_fetches_it(shipped, tmp_path):
    with pytest.raises(ModelNotFoundError) as raised:
        bundled("minilm-reader", folder=tmp_path / "models")
    assert "the reader 'minilm-reader' needs its base" in str(raised.value)
    assert f"run `specrag models fetch minilm --to {tmp_path / 'models'}`" in str(raised.value)
    with pytest.raises(InvalidInputError, match="is an adapter of 'minilm' itself"):
        bundled("minilm-reader", adapter=tmp_path)
    with pytest.raises(InvalidInputError, match="no bundled model 'minilm-reade': .*minilm-reader"):
        bundled("minilm-reade")


def test_the_models_are_listed_with_what_is_missing(tmp_path):
    here = run(app, ["models", "list"])
    assert here.exit_code == 0, here.output
    for name in ("smollm2", "minilm", "mpnet", "smollm2-rag-drafter", "minilm-reader", "mpnet-reader"):
        assert re.search(rf"^{name}: .+\n    \S", here.stdout, re.MULTILINE)
    assert str(located("minilm")) in here.stdout
    missing = run(app, ["models", "list", "--models", str(tmp_path)]).stdout
    assert missing.count("not here:") == 6
    for name in ("minilm", "mpnet"):  # the base, and the reader that needs it
        assert missing.count(f"run `specrag models fetch {name} --to {tmp_path}`") == 2


def test_fetching_the_reader_fetches_its_base(monkeypatch):
    fetched = []
    monkeypatch.setattr(_BUNDLED, "fetch", lambda name, to, say: fetched.append(name) or Path(name))
    assert run(app, ["models", "fetch", "minilm-reader", "minilm"]).exit_code == 0
    assert fetched == ["minilm"]
    assert run(app, ["models", "fetch", "mpnet-reader"]).exit_code == 0
    assert fetched == ["minilm", "mpnet"]


def test_the_larger_reader_is_a_lora_of_all_linear_layers_of_its_base(tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 16}  # as mpnet's
    torch.manual_seed(0)
    MPNetForQuestionAnswering(MPNetConfig(**sizes)).save_pretrained(tmp_path / "mpnet")
    word_tokenizer().save_pretrained(tmp_path / "mpnet")
    untrained, _ = load_encoder(tmp_path / "mpnet")
    before = untrained.state_dict()
    reader = bundled("mpnet-reader", folder=tmp_path)
    assert (reader.name, reader.longest, reader.max_tokens) == ("mpnet-reader", 24, 384)
    changed = {name for name, weight in reader.model.state_dict().items() if not torch.equal(weight, before[name])}
    linear = ("q", "k", "v", "o", "dense")
    layers = {name for name in before if ".layer." in name and name.split(".")[-2] in linear and "weight" in name}
    assert len(layers) == 12 * 6 and changed == {*layers, "qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base": 3}', '{"base": "minilm", "longest": "9"}'])
def test_damaged_settings_of_a_reader_are_named(shipped, content):
    (shipped / READER_SETTINGS).write_text(content)
    with pytest.raises(InvalidInputError, match=rf"{READER_SETTINGS} is damaged"):
        load_reader(shipped)


def test_a_folder_without_a_reader_is_no_reader(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no reader at .*`specrag train --reader` writes"):
        load_reader(tmp_path)


# --- a reader of one's own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    save_questions(records(), file)
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-encoder")


def training(data: Path, base: Path, out: Path, *more: str) -> list[str]:
    command = ["train", "--reader", str(data), "--out", str(out), "--base", str(base), "--learning-rate", "3e-3"]
    return [*command, "--batch-size", "16", "--held", "4", *more]


@pytest.mark.slow
def test_one_command_makes_a_reader_out_of_a_users_own_file(data, base, tmp_path):
    out = tmp_path / "reader"
    result = run(app, training(data, base, out, "--rounds", "30", "--licence", "mine", "--substitute", "0"))
    assert result.exit_code == 0, result.output
    losses = [float(value) for value in re.findall(r"step \d+ of \d+: loss ([\d.]+)", result.stderr)]
    assert len(losses) > 3 and losses[-1] < 0.5 * losses[0]
    for line in ("span reader", "licence of the data**: mine", "of 4 questions that can be answered"):
        assert line in " ".join(result.stdout.split())
    facts = json.loads((out / "training.json").read_text())
    assert facts["settings"]["method"] == "full" and facts["settings"]["rows"] == 16
    reader = load_reader(out)
    assert reader.name == "reader" and reader.longest == ReaderSettings.longest
    seen = records()[1:9]  # the first of four is held back
    assert evaluate_reader(reader, seen).right >= 0.75
    untrained = SpanReader(base)
    assert evaluate_reader(untrained, seen).right < 0.5


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_end(data, base, tmp_path):
    more = ("--rounds", "3", "--method", "lora", "--checkpoint-every", "2")
    whole = run(app, training(data, base, tmp_path / "whole", *more))
    assert whole.exit_code == 0, whole.output
    killed = training(data, base, tmp_path / "killed", *more)
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", _KILLED, *killed], cwd=root, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "killed" / ADAPTER_FILE).exists()
    again = run(app, killed)
    assert again.exit_code == 0, again.output
    for file in (ADAPTER_FILE, "adapter_model.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "killed" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load_reader(tmp_path / "killed").read("who built tower 3", ["The people of rome."]).spans
    other = run(app, training(data, base, tmp_path / "killed", "--rounds", "2"))
    assert other.exit_code == 1 and "other examples or settings" in " ".join(other.stderr.split())


_KILLED = """
import contextlib, os, sys
from specrag.cli import app, train_reader
@contextlib.contextmanager
def shown():
    yield lambda step, steps, logged: os._exit(9) if step == 3 else None  # as a kill does: nothing is put in order
train_reader.training_shown = shown
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "x"], "--adapter is of no use to a reader"),
        (["--rationales", "x"], "--rationales is of no use to a reader"),
        (["--micro-batch-size", "2"], "--micro-batch-size is of no use to a reader"),
        (["--full", "--method", "lora"], "--full and --method lora contradict each other"),
        (["--held", "30"], "24 records, of which 30 are held back"),
        (["--base", "/nowhere"], "no reader at /nowhere"),
    ],
)
def test_what_makes_no_sense_is_one_clear_line(data, base, tmp_path, more, message):
    result = run(app, training(data, base, tmp_path / "out", *more))
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_quality_counts_right_spans_and_doubt():
    asked = [
        Question("1", "when", ("1889",), (Passage("It opened in 1889."),), (0,)),
        Question("2", "when", ("1789",), (Passage("It opened in 1889."),), ()),
        Question("3", "when", (), (Passage("It opened in 1889."),), (), unanswerable=True),
    ]
    sure = evaluate_reader(ScriptedReader({"1889": 0.9}), asked)
    assert (sure.answerable, sure.right, sure.wrongly_doubted) == (2, 0.5, 0)
    assert (sure.unanswerable, sure.rightly_doubted) == (1, 0)
    doubting = evaluate_reader(ScriptedReader({"1889": 0.1}), asked)
    assert (doubting.right, doubting.wrongly_doubted, doubting.rightly_doubted) == (0.5, 1, 1)
    nothing = evaluate_reader(ScriptedReader({}), asked[:1])
    assert nothing.right == 0 and nothing.unanswerable == 0
