"""LlamaIndex LLMs and embedding models as drafters, verifiers and embedders."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from typing import Any

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    LogProb,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool
from pydantic import Field

from llamaindex_specrag import SpeculativeRAGQueryEngine, SpeculativeSynthesizer
from llamaindex_specrag._awaiting import embedder_awaits, llm_awaits
from llamaindex_specrag._convert import to_passage
from specrag.errors import DraftingError, InvalidInputError
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder
from tests.llamaindex_parts import FixedRetriever, ScriptedAgentLLM, engine_of, nodes
from tests.servers import serving

REPLY = "Rationale: because\nAnswer: Curie"


class SyncOnly(CustomLLM):
    """As most local LLMs of LlamaIndex: its awaited methods are the base's, which call the blocking ones."""

    seconds: float = 0.0
    together: Any = None  # a barrier: calls end only when so many are under way
    asked: list = Field(default_factory=list)
    ended: list = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata()

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **kwargs):
        self.asked.append(kwargs)
        if self.together:
            self.together.wait(60)
        time.sleep(self.seconds)
        self.ended.append(1)
        return CompletionResponse(text=REPLY)

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError


class BlockingAwaited(SyncOnly):
    """Its own awaited method only calls the blocking one."""

    @llm_chat_callback()
    async def achat(self, messages, **kwargs):
        return ChatResponse(message=ChatMessage(role="assistant", content=self.complete("x").text))


class TwoDoors(SyncOnly):
    """Remembers which of its methods were used."""

    used: list = Field(default_factory=list)

    @llm_chat_callback()
    def chat(self, messages, **kwargs):
        self.used.append("chat")
        return ChatResponse(message=ChatMessage(role="assistant", content=REPLY))

    @llm_chat_callback()
    async def achat(self, messages, **kwargs):
        await asyncio.sleep(0)
        self.used.append("achat")
        return ChatResponse(message=ChatMessage(role="assistant", content=REPLY))


async def _ticks(during):
    """How often the event loop came by while ``during`` was awaited, and what it gave."""
    task, count = asyncio.ensure_future(during), 0
    while not task.done():
        await asyncio.sleep(0.01)
        count += 1
    return count, task.result()


@pytest.mark.parametrize("kind", [SyncOnly, BlockingAwaited])
async def test_llms_that_block_serve_their_drafts_side_by_side_and_leave_the_loop_free(kind):
    engine = engine_of(kind(seconds=0.2, together=threading.Barrier(4)), drafts=4)
    ticks, response = await _ticks(engine.aquery("q"))
    assert str(response) == "Curie" and response.metadata["failures"] == []
    assert ticks > 1
    response = await asyncio.to_thread(engine.query, "q")
    assert str(response) == "Curie" and response.metadata["failures"] == []


@pytest.mark.parametrize("kind", [SyncOnly, BlockingAwaited])
async def test_a_deadline_holds_over_llms_that_block(kind):
    llm = kind(seconds=3.0)
    response = await engine_of(llm, drafts=2, deadline=0.2).aquery("q")
    assert response.metadata["abstained"] and not llm.ended


@pytest.mark.parametrize(
    "raw", [{"stop_reason": "max_tokens"}, {"choices": [{"finish_reason": "length"}]}, {"done_reason": "length"}]
)
def test_a_reply_that_was_cut_before_its_answer_is_no_answer_whoever_says_so(raw):
    class Cut(SyncOnly):
        def complete(self, prompt, formatted=False, **kwargs):
            return CompletionResponse(text="Rationale: She was the", raw=raw)

    with pytest.raises(DraftingError, match="wrote no answer"):
        engine_of(Cut(), drafts=2).query("q")


def test_blocking_calls_use_blocking_methods_and_awaited_calls_awaited_ones():
    llm = TwoDoors()
    engine = engine_of(llm, drafts=2)
    for ask, expected in (
        (lambda: engine.query("q"), "chat"),
        (lambda: asyncio.run(engine.aquery("q")), "achat"),
        (lambda: engine.query("q"), "chat"),
        (lambda: asyncio.run(engine.aquery("q")), "chat"),  # a client may be bound to the first event loop
        (lambda: asyncio.run(engine_of(llm, drafts=2).aquery("q")), "chat"),
    ):
        llm.used.clear()
        assert str(ask()) == "Curie" and set(llm.used) == {expected}


def test_which_methods_really_await():
    assert [llm_awaits(llm) for llm in (SyncOnly(), BlockingAwaited(), TwoDoors())] == [False, False, True]


# --- embedding models -----------------------------------------------------------------------------------


class SlowEmbedding(BaseEmbedding):
    def _get_text_embedding(self, text):
        time.sleep(0.03)
        return HashEmbedder().embed([text])[0].tolist()

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


async def test_an_embedding_model_that_blocks_leaves_the_loop_free():
    model = SlowEmbedding()
    assert not embedder_awaits(model)
    ticks, response = await _ticks(engine_of(TwoDoors(), embedder=model).aquery("q"))
    assert str(response) == "Curie" and ticks > 8


# --- the endpoint that is called ------------------------------------------------------------------------


class Completing(CustomLLM):
    """As ``OpenAILike`` without ``is_chat_model``: the options go to the endpoint for completions."""

    logprobs: bool | None = None
    top_logprobs: int = 0
    max_tokens: int | None = None
    temperature: float = 0.1
    asked: list = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=False)

    def complete(self, prompt, formatted=False, **kwargs):
        if "top_logprobs" in kwargs or isinstance(kwargs.get("logprobs"), bool):
            raise TypeError("create() got an unexpected keyword argument 'top_logprobs'")
        self.asked.append({**kwargs, "formatted": formatted, "prompt": prompt})
        texts = ["Yes"] if "Yes or No" in prompt else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        logged = [[LogProb(token=text, logprob=-0.25), LogProb(token="x", logprob=-3)] for text in texts]
        return CompletionResponse(text="".join(texts), logprobs=logged)

    stream_complete = complete


