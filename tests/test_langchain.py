"""The LangChain adapter: real FAISS, embedder and SmolLM2 end to end; a scripted model where the wiring is the point."""

from __future__ import annotations

import asyncio
import operator
from functools import reduce
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from langchain.agents import create_agent
from langchain_community.vectorstores import FAISS
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.load import dumpd, dumps, load
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tracers.base import BaseTracer
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from pydantic import Field

from langchain_specrag import (
    MultiPerspectiveRetriever,
    SpeculativeRAG,
    SpeculativeRAGTool,
    create_speculative_rag_chain,
)
from specrag import Prompts
from specrag.errors import InvalidInputError
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder, ScriptedLM

QUESTION = {"input": "who discovered radium"}


class CountingEmbeddings(Embeddings):
    """Real embeddings of MiniLM; counts what it is asked for."""

    def __init__(self, embedder):
        self.embedder, self.texts = embedder, []

    def embed_documents(self, texts):
        self.texts += texts
        return self.embedder.embed(texts).tolist()

    def embed_query(self, text):
        return self.embed_documents([text])[0]


class FixedRetriever(BaseRetriever):
    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def documents(count: int = 6) -> list[Document]:
    return [Document(f"passage {i}", id=str(i), metadata={"title": f"T{i}", "score": 1 - i / 10}) for i in range(count)]


def scripted(**options) -> ScriptedLM:
    """Answers with the first passage it reads; the passage decides the score."""

    def reply(prompt: str):
        first = prompt.split("passage ")[1].split(" ")[0]
        return (f"Passage {first} says so.", f"answer {first}")

    return ScriptedLM(reply, **options)


def chain_of(drafter=None, **settings: Any):
    settings.setdefault("embedder", HashEmbedder())
    return create_speculative_rag_chain(FixedRetriever(documents=documents()), drafter or scripted(), **settings)


# --- end to end -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faiss(minilm, questions):
    embeddings = CountingEmbeddings(minilm)
    passages = [p for q in questions[:3] for p in q.passages]
    store = FAISS.from_texts([p.text for p in passages], embeddings, metadatas=[{"title": p.title} for p in passages])
    return store, embeddings


@pytest.mark.slow
def test_questions_are_answered_from_a_real_index(faiss, quick_smollm2, questions):
    store, embeddings = faiss
    chain = create_speculative_rag_chain(
        store.as_retriever(search_kwargs={"k": 6}),
        quick_smollm2,
        drafts=2,
        prompts=Prompts.for_small_models(),
        max_rationale_tokens=12,
        max_answer_tokens=8,
    )
    embeddings.texts.clear()
    asked = {"input": questions[0].question}
    result = chain.invoke(asked)
    assert embeddings.texts == [questions[0].question]  # the documents' vectors came from the store
    assert result["details"]["embedding_source"] == "passages"
    assert set(result) >= {"input", "context", "answer", "rationale", "drafts", "abstained"}
    assert len(result["context"]) == 6 and len(result["drafts"]) == 2
    assert result["answer"] and not result["abstained"]
    assert result["citations"] == [result["context"][i] for i in result["drafts"][0]["documents"]]

    parts = list(chain.stream(asked))
    assert _untimed(reduce(operator.add, parts)) == _untimed(result)
    assert _untimed(asyncio.run(chain.ainvoke(asked))) == _untimed(result)

    several = chain.batch([{"input": q.question} for q in questions[:8]], {"max_concurrency": 2})
    assert len(several) == 8 and _untimed(several[0]) == _untimed(result)


def _untimed(result: dict) -> dict:
    details = {name: value for name, value in result["details"].items() if name != "timings"}
    drafts = [{k: round(v, 3) if isinstance(v, float) else v for k, v in d.items()} for d in result["drafts"]]
    return {**result, "details": details, "drafts": drafts}


# --- the Runnable interface -----------------------------------------------------------------------------


async def test_the_parts_of_a_stream_sum_to_the_result():
    chain = chain_of()
    result = chain.invoke(QUESTION)
    parts = list(chain.stream(QUESTION))
    assert _untimed(reduce(operator.add, parts)) == _untimed(result)
    assert sum("context" in part for part in parts) == 1 and sum("drafts" in part for part in parts) == 1
    assert [part["answer"] for part in parts if "answer" in part] == ["answer", f" {result['answer'].split()[1]}"]
    later = [part async for part in chain.astream(QUESTION)]
    assert _untimed(reduce(operator.add, later)) == _untimed(result)
    assert _untimed(await chain.ainvoke(QUESTION)) == _untimed(result)


