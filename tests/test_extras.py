"""What works without the extras, and what says which one to install."""

import json
import subprocess
import sys

import pytest

from specrag.models.bundled import located
from tests.fakes import HashEmbedder
from tests.servers import serving

# Packages of the extras are hidden from a fresh Python, as if they were not installed.
HIDDEN = ("torch", "accelerate", "gguf", "peft", "bs4", "pypdf")
HIDE = f"import sys\nfor name in {HIDDEN}:\n    sys.modules[name] = None\n"


def run_without_extras(code: str, *arguments: str, exits: int = 0) -> str:
    """What ``code`` prints in a Python without the extras, which ends with the status ``exits``."""
    command = [sys.executable, "-c", HIDE + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == exits, done.stderr[-3000:]
    if exits:
        return done.stderr
    assert done.stderr.strip() == ""
    return done.stdout


@pytest.mark.slow
def test_a_client_of_servers_works_without_the_extras(tmp_path):
    (tmp_path / "notes.txt").write_text("Radium was discovered in 1898.")
    code = f"""
import specrag, specrag.cli, specrag.models, langchain_specrag, llamaindex_specrag
from specrag import Passage, SpeculativeRAG
from specrag.models import OpenAIEmbedder, OpenAILM
from specrag.retrieval import PassageIndex, read_passages
from tests.fakes import HashEmbedder, ScriptedLM

lm = OpenAILM("smollm2", "http://127.0.0.1:9/v1", tokenizer={str(located("smollm2"))!r})
print(lm.count_tokens("hello world"))
index = PassageIndex(HashEmbedder())
index.add(read_passages({str(tmp_path)!r}) + [Passage("Polonium was discovered too."), Passage("It rained.")])
index.save({str(tmp_path / "index")!r})
found = PassageIndex.load({str(tmp_path / "index")!r}, HashEmbedder()).search("when was radium discovered", 3)
drafter = ScriptedLM(lambda prompt: ("it says so", "1898"))
answer = SpeculativeRAG(drafter=drafter, drafts=2, passages_per_draft=2).answer("when was radium discovered", found)
print(answer.text, answer.embedding_source, len(answer.verdicts))
"""
    assert run_without_extras(code).splitlines() == ["2", "1898 passages 2"]


COMMAND = "from specrag.cli import main; main()"


@pytest.mark.slow
def test_the_command_answers_over_servers_without_the_extras(tmp_path):
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(("Radium was discovered in 1898.", "Polonium too.", "It rained.")):
        (tmp_path / "docs" / f"{i}.txt").write_text(text)

    def answer(method, path, body, headers):
        if method == "GET":
            return 200, b'{"data": []}', {}
        asked = json.loads(body)
        if path.endswith("/embeddings"):
            vectors = HashEmbedder().embed(asked["input"]).tolist()
            made = {"data": [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]}
        else:
            made = {"choices": [{"message": {"content": "Rationale: it says so\nAnswer: 1898"}}]}
        return 200, json.dumps(made).encode(), {}

    with serving(answer) as url:
        embedder = ("--embedder", "m", "--embedder-server", url)
        run_without_extras(COMMAND, "index", str(tmp_path / "docs"), "--to", str(tmp_path / "index"), *embedder)
        for docs in ("docs", "index"):
            options = ("--docs", str(tmp_path / docs), "--server", url, "--drafter", "m", *embedder, "--json")
            shown = json.loads(run_without_extras(COMMAND, "ask", "when was radium discovered", *options))
            assert shown["text"] == "1898" and len(shown["verdicts"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "who?", "--docs", ".", "--server", "http://x", "--drafter", "m"), "with --embedder and"),
        (("ask", "who?", "--docs", "."), "pip install 'specrag[local]'"),
        (("index", ".", "--to", "x"), "pip install 'specrag[local]'"),
        (("ask", "who?", "--docs", ".", "--embedder", "/nowhere"), "TransformersEmbedder needs the package torch"),
        (("ask", "who?", "--docs", ".", "--embedder-server", "http://x"), "--embedder-server needs --embedder"),
        (("demo",), "pip install 'specrag[local]'"),
        (("models", "fetch", "smollm2", "--to", "/nowhere"), "fetching smollm2 needs the package torch"),
        (("train", "x.jsonl", "--out", "x"), "pip install 'specrag[train]'"),
    ],
)
def test_a_command_names_what_is_missing_in_one_line(arguments, message):
    said = run_without_extras(COMMAND, *arguments, exits=1)
    assert message in said and said.count("\n") == 1


