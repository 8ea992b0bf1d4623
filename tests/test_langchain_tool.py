"""Speculative RAG as a LangChain tool, and agents that call it."""

from __future__ import annotations

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import ToolException

from langchain_specrag import SpeculativeRAGTool
from specrag import Prompts
from specrag.errors import ModelError
from tests.fakes import HashEmbedder, ScriptedLM
from tests.langchain_parts import FixedRetriever, chain_of, documents


class ScriptedAgent(GenericFakeChatModel):
    def bind_tools(self, tools, **kwargs):
        return self


def _agent_model(question: str = "who discovered radium"):
    call = {"name": "search_documents", "args": {"question": question}, "id": "1", "type": "tool_call"}
    return ScriptedAgent(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("It was Marie Curie.")]))


async def test_an_agent_calls_the_tool_and_gets_answer_and_artifact():
    tool = SpeculativeRAGTool(chain=chain_of(ScriptedLM(lambda prompt: ("She did.", "Marie Curie"))))
    for run in (create_agent(_agent_model(), [tool]).invoke, None):
        asked = {"messages": [("user", "who discovered radium?")]}
        state = run(asked) if run else await create_agent(_agent_model(), [tool]).ainvoke(asked)
        (answer,) = [message for message in state["messages"] if isinstance(message, ToolMessage)]
        assert answer.content == "Marie Curie\nEvidence: She did."
        assert answer.artifact["answer"] == "Marie Curie" and len(answer.artifact["drafts"]) == 5
        assert state["messages"][-1].content == "It was Marie Curie."


def test_an_abstaining_tool_says_so_in_words():
    tool = SpeculativeRAGTool.from_retriever(
        FixedRetriever(documents=documents()),
        ScriptedLM(lambda prompt: ("The passages do not say.", Prompts().abstention)),
        embedder=HashEmbedder(),
    )
    message = tool.invoke({"type": "tool_call", "id": "1", "name": tool.name, "args": {"question": "q"}})
    assert message.content == "The documents do not answer this question." and message.artifact["abstained"]


@pytest.mark.parametrize("question", ["", " \n", "why " * 500])
async def test_an_agent_reads_why_its_question_was_refused_and_goes_on(question):
    tool = SpeculativeRAGTool(chain=chain_of(ScriptedLM(lambda prompt: ("r", "a"), window=400)))
    asked = {"messages": [("user", "who discovered radium?")]}
    for state in (
        create_agent(_agent_model(question), [tool]).invoke(asked),
        await create_agent(_agent_model(question), [tool]).ainvoke(asked),
    ):
        (answer,) = [message for message in state["messages"] if isinstance(message, ToolMessage)]
        assert "question" in answer.content and answer.status == "error"
        assert state["messages"][-1].content == "It was Marie Curie."


def test_the_schema_forbids_an_empty_question_and_unknown_arguments():
    tool = SpeculativeRAGTool(chain=chain_of())
    question = tool.args_schema.model_json_schema()["properties"]["question"]
    assert question["minLength"] == 1 and question["pattern"] == r"\S"
    for arguments in ({"question": ""}, {"question": " "}, {"query": "who?"}, {}):
        with pytest.raises(ValueError, match="question"):
            tool.invoke(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "who?",
        '{"question": "who?"}',
        '{"query": "who?"}',
        {"question": ["who?"]},
        {"question": {"text": "who?"}},
        {"question": '{"question": "who?"}'},
        {"question": '["who?"]'},
    ],
)
def test_a_question_that_a_model_packed_is_unpacked(arguments):
    asked = []
    SpeculativeRAGTool(chain=_echo(asked)).invoke(arguments)
    assert asked == [{"input": "who?"}]


@pytest.mark.parametrize("question", ["[1] who?", "{x} or {y}?", '{"a": "b", "c": 1}', "[]"])
def test_a_question_with_brackets_stays_as_it_is(question):
    asked = []
    SpeculativeRAGTool(chain=_echo(asked)).invoke({"question": question})
    assert asked == [{"input": question}]


def _echo(asked):
    """A chain that notes what it is asked."""

    def answer(given):
        asked.append(given)
        return {"abstained": False, "answer": "42", "rationale": ""}

    return RunnableLambda(answer)


def test_a_server_that_fails_is_for_the_developer_and_a_tool_may_raise_what_it_refuses():
    tool = SpeculativeRAGTool(chain=chain_of(ScriptedLM(lambda prompt: RuntimeError("away"))))
    with pytest.raises(ModelError, match="away"):
        tool.invoke({"question": "who?"})
    strict = SpeculativeRAGTool(
        chain=chain_of(ScriptedLM(lambda prompt: ("r", "a"), window=400)), handle_tool_error=False
    )
    with pytest.raises(ToolException, match="leaves no room for passages"):
        strict.invoke({"question": "why " * 500})


def test_the_chain_is_a_tool_by_itself():
    tool = chain_of().as_tool(name="ask", description="Asks.")
    assert tool.args == {"input": {"title": "Input", "type": "string"}}
    assert tool.invoke({"input": "q"})["answer"].startswith("answer ")