def test_input_keys_of_the_caller_come_back():
    result = SpeculativeRAG(drafter=scripted(), embedder=HashEmbedder()).invoke(
        {"input": "q", "context": documents(), "session": 7}
    )
    assert result["session"] == 7 and result["context"][3].metadata["score"] == 0.7


def test_what_is_missing_is_named():
    with pytest.raises(InvalidInputError, match="'input' and 'context', got input"):
        SpeculativeRAG(drafter=scripted()).invoke({"input": "q"})
    with pytest.raises(ValueError, match="drafter must be a specrag LanguageModel"):
        SpeculativeRAG(drafter="gpt")
    with pytest.raises(ValueError, match="drafts must be a whole number"):
        SpeculativeRAG(drafter=scripted(), drafts=0)
    with pytest.raises(ValueError, match="dratfs"):
        SpeculativeRAG(drafter=scripted(), dratfs=3)
    with pytest.raises(InvalidInputError, match=r"context\[0\] is a str"):
        SpeculativeRAG(drafter=scripted()).invoke({"input": "q", "context": ["text"]})


def test_settings_can_be_configured_per_call():
    rag = SpeculativeRAG(drafter=scripted(), embedder=HashEmbedder()).configurable_fields(
        drafts=ConfigurableField(id="drafts"), scoring=ConfigurableField(id="scoring")
    )
    inputs = {"input": "q", "context": documents()}
    assert len(rag.invoke(inputs)["drafts"]) == 5
    configured = rag.invoke(inputs, {"configurable": {"drafts": 2, "scoring": {"scores": ["draft"]}}})
    assert len(configured["drafts"]) == 2 and configured["details"]["scores_used"] == ["draft"]


def test_no_document_no_answer():
    result = SpeculativeRAG(drafter=scripted()).invoke({"input": "q", "context": []})
    assert result["abstained"] and result["answer"] == "" and result["reason"] == "no passages were given"
    parts = list(SpeculativeRAG(drafter=scripted()).stream({"input": "q", "context": []}))
    assert reduce(operator.add, parts)["answer"] == ""


def test_it_retries_and_falls_back_as_any_runnable():
    calls = []

    def reply(prompt):
        calls.append(prompt)
        return RuntimeError("away") if len(calls) <= 10 else ("r", "a")

    failing = SpeculativeRAG(drafter=ScriptedLM(reply), embedder=HashEmbedder(), drafts=1)
    inputs = {"input": "q", "context": documents()}
    fallback = RunnableLambda(lambda given: {**given, "answer": "from the fallback"})
    assert failing.with_fallbacks([fallback]).invoke(inputs)["answer"] == "from the fallback"
    calls.clear()
    assert failing.with_retry(stop_after_attempt=9, wait_exponential_jitter=False).invoke(inputs)["answer"] == "a"


# --- models ---------------------------------------------------------------------------------------------


class WithLogProbs(GenericFakeChatModel):
    """Answers as ``ChatOpenAI`` does when asked for log-probabilities."""

    logprobs: bool | None = None
    top_logprobs: int | None = None
    temperature: float | None = None
    asked: list[dict] = Field(default_factory=list)
    messages: Any = iter(())

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked.append(kwargs)
        texts = ["Yes"] if kwargs.get("top_logprobs") else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        content = [
            {"token": t, "bytes": list(t.encode()), "logprob": -0.25, "top_logprobs": [{"token": t, "logprob": -0.25}]}
            for t in texts
        ]
        message = AIMessage(
            "".join(texts),
            response_metadata={"logprobs": {"content": content}, "finish_reason": "stop"},
            usage_metadata={"input_tokens": 9, "output_tokens": len(texts), "total_tokens": 9 + len(texts)},
        )
        return _result(message)


def _result(message):
    from langchain_core.outputs import ChatGeneration, ChatResult

    return ChatResult(generations=[ChatGeneration(message=message)])


def test_a_chat_models_log_probabilities_are_used_and_the_verifiers_yes_is_the_substitute():
    model = WithLogProbs()
    result = SpeculativeRAG(drafter=model, embedder=HashEmbedder(), drafts=2).invoke(
        {"input": "who discovered radium", "context": documents()}
    )
    best = result["drafts"][0]
    assert (best["answer"], best["rationale"]) == ("Curie", "because")
    assert best["log_draft"] == pytest.approx(np.logaddexp(-0.25, -0.5))  # one token of one, two of the other
    assert best["log_self_reflect"] == pytest.approx(-0.25) and best["log_self_contain"] is None
    assert result["details"]["scores_used"] == ["draft", "self_reflect"]
    assert result["details"]["drafter_usage"] == {"prompt_tokens": 18, "completion_tokens": 10}
    assert {"logprobs", "temperature"} <= set(model.asked[0]) and "max_tokens" not in model.asked[0]


