"""The LangChain chain: with real FAISS, embedder and SmolLM2, then with scripted models."""

from __future__ import annotations

import asyncio
import math
import operator
from functools import reduce
from typing import Annotated, TypedDict

import numpy as np
import pytest
from langchain_community.vectorstores import FAISS
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd, dumps, load
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph

from langchain_specrag import SpeculativeRAGRunnable, create_speculative_rag_chain
from langchain_specrag._convert import to_passages
from specrag import Prompts
from specrag.errors import InvalidInputError
from tests.fakes import HashEmbedder, ScriptedLM, first_passage_lm, shortened
from tests.langchain_parts import QUESTION, chain_of, documents


class CountingEmbeddings(Embeddings):
    """Real embeddings of MiniLM; counts what it is asked for."""

    def __init__(self, embedder):
        self.embedder, self.texts = embedder, []

    def embed_documents(self, texts):
        self.texts += texts
        return self.embedder.embed(texts).tolist()

    def embed_query(self, text):
        return self.embed_documents([text])[0]


@pytest.fixture(scope="module")
def faiss(minilm, questions):
    embeddings = CountingEmbeddings(minilm)
    passages = [p for q in questions[:3] for p in shortened(q.passages)]
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
        max_rationale_tokens=6,
        max_answer_tokens=6,
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

    several = chain.batch([{"input": q.question} for q in questions[:3]], {"max_concurrency": 2})
    assert len(several) == 3 and _untimed(several[0]) == _untimed(result)


def _untimed(result: dict) -> dict:
    details = {name: value for name, value in result["details"].items() if name != "timings"}
    drafts = [{k: round(v, 3) if isinstance(v, float) else v for k, v in d.items()} for d in result["drafts"]]
    return {**result, "details": details, "drafts": drafts}


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


def test_a_batch_gives_what_each_call_gives():
    chain = chain_of()
    inputs = [{"input": f"question {i}"} for i in range(8)]
    several = chain.batch(inputs, {"max_concurrency": 2})
    assert [_untimed(made) for made in several] == [_untimed(chain.invoke(each)) for each in inputs]


def test_results_of_an_earlier_call_in_the_input_are_replaced():
    chain = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    earlier = chain.invoke({"input": "q", "context": documents(), "session": 7})
    again = chain.invoke(earlier)
    assert again["session"] == 7 and _untimed(again) == _untimed(earlier)
    assert _untimed(reduce(operator.add, chain.stream(earlier))) == _untimed(again)


@pytest.mark.parametrize("key", ["answer", "details", "drafts", "citations", "rationale", "reason", "abstained"])
async def test_a_stream_over_an_earlier_result_yields_only_what_is_new(key):
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    for runnable, given in (
        (rag, {"input": "q", "context": documents()}),
        (chain_of(), {"input": "q"}),
        (rag | rag, {"input": "q", "context": documents()}),
    ):
        whole = runnable.invoke(given)
        old = {"answer": "old", "details": {"notes": ["old"]}, "abstained": True}.get(key, ["old"])
        assert _untimed(reduce(operator.add, runnable.stream({**given, key: old}))) == _untimed(whole)
        parts = [part async for part in runnable.astream({**given, key: old})]
        assert _untimed(reduce(operator.add, parts)) == _untimed(whole)


def test_input_keys_of_the_caller_come_back():
    result = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder()).invoke(
        {"input": "q", "context": documents(), "session": 7}
    )
    assert result["session"] == 7 and result["context"][3].metadata["score"] == 0.7


def test_what_is_missing_is_named():
    with pytest.raises(InvalidInputError, match="'input' and 'context', got input"):
        SpeculativeRAGRunnable(drafter=first_passage_lm()).invoke({"input": "q"})
    with pytest.raises(ValueError, match="drafter must be a specrag LanguageModel"):
        SpeculativeRAGRunnable(drafter="gpt")
    with pytest.raises(ValueError, match="drafts must be at least 1, got 0"):
        SpeculativeRAGRunnable(drafter=first_passage_lm(), drafts=0)
    with pytest.raises(ValueError, match="dratfs"):
        SpeculativeRAGRunnable(drafter=first_passage_lm(), dratfs=3)
    with pytest.raises(InvalidInputError, match=r"context\[0\] is a str"):
        SpeculativeRAGRunnable(drafter=first_passage_lm()).invoke({"input": "q", "context": ["text"]})


