"""RAPID as a LlamaIndex LLM: real SmolLM2 with int8 weights, in engines, in chats and called by itself."""

from __future__ import annotations

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ImageBlock
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.schema import Document

from llamaindex_specrag import RapidLLM
from specrag.errors import InvalidInputError
from specrag.models import Sampling
from specrag.rapid import RapidGenerator, RapidSettings
from tests.llamaindex_parts import collecting, real_index
from tests.rapid_parts import generator


@pytest.fixture(scope="module")
def index(minilm, questions):
    return real_index(minilm, questions, words=1000)


@pytest.fixture
def collected():
    with collecting() as events_and_spans:
        yield events_and_spans


@pytest.fixture(scope="module")
def rapid(quick_smollm2, minilm):
    generator = RapidGenerator(quick_smollm2, sampling=Sampling(), proposer="sparse", candidates=3, embedder=minilm)
    return RapidLLM(rapid=generator, max_tokens=6)


@pytest.mark.slow
def test_rapid_serves_engines_and_chats(index, quick_smollm2, minilm, questions):
    made, _ = index
    llm = RapidLLM(rapid=RapidGenerator(quick_smollm2, sampling=Sampling(), embedder=minilm), max_tokens=8)
    engine = made.as_query_engine(llm=llm, similarity_top_k=6)
    response = engine.query(questions[0].question)
    assert str(response) and llm.sessions[-1].tokens > 300  # the template's context part became the session
    chat = CondensePlusContextChatEngine.from_defaults(made.as_retriever(similarity_top_k=3), llm=llm)
    assert str(chat.chat(questions[0].question))
    assert "".join(chat.stream_chat("Tell me more.").response_gen)


def test_class_hierarchy():
    assert BaseLLM.__name__ in [parent.__name__ for parent in RapidLLM.__mro__]
    assert RapidLLM.class_name() == "RapidLLM"


def test_components_are_written_and_read(tiny_path):
    settings = {"candidates": [2, 0, 3], "tail": "target"}
    llm = RapidLLM(model=str(tiny_path), temperature=0.5, top_p=0.9, max_tokens=9, stop=["x"], settings=settings)
    written = llm.to_dict()
    assert written["model"] == str(tiny_path) and len(str(written)) < 2000  # a path, no weights
    read = RapidLLM.from_dict(written)
    assert read.to_dict() == written and read.metadata.context_window == 8192
    sampling = Sampling(temperature=0.5, top_p=0.9)
    assert read.settings == RapidSettings(candidates=(2, 0, 3), tail="target", sampling=sampling)
    assert RapidLLM.from_json(llm.to_json()).settings == read.settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 0.5, "typo": 3}, r"unknown settings typo: \w+ has model, .*temperature"),
        ({"settings": {"typo": 3}}, "unknown settings typo: RapidSettings has candidates"),
        ({"settings": {"sampling": {"typo": 3}}}, "unknown settings typo: Sampling has temperature"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"settings": RapidSettings(candidates=9)}, "give settings to the RapidGenerator"),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_range_is_an_error(tiny, fields, message):
    with pytest.raises(ValueError, match=message):
        RapidLLM(rapid=generator(tiny, candidates=2), **fields)


def test_settings_are_frozen_and_a_copy_shares_models_and_sessions(tiny_path, forward_passes):
    llm = RapidLLM(model=str(tiny_path), max_tokens=2, settings={"candidates": 0})
    for field in ("model", "drafter", "rapid", "settings", "quantization", "max_sessions"):
        with pytest.raises(ValueError, match="frozen"):
            setattr(llm, field, None)
    llm.complete("what?", documents="The turbine was checked. " * 40)
    read = forward_passes(llm.rapid.target.model)
    copy = llm.model_copy(update={"temperature": 0.3})
    copy.complete("what?", documents="The turbine was checked. " * 40)
    assert max(read) < 40 and copy.temperature == 0.3 and llm.temperature == 1.0
    assert llm.model_copy(update={"settings": {"candidates": 3}}).settings.candidates == 3


def test_every_field_has_its_description():
    assert all(RapidLLM.model_fields[name].description for name in RapidLLM.__annotations__ if name[0] != "_")


async def test_every_form_of_a_call_gives_the_same_reply_and_its_event_once(rapid, collected):
    events, _ = collected
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Say hello.")]
    whole = rapid.chat(messages)
    assert whole.message.content and whole.additional_kwargs["completion_tokens"] == 6
    assert [e.class_name() for e in events] == ["LLMChatStartEvent", "LLMChatEndEvent"]
    events.clear()
    parts = list(rapid.stream_chat(messages))
    assert "".join(p.delta for p in parts) == whole.message.content == parts[-1].message.content
    assert [e.class_name() for e in events].count("LLMChatEndEvent") == 1
    events.clear()
    assert (await rapid.achat(messages)).message.content == whole.message.content
    assert [e.class_name() for e in events] == ["LLMChatStartEvent", "LLMChatEndEvent"]
    events.clear()
    assert [p async for p in await rapid.astream_chat(messages)][-1].message.content == whole.message.content
    assert [e.class_name() for e in events].count("LLMChatEndEvent") == 1
    completed = rapid.complete("Say hello.")
    assert completed.text == (await rapid.acomplete("Say hello.")).text
    assert "".join(p.delta for p in rapid.stream_complete("Say hello.")) == completed.text
    assert [p async for p in await rapid.astream_complete("Say hello.")][-1].text == completed.text
    assert completed.additional_kwargs["rapid"]["acceptance"] >= 0


def test_options_and_refusals_of_rapid(rapid):
    assert rapid.complete("Say hello.", max_tokens=2).additional_kwargs["completion_tokens"] == 2
    word = rapid.complete("Say hello.").text.split()[1]
    assert word not in rapid.complete("Say hello.", stop=[word]).text
    document = Document(text="The turbine was checked in week seven. " * 20)
    rapid.complete("When?", documents=[document])
    assert rapid.sessions[-1].tokens > 100
    with pytest.raises(InvalidInputError, match="unknown options top_n"):
        rapid.complete("q", top_n=5)
    with pytest.raises(InvalidInputError, match="reads text, not ImageBlock"):
        rapid.chat([ChatMessage(blocks=[ImageBlock(url="http://127.0.0.1/x.png")])])
    with pytest.raises(InvalidInputError, match="give model="):
        RapidLLM()
