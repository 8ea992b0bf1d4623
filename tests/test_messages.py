"""What the frameworks hand to RAPID, read as the core's: messages of other models, and documents in any form."""

from types import SimpleNamespace

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from llama_index.core.base.llms.types import (
    CachePoint,
    CitableBlock,
    CitationBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.base.llms.types import ChatMessage as LlamaMessage
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import NodeWithScore, TextNode

from langchain_specrag._messages import to_message
from llamaindex_specrag._messages import to_messages
from specrag import Passage
from specrag.errors import InvalidInputError
from specrag.rapid import Message, ToolCall
from specrag.rapid.chat import RapidChat
from specrag.rapid.conversation import conversation, document_texts
from tests.rapid_parts import generator

CALL = ToolCall("weather", {"city": "Paris"})


# --- LangChain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks",
    [
        [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "So."}],
        [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "So."}],
        [{"type": "reasoning", "summary": []}, {"type": "output_text", "text": "So."}],
        [{"type": "reasoning_content", "reasoning_content": {"text": "Hm."}}, "So."],
        [{"type": "text", "text": "So."}, {"type": "web_search_call", "id": "1"}],
        [{"type": "text", "text": None}, {"type": "text", "text": "So."}],
    ],
)
def test_what_another_model_thought_is_left_out(blocks):
    assert to_message(AIMessage(blocks)) == Message("assistant", "So.")


def test_calls_of_another_model_are_read_once():
    call = {"name": "weather", "args": {"city": "Paris"}, "id": "1"}
    for block in (
        {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Paris"}},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Paris"}'},
    ):
        message = AIMessage([{"type": "text", "text": "Let me see."}, block], tool_calls=[call])
        assert to_message(message) == Message("assistant", "Let me see.", (CALL,))


def test_a_call_that_could_not_be_read_is_shown_as_text():
    broken = {"type": "invalid_tool_call", "name": "weather", "args": "{city", "id": "1", "error": None}
    message = AIMessage("Let me see.", invalid_tool_calls=[broken])
    assert to_message(message) == Message("assistant", "Let me see.\n<tool_call>\nweather: {city\n</tool_call>")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (ChatMessage("S", role="developer"), Message("system", "S")),
        (SystemMessage("S", additional_kwargs={"__openai_role__": "developer"}), Message("system", "S")),
        (ChatMessage("Q", role="user"), Message("user", "Q")),
        (FunctionMessage("sunny", name="weather"), Message("tool", "sunny")),
        (ToolMessage([{"type": "text", "text": "sunny"}], tool_call_id="1"), Message("tool", "sunny")),
        (AIMessageChunk("So."), Message("assistant", "So.")),
        (HumanMessage([{"type": "text-plain", "text": "Q", "mime_type": "text/plain"}]), Message("user", "Q")),
    ],
)
def test_every_role_has_its_place(message, expected):
    assert to_message(message) == expected


def test_images_and_unknown_roles_are_refused():
    for message in (
        HumanMessage([{"type": "image", "url": "x"}]),
        AIMessage([{"type": "image", "url": "x"}]),
        ToolMessage([{"type": "image", "url": "x"}], tool_call_id="1"),
    ):
        with pytest.raises(InvalidInputError, match="ChatRapid reads text, not image"):
            to_message(message)
    with pytest.raises(InvalidInputError, match="of the role 'oracle'"):
        to_message(ChatMessage("x", role="oracle"))


# --- LlamaIndex -----------------------------------------------------------------------------------------


def test_llamaindex_blocks_of_thoughts_and_calls_are_read():
    call = ToolCallBlock(tool_call_id="1", tool_name="weather", tool_kwargs={"city": "Paris"})
    written = ToolCallBlock(tool_name="weather", tool_kwargs='{"city": "Paris"}')
    assert to_messages(
        [
            LlamaMessage(role="developer", content="S"),
            LlamaMessage(role="assistant", blocks=[ThinkingBlock(content="Hm."), TextBlock(text="So."), call, written]),
            LlamaMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": "1"}),
            LlamaMessage(role="function", content="rain"),
            LlamaMessage(role="chatbot", content="A"),
            LlamaMessage(role="model", content="B"),
        ]
    ) == [
        Message("system", "S"),
        Message("assistant", "So.", (CALL, CALL)),
        Message("tool", "sunny"),
        Message("tool", "rain"),
        Message("assistant", "A"),
        Message("assistant", "B"),
    ]