def test_options_follow_the_endpoint_for_completions():
    llm = Completing()
    response = engine_of(llm, drafts=2, scoring=Scoring(scores=("draft", "self_reflect"))).query("q")
    assert str(response) == "Curie" and response.metadata["failures"] == []
    assert response.metadata["scores_used"] == ["draft", "self_reflect"]
    assert sorted(asked["logprobs"] for asked in llm.asked) == [1, 1, 5, 5]
    assert all(asked["formatted"] and "user:" in asked["prompt"] for asked in llm.asked)


@pytest.mark.parametrize("chat", [False, True])
def test_openai_like_drafts_and_verifies_over_either_endpoint(chat):
    like = pytest.importorskip("llama_index.llms.openai_like")
    asked = []

    def answer(method, path, body, headers):
        given = json.loads(body)
        asked.append((path, given))
        shown = json.dumps(given.get("messages") or given["prompt"])
        texts = ["Yes"] if "Yes or No" in shown else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        usage = {"prompt_tokens": 9, "completion_tokens": len(texts), "total_tokens": 9 + len(texts)}
        made = {"id": "1", "created": 1, "model": "m", "usage": usage}
        if path.endswith("/chat/completions"):
            rows = [
                {
                    "token": t,
                    "bytes": None,
                    "logprob": -0.25,
                    "top_logprobs": [{"token": t, "logprob": -0.25, "bytes": None}],
                }
                for t in texts
            ]
            message = {"role": "assistant", "content": "".join(texts)}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": rows}}
        elif not isinstance(given.get("logprobs"), int) or isinstance(given["logprobs"], bool) or given["logprobs"] > 5:
            return 400, b'{"error": {"message": "logprobs must be an integer of at most 5"}}', {}
        else:
            logged = {
                "tokens": texts, "token_logprobs": [-0.25] * len(texts), "text_offset": [0] * len(texts),
                "top_logprobs": [{t: -0.25} for t in texts],
            }  # fmt: skip
            choice = {"index": 0, "text": "".join(texts), "finish_reason": "stop", "logprobs": logged}
        return 200, json.dumps({**made, "choices": [choice]}).encode(), {}

    with serving(answer) as url:
        llm = like.OpenAILike(model="m", api_base=url, api_key="x", is_chat_model=chat, max_retries=0)
        engine = engine_of(llm, drafts=2, scoring=Scoring(scores=("draft", "self_reflect")))
        responses = [engine.query("q"), asyncio.run(engine.aquery("q")), engine.query("q")]
    for response in responses:
        assert str(response) == "Curie" and response.metadata["failures"] == []
        assert response.metadata["scores_used"] == ["draft", "self_reflect"]
        (best, _) = response.metadata["drafts"]
        assert best["log_self_reflect"] == pytest.approx(-0.25)
    endings = {path for path, _ in asked}
    assert endings == ({"/v1/chat/completions"} if chat else {"/v1/completions"})


# --- metadata -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", [math.nan, None, ["a", "b"], {"en": "a"}, "", True])
def test_a_title_that_is_none_is_no_title(title):
    passage = to_passage(NodeWithScore(node=TextNode(text="x", metadata={"title": title, "page": 3})))
    assert passage.title is None and passage.text == "page: 3\n\nx"


def test_a_number_as_title_stays_in_the_content():
    passage = to_passage(NodeWithScore(node=TextNode(text="x", metadata={"title": 7})))
    assert (passage.title, passage.text) == (None, "title: 7\n\nx")


def test_titles_and_vectors_are_read_where_they_are_some():
    node = TextNode(text="x", metadata={"title": "Radium"}, embedding=[1.0, 2.0])
    passage = to_passage(NodeWithScore(node=node, score=math.nan))
    assert (passage.title, passage.score) == ("Radium", None) and passage.embedding.tolist() == [1.0, 2.0]
    assert to_passage(NodeWithScore(node=TextNode(text="x", embedding=[math.nan, 1.0]))).embedding is None


def test_bare_texts_may_be_one():
    synthesizer = engine_of(TwoDoors())._response_synthesizer
    assert synthesizer.get_response("q", "one text") == synthesizer.get_response("q", ["one text"]) == "Curie"
    response = synthesizer.synthesize("q", nodes(1))
    assert len(response.metadata["drafts"]) == 1


async def test_an_engine_without_a_synthesizer_drafts_and_asks_no_default_llm():
    engine = SpeculativeRAGQueryEngine(FixedRetriever(nodes()), drafter=TwoDoors(), embedder=HashEmbedder())
    assert str(engine.query("q")) == str(await engine.aquery("q")) == "Curie"
    with pytest.raises(InvalidInputError, match="give drafts to the response_synthesizer"):
        SpeculativeRAGQueryEngine(FixedRetriever([]), SpeculativeSynthesizer(TwoDoors()), drafts=3)


@pytest.mark.parametrize("question", ["", "  "])
async def test_a_function_agent_reads_why_its_question_was_refused(question):
    class Asking(ScriptedAgentLLM):
        def _reply(self, messages, tools):
            reply = super()._reply(messages, tools)
            for call in reply.message.additional_kwargs.get("calls", []):
                call.tool_kwargs = {"input": question}
            return reply

    tool = QueryEngineTool.from_defaults(engine_of(TwoDoors()), name="ask", description="Asks.")
    agent = FunctionAgent(name="asker", description="Asks.", tools=[tool], llm=Asking())
    assert "question" in str(await agent.run("who?"))
