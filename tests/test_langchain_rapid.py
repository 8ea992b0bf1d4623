"""ChatRapid and RapidLLM on real SmolLM2; tools on a template that knows them."""

from __future__ import annotations

import json

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_specrag import ChatRapid, RapidLLM
from specrag.errors import InvalidInputError
from specrag.models import TransformersLM
from specrag.rapid import RapidChat, RapidGenerator
from specrag.rapid.chat import Message, conversation, parse_tool_calls, split_context

# Qwen2.5's template, shortened to what matters: tools in the system turn, calls in <tool_call>.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call one inside <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def rapid(smollm2, minilm):
    return RapidGenerator(smollm2, temperature=0, embedder=minilm)


@pytest.fixture(scope="module")
def report(questions):
    return "\n\n".join(p.text for p in questions[0].passages)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_a_stream_carries_text_usage_and_how_it_was_decoded(rapid, report):
    chat = ChatRapid(rapid=rapid, max_tokens=16)
    whole = chat.invoke("what is this about?", documents=[Document(report)])
    parts = list(chat.stream("what is this about?", documents=[report]))
    assert "".join(str(part.content) for part in parts) == whole.content and whole.content
    assert sum(bool(part.content) for part in parts) > 3
    assert whole.usage_metadata == parts[-1].usage_metadata
    assert whole.usage_metadata["output_tokens"] == 16 and whole.usage_metadata["input_tokens"] > 1000
    assert whole.response_metadata["finish_reason"] == "length"
    decoded = whole.response_metadata["rapid"]
    assert len(decoded["schedule"]) + decoded["accepted"] == 15 and 0 <= decoded["acceptance"] <= 1


def test_a_documents_session_is_used_again_and_the_oldest_goes(rapid, report, forward_passes):
    chat = ChatRapid(rapid=rapid, max_tokens=2, candidates=0, max_sessions=2)
    read = forward_passes(rapid.target.model)
    chat.invoke("first?", documents=[report])
    first = max(read)
    read.clear()
    chat.invoke("second?", documents=[report])
    assert first == 512 and max(read) < 40  # only the question
    chat.invoke("third?", documents=["another text " * 40])
    assert len(chat.sessions) == 2
    chat.invoke("fourth?", documents=["yet another " * 40])
    assert len(chat.sessions) == 2 and chat.sessions[0].tokens < 500


def test_a_conversation_goes_on_in_its_session(rapid, report, forward_passes):
    chat = ChatRapid(rapid=rapid, max_tokens=8)
    messages = [SystemMessage("Be brief."), HumanMessage(f"{report}\n\nWhat is this about?")]
    reply = chat.invoke(messages)
    read = forward_passes(rapid.target.model)
    messages += [reply, HumanMessage("And in one word?")]
    again = chat.invoke(messages)
    # The new context is the old prompt and the reply; it begins alike, so little is read anew by the target.
    fresh = ChatRapid(rapid=rapid, max_tokens=8)
    reused = sum(read)
    read.clear()
    assert fresh.invoke(messages).content == again.content
    assert reused < sum(read) / 2


def test_two_streams_at_once_do_not_share_a_session(rapid, report):
    chat = ChatRapid(rapid=rapid, max_tokens=12)
    alone = chat.invoke("what is this about?", documents=[report]).content
    one = chat.stream("what is this about?", documents=[report])
    two = chat.stream("what is this about?", documents=[report])
    mixed = ["", ""]
    for a, b in zip(one, two, strict=True):
        mixed[0] += str(a.content)
        mixed[1] += str(b.content)
    assert mixed == [alone, alone]


def test_stop_seed_and_temperature_per_call(rapid, report):
    chat = ChatRapid(rapid=rapid, max_tokens=24)
    whole = str(chat.invoke("what is this about?", documents=[report]).content)
    word = whole.split()[2]
    stopped = chat.invoke("what is this about?", documents=[report], stop=[word])
    assert stopped.content == whole[: whole.index(word)] and stopped.response_metadata["finish_reason"] == "stop"
    warm = [chat.invoke("what?", documents=[report], temperature=1.5, seed=seed).content for seed in (1, 2)]
    assert warm[0] != warm[1]
    with pytest.raises(InvalidInputError, match="unknown options top_p"):
        chat.invoke("q", top_p=0.5)


async def test_it_answers_asynchronously_and_in_batches(rapid):
    chat = ChatRapid(rapid=rapid, max_tokens=4)
    whole = chat.invoke("Say hello.").content
    assert (await chat.ainvoke("Say hello.")).content == whole
    assert "".join([str(part.content) async for part in chat.astream("Say hello.")]) == whole
    assert [m.content for m in chat.batch(["Say hello."] * 2)] == [whole] * 2


def test_the_text_interface(rapid, report):
    llm = RapidLLM(rapid=rapid, max_tokens=8)
    prompt = f"{report}\n\nWhat is this about?"
    text = llm.invoke(prompt)
    assert text and "".join(llm.stream(prompt)) == text
    assert llm.sessions[-1].tokens > 1000 and llm.get_num_tokens("one two") == 2
    assert text == ChatRapid(rapid=rapid, max_tokens=8).invoke(prompt).content


def test_a_model_is_written_by_its_path_and_read_again(smollm2_path):
    chat = ChatRapid(model=str(smollm2_path), temperature=0, candidates=[2, 0, 3])
    read = load(dumpd(chat), allowed_objects=[ChatRapid], valid_namespaces=["langchain_specrag"])
    assert read.model_dump() == chat.model_dump() and read.candidates == [2, 0, 3]