LOCAL, TRAIN, DOCUMENTS = (f"pip install 'specrag[{extra}]'" for extra in ("local", "train", "documents"))
ASK = 'ScriptedLM(lambda prompt: ("why", "that"))).answer("who?", [Passage("a"), Passage("b"), Passage("c")])'


@pytest.mark.parametrize(
    ("code", "what", "command"),
    [
        ("from specrag.models import TransformersLM", "TransformersLM needs the package torch", LOCAL),
        ("from specrag.models.transformers import TransformersLM", "or use OpenAILM with a server", LOCAL),
        ("from specrag.models import TransformersEmbedder; TransformersEmbedder('x')", "TransformersEmbedder", LOCAL),
        ("from specrag.models import bundled; bundled('smollm2-rag-drafter')", "'smollm2-rag-drafter'", LOCAL),
        ("from specrag.models import bundled; bundled('minilm')", "embedder=OpenAIEmbedder(base_url, model)", LOCAL),
        (f"SpeculativeRAG(drafter={ASK}", "passages that all have an embedding", LOCAL),
        ("from specrag.models.bundled import fetch; fetch('smollm2', Path('/nowhere'))", "fetching smollm2", LOCAL),
        ("from specrag.models import OpenAILM; OpenAILM('m', 'http://x', tokenizer=gguf)", "reading m.gguf", LOCAL),
        ("from specrag.models.reader import SpanReader", "SpanReader", LOCAL),
        ("import specrag.rapid", "RAPID needs the package torch", LOCAL),
        ("from specrag.rapid.session import LongContext", "RAPID needs the package torch", LOCAL),
        ("from langchain_specrag import ChatRapid", "RAPID needs the package torch", LOCAL),
        ("from llamaindex_specrag import RapidLLM", "RAPID needs the package torch", LOCAL),
        ("from langchain_specrag import SpecRAGEmbeddings; SpecRAGEmbeddings()", "the bundled embedder", LOCAL),
        ("from llamaindex_specrag import SpecRAGEmbedding; SpecRAGEmbedding()", "the bundled embedder", LOCAL),
        ("from specrag.training import train", "training needs the package torch", TRAIN),
        ("from specrag.retrieval import read_documents; read_documents(html)", "reading m.html", DOCUMENTS),
        ("from specrag.retrieval import read_documents; read_documents(pdf)", "reading m.pdf", DOCUMENTS),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(run_cases, code, what, command):
    kind, message = run_cases[code]
    assert kind == "MissingExtraError"
    assert what in message and command in message


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    """Every case's error by its code; one Python runs them all."""
    folder = tmp_path_factory.mktemp("missing")
    for suffix in ("gguf", "html", "pdf"):
        (folder / f"m.{suffix}").write_text("x")
    mark = next(m for m in test_what_is_missing_is_named_with_the_command_that_installs_it.pytestmark)
    code = f"""
import json
from pathlib import Path

from specrag import Passage, SpeculativeRAG
from specrag.errors import SpecRAGError
from tests.fakes import ScriptedLM

gguf, html, pdf = (str(Path({str(folder)!r}) / f"m.{{suffix}}") for suffix in ("gguf", "html", "pdf"))
found = {{}}
for case in {[case[0] for case in mark.args[1]]!r}:
    try:
        exec(case)
    except SpecRAGError as error:
        found[case] = (type(error).__name__, str(error))
print(json.dumps(found))
"""
    return json.loads(run_without_extras(code))