def test_llamaindex_texts_that_may_be_cited_are_read_and_marks_for_a_cache_are_not():
    cited = CitationBlock(cited_content="radium", source="s", title="t", additional_location_info={})
    assert to_messages(
        [
            LlamaMessage(
                role="user",
                blocks=[
                    CitableBlock(title="t", source="s", content="A report."),
                    CachePoint(cache_control={"type": "ephemeral"}),
                    TextBlock(text="Who?"),
                ],
            ),
            LlamaMessage(role="assistant", blocks=[TextBlock(text="Curie."), cited]),
        ]
    ) == [Message("user", "A report.\nWho?"), Message("assistant", "Curie.")]
    picture = CitableBlock(title="t", source="s", content=[ImageBlock(image=b"x")])
    with pytest.raises(InvalidInputError, match="RapidLLM reads text, not ImageBlock"):
        to_messages([LlamaMessage(role="user", blocks=[picture])])


def test_llamaindex_calls_beside_the_blocks_are_read():
    as_mapping = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    as_object = SimpleNamespace(function=SimpleNamespace(name="weather", arguments='{"city": "Paris"}'))
    message = LlamaMessage(role="assistant", content="", additional_kwargs={"tool_calls": [as_mapping, as_object]})
    assert to_messages([message]) == [Message("assistant", "", (CALL, CALL))]


def test_arguments_that_are_no_object_are_shown_as_text():
    message = LlamaMessage(role="assistant", blocks=[ToolCallBlock(tool_name="weather", tool_kwargs="Paris")])
    assert to_messages([message]) == [Message("assistant", "<tool_call>\nweather: Paris\n</tool_call>")]


def test_llamaindex_images_are_refused():
    with pytest.raises(InvalidInputError, match="RapidLLM reads text, not ImageBlock"):
        to_messages([LlamaMessage(blocks=[ImageBlock(url="http://127.0.0.1/x.png")])])


# --- the core -------------------------------------------------------------------------------------------


def test_a_developers_message_is_a_system_message_and_an_empty_result_is_one(tiny_qwen):
    encoder = tiny_qwen.encoder
    rows = [Message("developer", "S"), Message("user", "Q"), Message("assistant", "", (CALL,)), Message("tool", "")]
    prompt, question = conversation(encoder, rows)
    assert prompt.context.startswith("<|im_start|>system\nS<|im_end|>") and question == "null"


@pytest.mark.parametrize(
    "document",
    [
        "The report.",
        Document("The report."),
        LlamaDocument(text="The report."),
        TextNode(text="The report."),
        NodeWithScore(node=TextNode(text="The report.")),
        Passage("The report."),
    ],
)
def test_one_document_is_one_document_and_not_its_letters_or_fields(document):
    assert document_texts(document) == document_texts([document]) == ["The report."]
    assert document_texts(iter([document, "More."])) == ["The report.", "More."]


def test_one_text_reaches_the_model_whole(tiny):
    chat = RapidChat(generator(tiny, candidates=0))
    chat.complete([Message("user", "why?")], documents="The report.", max_tokens=1)
    assert "The report." in tiny.tokenizer.decode(chat.sessions[-1].prompt.context)


@pytest.mark.parametrize("documents", [5, b"text", {"text": "x"}, [None], ["a", 5], [["a"]]])
def test_what_is_no_document_is_refused(documents):
    with pytest.raises(InvalidInputError, match="documents are texts, or objects with page_content or text, got"):
        document_texts(documents)


def test_no_documents_are_none():
    assert document_texts(None) == document_texts([]) == ()
