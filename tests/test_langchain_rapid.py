"""ChatRapid and RapidLLM on real SmolLM2 with int8 weights; tools on a template that knows them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from pydantic import BaseModel, ValidationError

from langchain_specrag import ChatRapid, RapidLLM
from specrag.errors import InvalidInputError
from specrag.models import Sampling, TransformersLM
from specrag.rapid import RapidChat, RapidGenerator, RapidSettings
from specrag.rapid.conversation import conversation
from tests.rapid_parts import TOOL_TEMPLATE, generator

NOTES = "The turbine of hall seven was checked in week seven of the year. " * 16


@pytest.fixture(scope="module")
def rapid(quick_smollm2, minilm):
    """With a fixed number of candidates, so that every run repeats, from a drafter that has nothing to read."""
    return RapidGenerator(quick_smollm2, sampling=Sampling(), proposer="sparse", candidates=3, embedder=minilm)


@pytest.fixture(scope="module")
def chat(rapid):
    """One for all: the report is read once."""
    return ChatRapid(rapid=rapid, max_tokens=12)


@pytest.fixture(scope="module")
def report(questions):
    return "\n\n".join(p.text for p in questions[0].passages)


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def test_a_stream_carries_text_usage_and_how_it_was_decoded(chat, report):
    whole = chat.invoke("what is this about?", documents=[Document(report)])
    parts = list(chat.stream("what is this about?", documents=[report]))
    assert "".join(str(part.content) for part in parts) == whole.content and whole.content
    assert sum(bool(part.content) for part in parts) > 3
    assert whole.usage_metadata == parts[-1].usage_metadata
    assert whole.usage_metadata["output_tokens"] == 12 and whole.usage_metadata["input_tokens"] > 1000
    assert whole.response_metadata["finish_reason"] == "length"
    decoded = whole.response_metadata["rapid"]
    assert len(decoded["schedule"]) + decoded["accepted"] == 11 and 0 <= decoded["acceptance"] <= 1


def test_a_conversation_goes_on_in_its_session(tiny, forward_passes):
    rapid = generator(tiny, candidates=0)
    chat = ChatRapid(rapid=rapid, max_tokens=8)
    messages = [SystemMessage("Be brief."), HumanMessage(f"{NOTES}\n\nWhat is this about?")]
    reply = chat.invoke(messages)
    read = forward_passes(rapid.target.model)
    messages += [reply, HumanMessage("And in one word?")]
    again = chat.invoke(messages)
    # The new context is the old prompt and the reply; it begins alike, so little is read anew by the target.
    fresh = ChatRapid(rapid=generator(tiny, candidates=0), max_tokens=8)
    reused = sum(read)
    read.clear()
    assert fresh.invoke(messages).content == again.content
    assert reused < sum(read) / 2 and len(chat.sessions) == 1


@pytest.mark.slow
def test_stop_and_sampling_per_call(chat, report):
    whole = str(chat.invoke("what is this about?", documents=[report], max_tokens=24).content)
    word = whole.split()[2]
    stopped = chat.invoke("what is this about?", documents=[report], stop=[word])
    assert stopped.content == whole[: whole.index(word)] and stopped.response_metadata["finish_reason"] == "stop"
    warm = [chat.invoke("what?", documents=[report], temperature=1.5, seed=seed).content for seed in (1, 2)]
    assert warm[0] != warm[1]
    with pytest.raises(InvalidInputError, match="unknown options top_n"):
        chat.invoke("q", top_n=5)


def test_top_k_and_top_p_per_call(tiny):
    chat = ChatRapid(rapid=generator(tiny, transfer="none", candidates=3), max_tokens=8)
    greedy = chat.invoke("hello").content
    assert chat.invoke("hello", temperature=1.5, seed=1).content != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):  # one token is left to draw from
        assert chat.invoke("hello", temperature=1.5, seed=1, **narrow).content == greedy


async def test_it_answers_asynchronously_and_in_batches(rapid):
    chat = ChatRapid(rapid=rapid, max_tokens=4)
    whole = chat.invoke("Say hello.").content
    assert (await chat.ainvoke("Say hello.")).content == whole
    assert "".join([str(part.content) async for part in chat.astream("Say hello.")]) == whole
    assert [m.content for m in chat.batch(["Say hello."] * 2)] == [whole] * 2


def test_the_text_interface(rapid, chat):
    llm = RapidLLM(rapid=rapid, max_tokens=12)
    prompt = f"{NOTES}\n\nWhat is this about?"
    text = llm.invoke(prompt)
    assert text and "".join(llm.stream(prompt)) == text
    assert llm.sessions[-1].tokens > llm.get_num_tokens(NOTES) > 200 and llm.get_num_tokens("one two") == 2
    assert text == chat.invoke(prompt).content


# --- settings -------------------------------------------------------------------------------------------


def test_a_model_is_written_by_its_path_and_read_again(tiny_path):
    chat = ChatRapid(model=str(tiny_path), temperature=0, top_k=3, settings={"candidates": [2, 0, 3], "tail": "target"})
    read = load(dumpd(chat), allowed_objects=[ChatRapid], valid_namespaces=["langchain_specrag"])
    assert read.model_dump() == chat.model_dump() and read.model == str(tiny_path)
    assert read.settings == RapidSettings(candidates=[2, 0, 3], tail="target", sampling=Sampling(top_k=3))


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_settings_reach_the_core_whole_and_given_sampling_wins(tiny, kind):
    rapid = generator(tiny, candidates=2, sampling=Sampling(temperature=0.5, top_p=0.8))
    model = kind(rapid=rapid, top_p=0.9, seed=3)
    sampled = Sampling(temperature=0.5, top_p=0.9, seed=3)
    assert model.settings == RapidSettings(candidates=2, window=32, sampling=sampled)
    assert (model.temperature, model.top_k, model.top_p, model.seed) == (0.5, 0, 0.9, 3)
    assert kind(rapid=rapid, settings=model.settings).settings == model.settings
    cooler = model.configurable_fields(temperature=ConfigurableField(id="temperature"))
    assert cooler.with_config(configurable={"temperature": 0.0}).invoke("hello", max_tokens=2)


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_a_configured_copy_reads_no_document_and_loads_no_model_again(tiny_path, kind, forward_passes, monkeypatch):
    model = kind(model=str(tiny_path), max_tokens=2, settings={"candidates": 0})
    configurable = model.configurable_fields(
        temperature=ConfigurableField(id="temperature"), max_tokens=ConfigurableField(id="max_tokens")
    )
    monkeypatch.setattr("specrag.rapid.chat.TransformersLM", None)  # nothing is loaded from here on
    configurable.invoke("what?", documents=NOTES)
    read = forward_passes(model.rapid.target.model)
    for given in ({"temperature": 0.7}, {"temperature": 0.1, "max_tokens": 3}, {}):
        configurable.with_config(configurable=given).invoke("what?", documents=NOTES)
    copy = model.model_copy(update={"temperature": 0.3, "top_k": 2})
    copy.invoke("what?", documents=NOTES)
    assert max(read) < 40 and len(model.sessions) == len(copy.sessions) == 1  # only the question
    assert (copy.temperature, copy.top_k, copy.max_tokens, model.temperature) == (0.3, 2, 2, 1.0)


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_a_copy_with_other_models_or_settings_has_them(tiny_path, tiny, kind):
    model = kind(model=str(tiny_path), settings={"candidates": 0})
    other = model.model_copy(update={"settings": {"candidates": 3}})
    assert other.settings.candidates == 3 and other.rapid.settings.candidates == 3
    assert other.rapid.target is model.rapid.target
    faster = model.model_copy(update={"quantization": "int8"})
    assert faster.rapid.target is not model.rapid.target and faster.rapid.target.quantization == "int8"
    own = kind(rapid=generator(tiny, candidates=0))
    with pytest.raises(ValueError, match="give model= or rapid="):
        own.model_copy(update={"model": str(tiny_path)})


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
@pytest.mark.parametrize("field", ["model", "drafter", "rapid", "settings", "quantization", "max_sessions"])
def test_what_was_used_when_the_models_were_loaded_cannot_be_changed(tiny, kind, field):
    model = kind(rapid=generator(tiny, candidates=0))
    with pytest.raises(ValueError, match="frozen"):
        setattr(model, field, None)
    asked = model.invoke("hello", temperature=0, max_tokens=3)
    model.max_tokens, model.temperature = 3, 0.0  # what counts in each call can
    again = model.invoke("hello")
    assert again == asked if kind is RapidLLM else again.content == asked.content


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.5, "typo": 3}, r"unknown settings typo: \w+ has model, .*temperature"),
        ({"settings": {"typo": 3}}, "unknown settings typo: RapidSettings has candidates"),
        ({"settings": {"sampling": {"typo": 3}}}, "unknown settings typo: Sampling has temperature"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"settings": RapidSettings(candidates=9)}, "give settings to the RapidGenerator"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_range_is_an_error(tiny, kind, fields, message):
    with pytest.raises(ValidationError, match=message):
        kind(rapid=generator(tiny, candidates=2), **fields)


def test_bad_input_says_what_to_do(chat):
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
def with_tools(quick_smollm2, minilm):
    lm = TransformersLM(quick_smollm2.model, quick_smollm2.tokenizer, chat_template=TOOL_TEMPLATE)
    return ChatRapid(rapid=RapidGenerator(lm, sampling=Sampling(), embedder=minilm), max_tokens=8)


@pytest.fixture
def replying(monkeypatch):
    """Real prompts, and the ``reply`` that a larger model would give."""
    said = SimpleNamespace(reply="", prompt="")

    def stream(self, messages, *, documents=(), tools=(), **options):
        prompt, _ = conversation(self.rapid.target.encoder, messages, documents, tools)
        said.prompt = prompt.head + prompt.context + prompt.tail
        yield from (said.reply[i : i + 5] for i in range(0, len(said.reply), 5))

    monkeypatch.setattr(RapidChat, "stream", stream)
    return said


def test_tools_are_shown_and_calls_are_read(with_tools, replying):
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
    (chunk, _) = bound.stream("q")
    assert chunk.content == replying.reply and not chunk.tool_calls
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


def test_structured_output_is_asked_for_and_parsed(chat, replying):
    replying.reply = '{"name": "Paris", "people": 2100000}'
    assert chat.with_structured_output(City).invoke("Paris?") == City(name="Paris", people=2100000)
    assert '"people"' in replying.prompt
    assert chat.with_structured_output(City.model_json_schema()).invoke("Paris?") == json.loads(replying.reply)
    replying.reply = "no JSON"
    result = chat.with_structured_output(City, include_raw=True).invoke("Paris?")
    assert result["parsed"] is None and result["parsing_error"] is not None and result["raw"].content == "no JSON"
