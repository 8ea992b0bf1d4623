"""The documentation: its examples run as they stand, and its reference pages name modules that exist."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

import specrag.models
from tests.servers import replaying

DOCS = Path(__file__).parent.parent / "docs"
SERVER = "http://127.0.0.1:8000/v1"


def examples(name: str, at_least: int = 5) -> list:
    text = (DOCS / name).read_text()
    found = re.findall(r"^##? ([^\n]+)\n(?:(?!^##? ).)*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("```python") >= at_least
    return [pytest.param(code, id=f"{name}: {title}") for title, code in found]


class Agents:
    """The chat models that the examples take from a provider: each calls its tool, then says what it got."""

    @staticmethod
    def langchain(model: str):
        from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
        from langchain_core.messages import AIMessage
        from langchain_core.outputs import ChatGeneration, ChatResult

        class Scripted(GenericFakeChatModel):
            tool: str = ""

            def bind_tools(self, tools, **kwargs):
                self.tool = tools[0].name
                return self

            def _generate(self, messages, stop=None, run_manager=None, **kwargs):
                call = {"name": self.tool, "args": {"question": "who discovered radium"}, "id": "1"}
                asks = messages[-1].type == "human"
                message = AIMessage("", tool_calls=[call]) if asks else AIMessage(messages[-1].content)
                return ChatResult(generations=[ChatGeneration(message=message)])

        return Scripted(messages=iter([]))

    @staticmethod
    def llama_index(model: str):
        from tests.llamaindex_parts import ScriptedAgentLLM

        return ScriptedAgentLLM()


@pytest.fixture(scope="module")
def bundled():
    """Each bundled model is loaded once for all examples, and SmolLM2 with int8 weights, which take half the time."""
    once = functools.cache(specrag.models.bundled)
    return lambda name, **options: once(name, **({"quantization": "int8"} if name == "smollm2" else {}) | options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        *examples("../README.md", at_least=3),
        *examples("quick-start.md", at_least=1),
        *examples("concepts/speculative-rag.md", at_least=1),
        *examples("concepts/rapid.md", at_least=2),
        *examples("servers.md", at_least=1),
        *examples("evaluation.md", at_least=1),
        *examples("langchain.md"),
        *examples("llamaindex.md"),
    ],
)
def test_example(code, bundled, monkeypatch, capsys, request):
    monkeypatch.setattr("specrag.models.bundled", bundled)
    monkeypatch.setattr("langchain.chat_models.init_chat_model", Agents.langchain)
    provider = types.ModuleType("llama_index.llms.openai")  # not installed: see Agents
    provider.OpenAI = Agents.llama_index
    monkeypatch.setitem(sys.modules, "llama_index.llms.openai", provider)
    example = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", example)  # where pydantic looks for the names of a class's fields
    live = request.config.getoption("--vllm-url")
    with contextlib.nullcontext(live) if live else replaying() as url:
        exec(compile(code.replace(SERVER, url), "example", "exec"), example.__dict__)
    assert capsys.readouterr().out.strip()


def test_reference_pages_name_modules_that_exist():
    pages = list((DOCS / "reference").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(pages) > 10 and len(set(named)) == len(named) > 20
    for name in named:
        assert importlib.util.find_spec(name), name