def test_settings_can_be_configured_per_call():
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder()).configurable_fields(
        drafts=ConfigurableField(id="drafts"), scoring=ConfigurableField(id="scoring")
    )
    inputs = {"input": "q", "context": documents()}
    assert len(rag.invoke(inputs)["drafts"]) == 5
    configured = rag.invoke(inputs, {"configurable": {"drafts": 2, "scoring": {"scores": ["draft"]}}})
    assert len(configured["drafts"]) == 2 and configured["details"]["scores_used"] == ["draft"]


def test_settings_are_frozen_and_a_copy_with_others_is_another_pipeline():
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    inputs = {"input": "q", "context": documents()}
    with pytest.raises(ValueError, match="frozen"):
        rag.drafts = 1
    copy = rag.model_copy(update={"drafts": 1, "scoring": {"scores": ["draft"]}})
    assert len(copy.invoke(inputs)["drafts"]) == 1 and copy.invoke(inputs)["details"]["scores_used"] == ["draft"]
    assert len(rag.invoke(inputs)["drafts"]) == 5 and len(rag.model_copy().invoke(inputs)["drafts"]) == 5
    with pytest.raises(ValueError, match="drafts must be at least 1, got 0"):
        rag.model_copy(update={"drafts": 0})
    with pytest.raises(ValueError, match="dratfs"):
        rag.model_copy(update={"dratfs": 1})


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "context must be a list of LangChain documents, got None"),
        ("text", "context must be a list of LangChain documents, got str"),
        ({"page_content": "text"}, "context must be a list of LangChain documents, got dict"),
        (5, "context must be a list of LangChain documents, got int"),
    ],
)
async def test_a_context_of_another_type_is_named(context, message):
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    inputs = {"input": "q", "context": context}
    with pytest.raises(InvalidInputError, match=message):
        rag.invoke(inputs)
    with pytest.raises(InvalidInputError, match=message):
        list(rag.stream(inputs))
    with pytest.raises(InvalidInputError, match="input must be the question as text, got list"):
        rag.invoke({"input": [("human", "q")], "context": []})


def test_a_generator_of_documents_and_one_document_are_a_context():
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    result = rag.invoke({"input": "q", "context": (document for document in documents())})
    assert len(result["context"]) == 6 and result["citations"][0] in result["context"]
    assert rag.invoke({"input": "q", "context": documents()[0]})["answer"] == "answer 0"


@pytest.mark.parametrize(
    "metadata",
    [
        {"title": math.nan}, {"title": np.array(["a", "b"])}, {"title": ["a"]}, {"title": None}, {"title": {"en": "a"}},
        {"embedding": "bge-small"}, {"embedding": ["bge", "small"]}, {"embedding": [math.nan, 1.0]},
        {"embedding": [[1.0], [2.0]]}, {"embedding": []}, {"embedding": [None]},
        {"score": math.nan}, {"score": "high"}, {"score": [1]},
    ],
    ids=repr,
)  # fmt: skip
def test_metadata_of_any_kind_is_no_error_and_no_title(metadata):
    rag = SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder())
    found = [Document(f"passage {i}", metadata=metadata) for i in range(6)]
    result = rag.invoke({"input": "q", "context": found})
    assert result["answer"].startswith("answer ") and result["details"]["embedding_source"] == "embedder"
    passages = to_passages(found)
    assert {passage.title for passage in passages} == {passage.score for passage in passages} == {None}


def test_a_text_is_a_title():
    found = [Document("x", metadata={"title": title}) for title in (1984, "Radium", " ")]
    assert [passage.title for passage in to_passages(found)] == [None, "Radium", None]


# --- conversations --------------------------------------------------------------------------------------

HISTORY = [("human", "Who discovered radium?"), ("ai", "Marie Curie.")]


async def test_a_follow_up_is_condensed_to_a_question_that_stands_on_its_own():
    asked = []

    def find(inputs):
        asked.append(inputs["standalone_question"])
        return documents()

    condense = FakeListChatModel(responses=["When did Marie Curie discover radium?"])
    seen = []
    drafter = ScriptedLM(lambda prompt: (seen.append(prompt), ("r", "1898"))[1])
    chain = create_speculative_rag_chain(RunnableLambda(find), drafter, condense=condense, embedder=HashEmbedder())
    given = {"input": "And when?", "chat_history": HISTORY}
    for result in (chain.invoke(given), await chain.ainvoke(given), reduce(operator.add, chain.stream(given))):
        assert result["standalone_question"] == asked[-1] == "When did Marie Curie discover radium?"
        assert result["input"] == "And when?" and "When did Marie Curie" in seen[-1] and "And when?" not in seen[-1]
        assert not any("chat_history" in note for note in result["details"]["notes"])


