"""What works without the extras, and what says which one to install."""

import json
import subprocess
import sys

import pytest

from specrag.models.bundled import located

# Packages of the extras are hidden from a fresh Python, as if they were not installed.
HIDDEN = ("torch", "accelerate", "gguf", "peft", "bs4", "pypdf")
HIDE = f"import sys\nfor name in {HIDDEN}:\n    sys.modules[name] = None\n"


def run_without_extras(code: str) -> str:
    """What ``code`` prints in a Python without the extras."""
    done = subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return done.stdout


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
