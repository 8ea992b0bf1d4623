"""A ready system stands where Speculative RAG stands, in LangChain's chain and in LlamaIndex's query engine."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.schema import NodeWithScore, TextNode

from langchain_specrag import SpeculativeRAGRunnable, create_speculative_rag_chain
from llamaindex_specrag import SpeculativeRAGQueryEngine, SpeculativeSynthesizer
from specrag.baselines import CorrectiveRAG, StandardRAG
from specrag.errors import InvalidInputError
from tests.fakes import first_passage_lm
from tests.llamaindex_parts import FixedRetriever
from tests.test_corrective import Words

DOCUMENTS = [Document("passage 1 is Rain.", metadata={"title": "Weather"}), Document("passage 2 says Ada won.")]


def corrective() -> CorrectiveRAG:
    return CorrectiveRAG(model=first_passage_lm(), evaluator=Words({"Ada": 0.9}))


def test_a_ready_system_answers_in_a_chain():
    chain = create_speculative_rag_chain(RunnableLambda(lambda inputs: DOCUMENTS), system=corrective())
    result = chain.invoke({"input": "who won"})
    assert result["answer"] == "answer 2" and result["citations"] == [DOCUMENTS[1]]
    assert result["details"]["critiques"][0] == {"passage": 0, "grade": 0.0, "verdict": "incorrect"}
    parts = list(chain.stream({"input": "who won"}))
    assert "".join(part.get("answer", "") for part in parts) == "answer 2"


async def test_its_drafts_are_told_as_those_of_speculative_rag():
    runnable = SpeculativeRAGRunnable(system=StandardRAG(model=first_passage_lm()))
    events = [e async for e in runnable.astream_events({"input": "who won", "context": DOCUMENTS}, version="v2")]
    told = [event["name"] for event in events if event["event"] == "on_custom_event"]
    assert told == ["specrag_draft", "specrag_verdict"]
    names = {event["name"] for event in events if event["event"] == "on_chain_start"}
    assert "verification 1" in names and "perspectives" not in names
    assert runnable.model_copy(update={"vector_store": None}).invoke({"input": "who", "context": DOCUMENTS})["answer"]


def test_a_ready_system_answers_in_a_query_engine():
    found = [NodeWithScore(node=TextNode(text=document.page_content)) for document in DOCUMENTS]
    engine = SpeculativeRAGQueryEngine.from_args(FixedRetriever(found), system=corrective())
    response = engine.query("who won")
    assert str(response) == "answer 2" and [n.text for n in response.source_nodes] == ["passage 2 says Ada won."]
    assert engine.get_prompts() == {}
    with pytest.raises(InvalidInputError, match="are changed where it is made"):
        engine.update_prompts({"response_synthesizer:draft": None})


@pytest.mark.parametrize("adapter", [SpeculativeRAGRunnable, SpeculativeSynthesizer])
def test_what_does_not_go_with_a_ready_system_is_refused(adapter):
    with pytest.raises(ValueError, match="system must have answer, aanswer, stream and astream"):
        adapter(system="corrective")
    with pytest.raises(ValueError, match="system is ready: give drafter, drafts where you make it"):
        adapter(system=corrective(), drafter=first_passage_lm(), drafts=3)


def test_a_runnable_without_models_is_refused():
    with pytest.raises(ValueError, match="give drafter=, the model that writes the drafts, or system="):
        SpeculativeRAGRunnable()