def test_a_first_question_and_a_history_as_text():
    condense = FakeListChatModel(responses=["condensed"])
    chain = chain_of(condense=condense)
    assert chain.invoke({"input": "who"})["standalone_question"] == "who"
    assert chain.invoke({"input": "who", "chat_history": []})["standalone_question"] == "who"
    assert chain.invoke({"input": "who", "chat_history": "We spoke of radium."})["standalone_question"] == "condensed"
    with pytest.raises(InvalidInputError, match="condense must be a LangChain model, got str"):
        chain_of(condense="gpt")


def test_a_history_that_is_not_used_is_said():
    for runnable, given in (
        (chain_of(), {"input": "And when?"}),
        (
            SpeculativeRAGRunnable(drafter=first_passage_lm(), embedder=HashEmbedder()),
            {"input": "q", "context": documents()},
        ),
    ):
        (note,) = runnable.invoke({**given, "chat_history": HISTORY})["details"]["notes"]
        assert note.startswith("chat_history is not used: give create_speculative_rag_chain(condense=model)")
        assert runnable.invoke(given)["details"]["notes"] == []


def test_no_document_no_answer():
    result = SpeculativeRAGRunnable(drafter=first_passage_lm()).invoke({"input": "q", "context": []})
    assert result["abstained"] and result["answer"] == "" and result["reason"] == "no passages were given"
    parts = list(SpeculativeRAGRunnable(drafter=first_passage_lm()).stream({"input": "q", "context": []}))
    assert reduce(operator.add, parts)["answer"] == ""


def test_it_retries_and_falls_back_as_any_runnable():
    calls = []

    def reply(prompt):
        calls.append(prompt)
        return RuntimeError("away") if len(calls) <= 10 else ("r", "a")

    failing = SpeculativeRAGRunnable(drafter=ScriptedLM(reply), embedder=HashEmbedder(), drafts=1)
    inputs = {"input": "q", "context": documents()}
    fallback = RunnableLambda(lambda given: {**given, "answer": "from the fallback"})
    assert failing.with_fallbacks([fallback]).invoke(inputs)["answer"] == "from the fallback"
    calls.clear()
    assert failing.with_retry(stop_after_attempt=9, wait_exponential_jitter=False).invoke(inputs)["answer"] == "a"


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
    result = create_speculative_rag_chain(retriever, first_passage_lm(), embedder=embedder).invoke(QUESTION)
    assert result["details"]["embedding_source"] == "passages" and embedder.calls == 1  # the question, by the store
    chain_of(embedder=embedder).invoke(QUESTION)
    assert embedder.calls == 1 + 6
    assert chain_of(embedder=Hashed()).invoke(QUESTION)["details"]["embedding_source"] == "embedder"


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


def test_a_chain_over_serialisable_models_is_written_and_read_without_secrets():
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(model="m", api_key="sk-secret", base_url="http://127.0.0.1:1/v1")
    rag = SpeculativeRAGRunnable(drafter=model, drafts=3, scoring={"scores": ["draft"]})
    assert "sk-secret" not in dumps(rag)
    read = load(
        dumpd(rag),
        allowed_objects=[SpeculativeRAGRunnable, openai.ChatOpenAI],
        valid_namespaces=["langchain_specrag"],
        secrets_map={"OPENAI_API_KEY": "sk-other"},
    )
    assert read.drafts == 3 and read.scoring == {"scores": ["draft"]} and read.drafter.model_name == "m"


def test_a_core_model_is_not_written():
    from specrag.models import OpenAILM

    rag = SpeculativeRAGRunnable(drafter=OpenAILM("m", "http://127.0.0.1:1/v1", api_key="sk-secret"))
    assert "sk-secret" not in dumps(rag) and "not_implemented" in dumps(rag)


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"messages": []}, "only messages"),
        ({}, "only nothing"),
        ({"input": ["who?"]}, "got list"),
        ({"input": None}, "got None"),
    ],
)
def test_a_chain_without_a_question_says_what_it_takes_before_it_retrieves(inputs, found):
    with pytest.raises(InvalidInputError, match=f"takes a mapping with 'input', the question as text; .*{found}"):
        chain_of().invoke(inputs)