def test_bad_input_says_what_to_do(rapid):
    chat = ChatRapid(rapid=rapid)
    with pytest.raises(ValueError, match="give model="):
        ChatRapid()
    with pytest.raises(InvalidInputError, match="reads text, not image_url"):
        chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])
    with pytest.raises(InvalidInputError, match="no tools in the <tool_call> format"):
        chat.bind_tools([weather])
    with pytest.raises(InvalidInputError, match="documents are empty"):
        chat.invoke("q", documents=[" "])
    with pytest.raises(InvalidInputError, match="must be the user's"):
        chat.invoke([HumanMessage("q"), AIMessage("a")])


# --- tools and structure --------------------------------------------------------------------------------


@pytest.fixture
def with_tools(smollm2, minilm):
    lm = TransformersLM(smollm2.model, smollm2.tokenizer, chat_template=TOOL_TEMPLATE)
    return ChatRapid(rapid=RapidGenerator(lm, temperature=0, embedder=minilm), max_tokens=8)


class Replying(RapidChat):
    """Sees real prompts, gives the reply that a larger model would give."""

    reply = ""

    def stream(self, messages, *, documents=(), tools=(), stats=None, **options):
        self.prompt = "".join(conversation(self.rapid.target.encoder, messages, documents, tools)[:3])
        yield from (self.reply[i : i + 5] for i in range(0, len(self.reply), 5))


def test_tools_are_shown_and_calls_are_read(with_tools):
    replying = Replying(with_tools._chat.rapid)
    with_tools._chat = replying
    bound = with_tools.bind_tools([weather])
    replying.reply = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    message = bound.invoke("how is it in Paris?")
    assert '"name": "weather"' in replying.prompt
    (call,) = message.tool_calls
    assert (call["name"], call["args"], message.content) == ("weather", {"city": "Paris"}, "")
    streamed = None
    for chunk in bound.stream("how is it in Paris?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [("weather", {"city": "Paris"})]
    replying.reply = "<tool_call>{broken</tool_call>"
    assert bound.invoke("q").invalid_tool_calls[0]["args"] == "{broken"
    replying.reply = "It is sunny."
    answered = bound.invoke([HumanMessage("how?"), message, ToolMessage("sunny in Paris", tool_call_id=call["id"])])
    assert answered.content == "It is sunny." and not answered.tool_calls
    assert "<tool_call>" in replying.prompt.split("how?")[1]
    with pytest.raises(InvalidInputError, match="tool_choice='any' cannot be promised"):
        with_tools.bind_tools([weather], tool_choice="any")


def test_a_real_model_decodes_with_tools_in_its_prompt(with_tools):
    plain = with_tools.invoke("how is it in Paris?").usage_metadata["input_tokens"]
    assert with_tools.bind_tools([weather]).invoke("how is it in Paris?").usage_metadata["input_tokens"] > plain + 40


class City(BaseModel):
    name: str
    people: int


def test_structured_output_is_asked_for_and_parsed(rapid):
    chat = ChatRapid(rapid=rapid)
    replying = Replying(rapid)
    chat._chat = replying
    replying.reply = '{"name": "Paris", "people": 2100000}'
    assert chat.with_structured_output(City).invoke("Paris?") == City(name="Paris", people=2100000)
    assert '"people"' in replying.prompt
    assert chat.with_structured_output(City.model_json_schema()).invoke("Paris?") == json.loads(replying.reply)
    replying.reply = "no JSON"
    result = chat.with_structured_output(City, include_raw=True).invoke("Paris?")
    assert result["parsed"] is None and result["parsing_error"] is not None and result["raw"].content == "no JSON"


def test_tool_calls_are_read_out_of_text():
    text, calls, broken = parse_tool_calls(
        'Let me see.\n<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>'
        '<tool_call>{"name": "b"}</tool_call><tool_call>{"arguments": {}}</tool_call>'
    )
    assert text == "Let me see." and [(c.name, dict(c.arguments)) for c in calls] == [("a", {"x": 1}), ("b", {})]
    assert broken == ['{"arguments": {}}']
    assert parse_tool_calls("plain ") == ("plain ", [], [])


# --- finding the context --------------------------------------------------------------------------------


def test_the_context_of_a_message_is_found():
    ruled = (
        "Context information is below.\n---------------------\nThe facts.\n---------------------\nQuery: why?\nAnswer: "
    )
    assert split_context(ruled) == (ruled[: ruled.index("Query")].strip(), "Query: why?\nAnswer:")
    long = "word " * 400
    assert split_context(f"{long}\n\nWhy?") == (long.strip(), "Why?")
    assert split_context("Hello.\n\nWhy?") == ("", "Hello.\n\nWhy?")


def test_a_conversation_is_rendered_as_its_template_would(smollm2):
    encoder = smollm2.encoder
    messages = [Message("system", "S"), Message("user", "Q1"), Message("assistant", "A1"), Message("user", "Q2")]
    expected = smollm2.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    head, context, tail, question = conversation(encoder, messages)
    assert (head + context + tail).replace("\ue0f2", question) == expected
    head, context, tail, question = conversation(encoder, messages, documents=["The document."])
    assert context == "The document." and (head + context + tail).replace("\ue0f2", question) == expected.replace(
        "Q1", "The document.\n\nQ1"
    )
