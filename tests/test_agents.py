"""Agents of both frameworks over several turns: RAPID's chat model calls the tools, and Speculative RAG is one of them.

The prompts, the template (Qwen2.5's) and the tools are real. What a larger model would reply is scripted.
"""

import asyncio
import json

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import ToolException, tool
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool, QueryEngineTool, ToolSelection

from langchain_specrag import ChatRapid, SpeculativeRAGTool
from llamaindex_specrag import RapidLLM
from specrag.rapid import RapidChat
from specrag.rapid.conversation import conversation
from tests.fakes import ScriptedLM
from tests.langchain_parts import chain_of
from tests.llamaindex_parts import ScriptedAgentLLM, engine_of
from tests.rapid_parts import generator

LONG = "why " * 900


class Script:
    """What the model replies next, and the (prompt, question) pairs that it was given."""

    def __init__(self):
        self.replies, self.asked = [], []


@pytest.fixture
def script(monkeypatch):
    script = Script()

    def stream(self, messages, *, documents=(), tools=(), **options):
        prompt, question = conversation(self.rapid.target.encoder, messages, documents, tools)
        script.asked.append((prompt.head + prompt.context, question))
        reply = script.replies.pop(0)
        yield from (reply[at : at + 7] for at in range(0, len(reply), 7))

    monkeypatch.setattr(RapidChat, "stream", stream)
    return script


def drafter():
    return ScriptedLM(lambda prompt: ("She did.", "Marie Curie"), window=600)


# --- LangChain ------------------------------------------------------------------------------------------


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    raise ToolException(f"no station in {city}")


weather.handle_tool_error = True


@tool
def nothing() -> str:
    """Returns nothing."""
    return ""


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def _streamed(agent, asked, config):
    return [state async for state in agent.astream(asked, config, stream_mode="values")][-1]


