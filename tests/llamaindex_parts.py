"""What the tests of the LlamaIndex adapter share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import faiss
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, LogProb
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import Document, NodeWithScore, TextNode
from llama_index.vector_stores.faiss import FaissVectorStore
from pydantic import Field

from llamaindex_specrag import SpeculativeRAGQueryEngine
from tests.fakes import HashEmbedder, first_passage_lm, shortened


class Embedding(BaseEmbedding):
    """A core embedder as LlamaIndex's; counts what it is asked for."""

    core: Any
    texts: list = Field(default_factory=list)

    def _get_text_embedding(self, text):
        self.texts.append(text)
        return self.core.embed([text])[0].tolist()

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


class FixedRetriever(BaseRetriever):
    def __init__(self, nodes):
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle):
        return self.nodes


def nodes(count: int = 6, **fields) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=f"passage {i}", id_=str(i), **fields), score=1 - i / 10) for i in range(count)
    ]


def engine_of(drafter=None, found=None, **settings: Any) -> SpeculativeRAGQueryEngine:
    settings.setdefault("embedder", HashEmbedder())
    return SpeculativeRAGQueryEngine.from_args(
        FixedRetriever(nodes() if found is None else found), drafter or first_passage_lm(), **settings
    )


def real_index(embedder, questions, words: int = 40) -> tuple[VectorStoreIndex, Embedding]:
    """The first ``words`` of three questions' passages in FAISS, and the embedding model that they went through."""
    embedding = Embedding(core=embedder)
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
    documents = [
        Document(text=p.text, metadata={"title": p.title or ""})
        for q in questions[:3]
        for p in shortened(q.passages[:6], words)
    ]
    made = VectorStoreIndex.from_documents(
        documents, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embedding
    )
    embedding.texts.clear()
    return made, embedding


class Collecting(BaseEventHandler):
    events: list = Field(default_factory=list)

    @classmethod
    def class_name(cls):
        return "Collecting"

    def handle(self, event, **kwargs):
        self.events.append(event)


@contextlib.contextmanager
def collecting() -> Iterator[tuple[list, SimpleSpanHandler]]:
    """The events and spans of every dispatcher inside the ``with`` block."""
    root = get_dispatcher()
    events, spans = Collecting(), SimpleSpanHandler()
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield events.events, spans
    root.event_handlers.remove(events)
    root.span_handlers.remove(spans)


class WithLogProbs(CustomLLM):
    """Answers as LlamaIndex's ``OpenAI`` does when asked for log-probabilities."""

    logprobs: bool | None = None
    top_logprobs: int = 0
    asked: list = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True)

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete

    @llm_chat_callback()
    async def achat(self, messages, **kwargs):
        self.asked.append(kwargs)
        texts = ["Yes"] if kwargs["top_logprobs"] > 1 else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        positions = [[LogProb(token="x", logprob=-3), LogProb(token=t, logprob=-0.25)] for t in texts]
        return ChatResponse(
            message=ChatMessage(role="assistant", content="".join(texts)),
            logprobs=positions,
            additional_kwargs={"prompt_tokens": 9, "completion_tokens": len(texts)},
        )


class ScriptedAgentLLM(FunctionCallingLLM):
    """Calls its first tool, then says what the tool said."""

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True)

    def _prepare_chat_with_tools(self, tools, user_msg=None, chat_history=None, **kwargs):
        return {"messages": [*(chat_history or []), *([user_msg] if user_msg else [])], "tools": tools}

    def get_tool_calls_from_response(self, response, error_on_no_tool_call=True, **kwargs):
        return response.message.additional_kwargs.get("calls", [])

    def _reply(self, messages, tools):
        if messages[-1].role == "tool":
            return ChatResponse(message=ChatMessage(role="assistant", content=f"It says: {messages[-1].content}"))
        call = ToolSelection(tool_id="1", tool_name=tools[0].metadata.name, tool_kwargs={"input": "who?"})
        message = ChatMessage(role="assistant", content="", additional_kwargs={"calls": [call]})
        return ChatResponse(message=message)

    async def achat(self, messages, **kwargs):
        return self._reply(messages, kwargs.get("tools"))

    async def astream_chat(self, messages, **kwargs):
        async def one():
            yield self._reply(messages, kwargs.get("tools"))

        return one()

    def chat(self, messages, **kwargs):
        raise NotImplementedError

    stream_chat = complete = stream_complete = chat
    acomplete = astream_complete = achat