def test_a_chat_model_without_log_probabilities_serves_by_agreement():
    model = FakeListChatModel(responses=["Rationale: r\nAnswer: Curie", "Rationale: r\nAnswer: Curie", "Answer: Bohr"])
    rag = SpeculativeRAG(drafter=model, embedder=HashEmbedder(), drafts=3, scoring=Scoring(scores=("draft",)))
    result = rag.invoke({"input": "q", "context": documents()})
    assert result["answer"] == "Curie" and result["details"]["scores_used"] == []
    assert any("agreement among drafts" in note for note in result["details"]["notes"])


async def test_max_concurrency_reaches_the_models():
    running, most = 0, 0

    class Slow(FakeListChatModel):
        async def _agenerate(self, *args, **kwargs):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            return self._generate(*args, **kwargs)

    rag = SpeculativeRAG(drafter=Slow(responses=["Answer: a"]), embedder=HashEmbedder(), drafts=5)
    await rag.ainvoke({"input": "q", "context": documents()}, {"max_concurrency": 2})
    assert most == 2


def test_embeddings_of_the_store_are_used_and_an_embedder_is_asked_once():
    texts = [document.page_content for document in documents()]
    embedder = HashEmbedder()

    class Hashed(Embeddings):
        def embed_documents(self, texts):
            return embedder.embed(texts).tolist()

        def embed_query(self, text):
            return embedder.embed([text])[0].tolist()

    store = InMemoryVectorStore.from_texts(texts, Hashed())
    embedder.calls = 0
    retriever = store.as_retriever(search_kwargs={"k": 6})
    result = create_speculative_rag_chain(retriever, scripted(), embedder=embedder).invoke(QUESTION)
    assert result["details"]["embedding_source"] == "passages" and embedder.calls == 1  # the question, by the store
    chain_of(embedder=embedder).invoke(QUESTION)
    assert embedder.calls == 1 + 6
    assert chain_of(embedder=Hashed()).invoke(QUESTION)["details"]["embedding_source"] == "embedder"


# --- events and traces ----------------------------------------------------------------------------------


class CollectingTracer(BaseTracer):
    def __init__(self):
        super().__init__()
        self.roots = []

    def _persist_run(self, run):
        self.roots.append(run)


async def test_a_trace_shows_perspectives_every_draft_and_every_verification():
    model = FakeListChatModel(responses=["Rationale: r\nAnswer: a", "Rationale: r\nAnswer: b"])
    tracer = CollectingTracer()
    chain = chain_of(model, drafts=2)
    await chain.ainvoke(QUESTION, {"callbacks": [tracer], "tags": ["mine"], "metadata": {"user": 3}})
    (root,) = tracer.roots
    assert root.name == "speculative_rag_chain"
    (rag,) = [run for run in root.child_runs if run.name == "SpeculativeRAG"]
    shown = {run.name: [child.name for child in run.child_runs] for run in rag.child_runs}
    assert shown == {
        "perspectives": [],
        "draft 1": ["FakeListChatModel"],
        "draft 2": ["FakeListChatModel"],
        "verification 1": [],  # without log-probabilities there is nothing to ask the verifier for
        "verification 2": [],
    }
    draft = next(run for run in rag.child_runs if run.name == "draft 1")
    assert draft.outputs["answer"] in ("a", "b") and draft.end_time is not None
    asked = draft.child_runs[0]
    assert "mine" in asked.tags and asked.extra["metadata"]["user"] == 3
    synchronous = CollectingTracer()
    chain.invoke(QUESTION, {"callbacks": [synchronous]})
    (rag,) = [run for run in synchronous.roots[0].child_runs if run.name == "SpeculativeRAG"]
    assert {run.name: [child.name for child in run.child_runs] for run in rag.child_runs} == shown


async def test_a_failed_draft_shows_as_a_failed_run():
    calls = []

    def reply(prompt):
        calls.append(1)
        return RuntimeError("away") if len(calls) == 1 else ("r", "a")

    tracer = CollectingTracer()
    chain = chain_of(ScriptedLM(reply, batched=False), drafts=2)
    result = await chain.ainvoke(QUESTION, {"callbacks": [tracer]})
    runs = next(run for run in tracer.roots[0].child_runs if run.name == "SpeculativeRAG").child_runs
    assert [run.name for run in runs if run.error] == ["draft 1"] and "away" in next(r.error for r in runs if r.error)
    assert result["details"]["failures"][0]["error"] == "RuntimeError: away"