RUNS = {
    "invoke": lambda agent, asked, config: agent.invoke(asked, config),
    "ainvoke": lambda agent, asked, config: asyncio.run(agent.ainvoke(asked, config)),
    "stream": lambda agent, asked, config: list(agent.stream(asked, config, stream_mode="values"))[-1],
    "astream": lambda agent, asked, config: asyncio.run(_streamed(agent, asked, config)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_langchain_agent_goes_on_after_errors_of_its_tools_and_in_the_next_turn(run, script, tiny_qwen):
    agent = create_agent(
        ChatRapid(rapid=generator(tiny_qwen), max_tokens=8),
        [SpeculativeRAGTool(chain=chain_of(drafter())), weather, nothing],
        system_prompt="Be brief.",
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    script.replies = [
        "<think>" + call("nothing") + "</think>\n" + call("search_documents", question=LONG),
        call("search_documents", question=""),
        call("weather", city="Paris") + "\n" + call("search_documents", question="who discovered radium?"),
        call("nothing"),
        call("fly"),
        "It was Marie Curie.",
    ]
    messages = RUNS[run](agent, {"messages": [("user", "who?")]}, config)["messages"]
    results = [(message.status, message.content) for message in messages if isinstance(message, ToolMessage)]
    assert [status for status, _ in results] == ["error", "error", "error", "success", "success", "error"]
    for (_, said), expected in zip(
        results,
        [
            "leaves no room for passages",
            "question",
            "no station in Paris",
            "Marie Curie\nEvidence: She did.",
            "",
            "fly",
        ],
        strict=True,
    ):
        assert expected in said
    assert messages[-1].content == "It was Marie Curie."
    # each result is what the model is asked with next: of two calls the last one, and the other one before it
    questions = [question for _, question in script.asked]
    assert questions[1:] == [results[0][1], results[1][1], results[3][1], "null", results[5][1]]
    assert "no station in Paris" in script.asked[3][0]

    script.replies, script.asked = ["In 1898."], []
    messages = RUNS[run](agent, {"messages": [("user", "and when?")]}, config)["messages"]
    assert messages[-1].content == "In 1898."
    ((prompt, question),) = script.asked
    assert question == "and when?" and "It was Marie Curie." in prompt and "<think>" not in prompt
    assert prompt.split("<|im_start|>user", 1)[1].count("<tool_call>\n{") == 6


def test_an_agent_goes_on_with_a_conversation_that_another_model_began(script, tiny_qwen):
    thought = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "text", "text": "I look it up."},
        {"type": "tool_use", "id": "1", "name": "search_documents", "input": {"question": "who?"}},
    ]
    calls = [{"name": "search_documents", "args": {"question": "who?"}, "id": "1"}]
    begun = [
        SystemMessage("Be brief."),
        HumanMessage("who?"),
        AIMessage(thought, tool_calls=calls),
        ToolMessage([{"type": "text", "text": "Marie Curie"}], tool_call_id="1"),
        AIMessage("Marie Curie."),
        HumanMessage("and when?"),
    ]
    script.replies = [call("search_documents", question="when?"), "In 1898."]
    tools = [SpeculativeRAGTool(chain=chain_of(drafter()))]
    agent = create_agent(ChatRapid(rapid=generator(tiny_qwen), max_tokens=8), tools)
    assert agent.invoke({"messages": begun})["messages"][-1].content == "In 1898."
    prompt, question = script.asked[0]
    assert question == "and when?" and "Hm." not in prompt and "I look it up.\n<tool_call>" in prompt


# --- LlamaIndex -----------------------------------------------------------------------------------------


def broken(city: str) -> str:
    """The weather in a city."""
    raise ValueError(f"no station in {city}")


def llamaindex_tools():
    engine = QueryEngineTool.from_defaults(engine_of(drafter()), name="search_documents", description="About physics.")
    return [engine, FunctionTool.from_defaults(broken, name="weather")]


def action(name, **arguments):
    return f"Thought: I need a tool.\nAction: {name}\nAction Input: {json.dumps(arguments)}"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_react_agent_goes_on_after_errors_of_its_tools_and_in_the_next_turn(streaming, script, tiny_qwen):
    llm = RapidLLM(rapid=generator(tiny_qwen), max_tokens=8)
    agent = ReActAgent(tools=llamaindex_tools(), llm=llm, streaming=streaming)
    memory = ChatMemoryBuffer.from_defaults(token_limit=20_000)
    final = "Thought: I can answer without using any more tools.\nAnswer: It was Marie Curie."
    script.replies = [
        action("search_documents", input=LONG),
        action("search_documents", input=""),
        action("weather", city="Paris"),
        action("fly"),
        "Thought: x\nAction: weather\nAction Input: {city",
        action("search_documents", input="who discovered radium?"),
        final,
    ]
    result = await agent.run(user_msg="who?", memory=memory)
    assert str(result) == "It was Marie Curie."
    shown = [(made.tool_output.is_error, made.tool_output.content) for made in result.tool_calls]
    for (is_error, said), (expected, words) in zip(
        shown,
        [
            (True, "leaves no room for passages"),
            (True, "the question is empty"),
            (True, "no station in Paris"),
            (True, "fly"),
            (False, "Marie Curie"),
        ],
        strict=True,
    ):
        assert is_error == expected and words in said
    assert script.asked[-1][1] == "Observation: Marie Curie"
    script.replies, script.asked = [final], []
    assert str(await agent.run(user_msg="and when?", memory=memory)) == "It was Marie Curie."
    ((prompt, question),) = script.asked
    assert question == "and when?" and "It was Marie Curie." in prompt


async def test_a_function_agent_calls_again_after_a_refusal():
    class Steps(ScriptedAgentLLM):
        steps: list

        def _reply(self, messages, tools):
            if not self.steps:
                return ChatResponse(message=ChatMessage(role="assistant", content=f"So: {messages[-1].content}"))
            name, arguments = self.steps.pop(0)
            calls = [ToolSelection(tool_id=name, tool_name=name, tool_kwargs=arguments)]
            return ChatResponse(message=ChatMessage(role="assistant", content="", additional_kwargs={"calls": calls}))

    steps = [
        ("search_documents", {"input": LONG}),
        ("weather", {"city": "Paris"}),
        ("search_documents", {"input": "w"}),
    ]
    result = await FunctionAgent(tools=llamaindex_tools(), llm=Steps(steps=steps)).run(user_msg="who?")
    assert [made.tool_output.is_error for made in result.tool_calls] == [True, True, False]
    assert str(result) == "So: Marie Curie"
