"""Models and retrievers behind other Runnables, and one model used in blocking and in awaited calls."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError

from langchain_specrag import MultiPerspectiveRetriever, SpeculativeRAGRunnable, create_speculative_rag_chain
from specrag.errors import DraftingError, InvalidInputError
from tests.fakes import HashEmbedder, first_passage_lm
from tests.langchain_parts import FixedRetriever, documents
from tests.servers import serving

REPLY = "Rationale: r\nAnswer: Curie"


class Recording(FakeListChatModel):
    """Remembers what it is asked for."""

    temperature: float | None = None
    max_tokens: int | None = None
    asked: list = []  # noqa: RUF012 - a pydantic field

    def _call(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked.append({**kwargs, "stop": stop})
        return super()._call(messages, stop, run_manager, **kwargs)


def answer_of(drafter, **settings):
    rag = SpeculativeRAGRunnable(drafter=drafter, embedder=HashEmbedder(), drafts=2, **settings)
    return rag.invoke({"input": "who discovered radium", "context": documents()})


def model(**fields) -> Recording:
    return Recording(responses=[REPLY], asked=[], **fields)


WRAPPED = {
    "bind": lambda m: m.bind(stop=["###"]),
    "with_config": lambda m: m.with_config(run_name="mine"),
    "with_retry": lambda m: m.with_retry(),
    "with_fallbacks": lambda m: m.with_fallbacks([model()]),
    "configurable_fields": lambda m: m.configurable_fields(temperature=ConfigurableField(id="t")),
    "configurable_alternatives": lambda m: m.configurable_alternatives(ConfigurableField(id="m"), other=model()),
    "several": lambda m: m.with_retry().with_fallbacks([model()]).with_config(tags=["x"]),
    "a chain to a message": lambda m: ChatPromptTemplate.from_messages([("placeholder", "{it}")]) | m,
    "a chain to text": lambda m: m | StrOutputParser(),
    "a function": lambda m: RunnableLambda(lambda messages: REPLY),
}


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "a chain to a message"])
def test_a_wrapped_model_drafts_as_the_plain_one(name):
    inner = model()
    result = answer_of(WRAPPED[name](inner))
    assert (result["answer"], result["details"]["failures"]) == ("Curie", [])


@pytest.mark.parametrize("name", ["bind", "with_retry", "with_fallbacks", "several"])
def test_options_reach_a_wrapped_model(name):
    inner = model()
    answer_of(WRAPPED[name](inner))
    assert inner.asked and all({"temperature", "max_tokens"} <= set(asked) for asked in inner.asked)


def test_what_the_user_bound_stays():
    inner = model()
    answer_of(inner.bind(temperature=0.7, max_tokens=9).with_retry())
    assert [(asked["temperature"], asked["max_tokens"]) for asked in inner.asked] == [(0.7, 9)] * 2


def test_a_retry_and_a_fallback_do_their_work():
    calls = []

    def once_away(messages):
        calls.append(messages)
        if len(calls) == 1:
            raise RuntimeError("away")
        return AIMessage(REPLY)

    assert answer_of(RunnableLambda(once_away).with_retry(wait_exponential_jitter=False))["details"]["failures"] == []

    def away(messages):
        raise RuntimeError("away")

    assert answer_of(RunnableLambda(away).with_fallbacks([model()]))["answer"] == "Curie"


@pytest.mark.parametrize("told", [{"stop_reason": "max_tokens"}, {"finish_reason": "length"}])
def test_a_reply_that_was_cut_before_its_answer_is_no_answer_whoever_says_so(told):
    cut = RunnableLambda(lambda messages: AIMessage("Rationale: She was the", response_metadata=told))
    with pytest.raises(DraftingError, match="wrote no answer"):
        answer_of(cut)


def test_only_the_text_of_a_message_in_parts_is_read():
    parts = [
        {"type": "thinking", "thinking": "Answer: 7", "signature": "x"},
        {"type": "reasoning_text", "text": "Answer: 8"},
        {"type": "output_text", "text": "Rationale: r\n"},
        "Answer: Curie",
    ]
    assert answer_of(RunnableLambda(lambda messages: AIMessage(parts)))["answer"] == "Curie"


def test_a_reply_that_is_no_message_says_so():
    with pytest.raises(Exception, match="RunnableLambda gave a dict, expected an AI message or text"):
        answer_of(RunnableLambda(lambda messages: {"answer": "Curie"}))


def test_a_retriever_is_no_drafter():
    with pytest.raises(ValueError, match="drafter must be a specrag LanguageModel"):
        SpeculativeRAGRunnable(drafter=FixedRetriever(documents=[]).with_retry())


# --- retrievers -----------------------------------------------------------------------------------------

WRAPPED_RETRIEVERS = {
    "with_config": lambda r: r.with_config(tags=["x"]),
    "with_retry": lambda r: r.with_retry(),
    "with_fallbacks": lambda r: r.with_fallbacks([r]),
    "configurable_fields": lambda r: r.configurable_fields(tags=ConfigurableField(id="t")),
    "several": lambda r: r.with_retry().with_fallbacks([r]).with_config(tags=["x"]),
    "a reranker behind it": lambda r: r.with_retry() | RunnableLambda(lambda found: found[::-1]),
}


class Counting(Embeddings):
    def __init__(self):
        self.texts = 0

    def embed_documents(self, texts):
        self.texts += len(texts)
        return HashEmbedder().embed(texts).tolist()

    def embed_query(self, text):
        return HashEmbedder().embed([text])[0].tolist()


@pytest.mark.parametrize("name", WRAPPED_RETRIEVERS)
def test_a_wrapped_retriever_is_given_the_question_and_its_stores_vectors_are_used(name):
    embeddings = Counting()
    store = InMemoryVectorStore(embeddings)
    store.add_documents(documents())
    retriever = WRAPPED_RETRIEVERS[name](store.as_retriever(search_kwargs={"k": 6}))
    embeddings.texts = 0
    result = create_speculative_rag_chain(retriever, first_passage_lm()).invoke({"input": "who"})
    assert len(result["context"]) == 6 and not result["abstained"] and embeddings.texts == 0
    diverse = MultiPerspectiveRetriever(retriever=retriever, k=2)
    assert len(diverse.invoke("who")) == 2 and embeddings.texts == 0


async def test_any_runnable_from_a_question_to_documents_can_be_clustered():
    diverse = MultiPerspectiveRetriever(
        retriever=RunnableLambda(lambda question: [Document(f"{question} {i}") for i in range(6)]),
        embedder=HashEmbedder(),
    )
    assert len(diverse.invoke("q")) == len(await diverse.ainvoke("q")) == 2
    with pytest.raises((InvalidInputError, ValidationError), match="must be a LangChain retriever"):
        MultiPerspectiveRetriever(retriever="nothing")


# --- blocking and awaited calls -------------------------------------------------------------------------


@pytest.fixture
def chat_openai():
    openai = pytest.importorskip("langchain_openai")

    def answer(method, path, body, headers):
        if path.endswith("/embeddings"):
            texts = json.loads(body)["input"]
            rows = [{"index": i, "embedding": [1.0, float(i)]} for i in range(len(texts))]
            return (
                200,
                json.dumps({"data": rows, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode(),
                {},
            )
        message = {"role": "assistant", "content": REPLY}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return (
            200,
            json.dumps(
                {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            ).encode(),
            {},
        )

    with serving(answer) as url:
        key = {"api_key": "x", "base_url": url, "max_retries": 0}
        yield (
            openai.ChatOpenAI(model="m", **key),
            openai.OpenAIEmbeddings(model="m", check_embedding_ctx_length=False, **key),
        )


def test_one_model_serves_blocking_and_awaited_calls_in_any_order(chat_openai):
    model, embeddings = chat_openai
    rag = SpeculativeRAGRunnable(drafter=model, embedder=embeddings, drafts=3)
    inputs = {"input": "who discovered radium", "context": documents()}
    results = [
        rag.invoke(inputs), asyncio.run(rag.ainvoke(inputs)), rag.invoke(inputs), asyncio.run(rag.ainvoke(inputs)),
    ]  # fmt: skip
    assert [result["details"]["failures"] for result in results] == [[]] * 4
    assert [result["answer"] for result in results] == ["Curie"] * 4


def test_pipelines_and_models_that_share_a_client_work_on_every_event_loop(chat_openai):
    """All `ChatOpenAI` of one address have one client, whose connections belong to the event loop that opened them."""
    model, embeddings = chat_openai
    another = model.model_copy(update={"temperature": 0.5})
    inputs = {"input": "who discovered radium", "context": documents()}

    def asked(drafter):
        rag = SpeculativeRAGRunnable(drafter=drafter, embedder=embeddings, drafts=3)
        result = asyncio.run(rag.ainvoke(inputs))
        return result["answer"], result["details"]["failures"]

    for drafter in (model, model, another, model.bind(max_tokens=50), model.with_retry()):
        assert asked(drafter) == ("Curie", [])
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(asked, [model] * 4)) == [("Curie", [])] * 4


def test_connections_that_the_user_opened_on_another_event_loop_fail_no_draft(chat_openai):
    model, embeddings = chat_openai
    assert asyncio.run(model.ainvoke("hello")).content == REPLY
    rag = SpeculativeRAGRunnable(drafter=model, embedder=embeddings, drafts=3)
    result = asyncio.run(rag.ainvoke({"input": "who discovered radium", "context": documents()}))
    assert (result["answer"], result["details"]["failures"]) == ("Curie", [])


def test_what_can_only_be_awaited_serves_blocking_calls_too():
    async def reply(messages):
        await asyncio.sleep(0)
        return REPLY

    class Awaited(Embeddings):
        async def aembed_documents(self, texts):
            return [[1.0, float(i)] for i in range(len(texts))]

        async def aembed_query(self, text):
            return [1.0, 0.0]

        def embed_documents(self, texts):
            raise NotImplementedError

        embed_query = embed_documents

    inputs = {"input": "q", "context": documents()}
    for rag in [SpeculativeRAGRunnable(drafter=RunnableLambda(reply), embedder=Awaited(), drafts=3)] * 2:
        for result in (rag.invoke(inputs), asyncio.run(rag.ainvoke(inputs)), rag.invoke(inputs)):
            assert (result["answer"], result["details"]["failures"]) == ("Curie", [])


def test_an_error_of_the_model_is_not_taken_for_one_of_the_event_loop():
    asked = []

    async def reply(messages):
        asked.append("awaited")
        raise RuntimeError("the model is broken")

    def blocking(messages):
        asked.append("blocking")
        raise TypeError("no such thing")

    model = RunnableLambda(blocking, afunc=reply)
    rag = SpeculativeRAGRunnable(drafter=model, embedder=HashEmbedder(), drafts=1)
    with pytest.raises(DraftingError, match="the model is broken"):
        asyncio.run(rag.ainvoke({"input": "q", "context": documents()}))
    assert asked == ["awaited"]
    with pytest.raises(DraftingError, match="no such thing"):
        rag.invoke({"input": "q", "context": documents()})
    assert asked == ["awaited", "blocking"]


def test_a_model_without_awaited_methods_of_its_own_serves_its_drafts_side_by_side():
    together = threading.Barrier(12)  # more than the event loop has threads

    def slow(messages):
        together.wait(60)
        return REPLY

    rag = SpeculativeRAGRunnable(drafter=RunnableLambda(slow), embedder=HashEmbedder(), drafts=12, passages_per_draft=3)
    inputs = {"input": "q", "context": documents()}
    assert len(rag.invoke(inputs)["drafts"]) == 12
    assert len(asyncio.run(rag.ainvoke(inputs))["drafts"]) == 12


def test_a_deadline_leaves_no_event_loop_waiting_for_a_model_that_blocks():
    ended = []

    def slow(messages):
        time.sleep(3)
        ended.append(1)
        return REPLY

    rag = SpeculativeRAGRunnable(drafter=RunnableLambda(slow), embedder=HashEmbedder(), drafts=2, deadline=0.2)
    result = asyncio.run(rag.ainvoke({"input": "q", "context": documents()}))
    assert result["abstained"] and not ended


def test_langchains_own_history_keeps_a_chains_conversation():
    histories: dict[str, InMemoryChatMessageHistory] = {}
    chain = create_speculative_rag_chain(
        FixedRetriever(documents=documents()), first_passage_lm(), embedder=HashEmbedder(),
        condense=FakeListChatModel(responses=["When did Marie Curie discover radium?"]),
    )  # fmt: skip
    talking = RunnableWithMessageHistory(
        chain, lambda session_id: histories.setdefault(session_id, InMemoryChatMessageHistory()),
        input_messages_key="input", history_messages_key="chat_history", output_messages_key="answer",
    )  # fmt: skip
    config = {"configurable": {"session_id": "1"}}
    assert (
        talking.invoke({"input": "Who discovered radium?"}, config)["standalone_question"] == "Who discovered radium?"
    )
    second = talking.invoke({"input": "And when?"}, config)
    assert second["standalone_question"] == "When did Marie Curie discover radium?"
    assert [message.content for message in histories["1"].messages][::2] == ["Who discovered radium?", "And when?"]