async def test_what_happens_goes_out_as_custom_events():
    names = []

    class Handler(BaseCallbackHandler):
        def on_custom_event(self, name, data, *, run_id, **kwargs):
            names.append(name)

    chain_of(drafts=2).invoke(QUESTION, {"callbacks": [Handler()]})
    assert names == ["specrag_subsets", "specrag_draft", "specrag_draft", "specrag_verdict", "specrag_verdict"]
    events = [
        e async for e in chain_of(drafts=2).astream_events(QUESTION, version="v2") if e["event"] == "on_custom_event"
    ]
    assert [e["name"] for e in events] == names and events[1]["data"]["answer"].startswith("answer ")


# --- retriever, tool, agents ----------------------------------------------------------------------------


async def test_the_retriever_keeps_one_document_per_perspective():
    vectors = {str(i): [1.0, 0.0] if i % 2 == 0 else [0.0, 1.0] for i in range(6)}
    retriever = MultiPerspectiveRetriever(
        retriever=FixedRetriever(documents=documents()), k=2, vector_store=lambda found: [vectors[d.id] for d in found]
    )
    assert [d.id for d in retriever.invoke("q")] == ["0", "1"]
    assert [d.id for d in await retriever.ainvoke("q", k=1)] == ["0"]
    assert len(retriever.invoke("q", k=9)) == 6
    with pytest.raises(InvalidInputError, match="at least 1"):
        retriever.invoke("q", k=0)


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


def test_the_chain_is_a_tool_by_itself():
    tool = chain_of().as_tool(name="ask", description="Asks.")
    assert tool.args == {"input": {"title": "Input", "type": "string"}}
    assert tool.invoke({"input": "q"})["answer"].startswith("answer ")


class State(TypedDict, total=False):
    input: str
    context: list
    answer: str
    drafts: list
    log: Annotated[list, operator.add]


async def test_the_chain_is_a_node_of_a_graph_whose_stream_carries_its_events():
    class Forward(BaseCallbackHandler):
        run_inline = True

        def __init__(self, write):
            self.write = write

        def on_custom_event(self, name, data, *, run_id, **kwargs):
            self.write({name: data})

    async def ask(state: State) -> State:
        result = await chain_of(drafts=2).ainvoke(
            {"input": state["input"]}, {"callbacks": [Forward(get_stream_writer())]}
        )
        return {"answer": result["answer"], "drafts": result["drafts"]}

    graph = StateGraph(State)
    graph.add_node("ask", ask)
    graph.add_edge(START, "ask")
    graph.add_edge("ask", END)
    parts = [part async for part in graph.compile().astream(dict(QUESTION), stream_mode=["custom", "values"])]
    assert [next(iter(data)) for mode, data in parts if mode == "custom"].count("specrag_draft") == 2
    assert parts[-1][1]["answer"].startswith("answer ")

    direct = StateGraph(State)
    direct.add_node("rag", chain_of(drafts=2))
    direct.add_edge(START, "rag")
    direct.add_edge("rag", END)
    assert direct.compile().invoke(dict(QUESTION))["answer"].startswith("answer ")


# --- serialisation --------------------------------------------------------------------------------------


def test_a_chain_over_serialisable_models_is_written_and_read_without_secrets():
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(model="m", api_key="sk-secret", base_url="http://127.0.0.1:1/v1")
    rag = SpeculativeRAG(drafter=model, drafts=3, scoring={"scores": ["draft"]})
    assert "sk-secret" not in dumps(rag)
    read = load(
        dumpd(rag),
        allowed_objects=[SpeculativeRAG, openai.ChatOpenAI],
        valid_namespaces=["langchain_specrag"],
        secrets_map={"OPENAI_API_KEY": "sk-other"},
    )
    assert read.drafts == 3 and read.scoring == {"scores": ["draft"]} and read.drafter.model_name == "m"


def test_a_core_model_is_not_written():
    from specrag.models import OpenAILM

    rag = SpeculativeRAG(drafter=OpenAILM("m", "http://127.0.0.1:1/v1", api_key="sk-secret"))
    assert "sk-secret" not in dumps(rag) and "not_implemented" in dumps(rag)
