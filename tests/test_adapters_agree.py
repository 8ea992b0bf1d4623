"""One core, three doors: the core, LangChain and LlamaIndex give the same answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

import specrag
from llamaindex_specrag import SpeculativeSynthesizer
from specrag import Passage, Prompts
from tests.fakes import shortened


@pytest.mark.slow
@pytest.mark.parametrize("with_embeddings", [True, False])
def test_core_langchain_and_llamaindex_give_the_same_answer(quick_smollm2, minilm, questions, with_embeddings):
    from langchain_core.documents import Document as LangChainDocument

    from langchain_specrag import SpeculativeRAGRunnable

    question = replace(questions[1], passages=tuple(shortened(questions[1].passages)))
    smollm2 = quick_smollm2
    vectors = minilm.embed([p.text for p in question.passages]) if with_embeddings else [None] * 10
    settings = {
        "drafts": 3,
        "seed": 5,
        "embedder": minilm,
        "prompts": Prompts.for_small_models(),
        "sampling": specrag.Sampling(temperature=0.7, seed=11),
        "max_rationale_tokens": 6,
        "max_answer_tokens": 6,
    }
    core = specrag.SpeculativeRAG(drafter=smollm2, **settings).answer(
        question.question,
        [
            Passage(p.text, title=p.title, id=str(i), embedding=v)
            for i, (p, v) in enumerate(zip(question.passages, vectors, strict=True))
        ],
    )
    expected = [
        (v.draft.text, v.draft.rationale, [p.id for p in v.draft.passages], pytest.approx(v.log_score, abs=1e-3))
        for v in core.verdicts
    ]
    documents = [
        LangChainDocument(p.text, id=str(i), metadata={"title": p.title}) for i, p in enumerate(question.passages)
    ]
    store = (lambda found: [vectors[int(d.id)] for d in found]) if with_embeddings else None
    chain = SpeculativeRAGRunnable(drafter=smollm2, vector_store=store, **settings)
    result = chain.invoke({"input": question.question, "context": documents})
    found = [
        NodeWithScore(
            node=TextNode(
                text=p.text, id_=str(i), metadata={"title": p.title}, embedding=None if v is None else v.tolist()
            )
        )
        for i, (p, v) in enumerate(zip(question.passages, vectors, strict=True))
    ]
    response = SpeculativeSynthesizer(smollm2, **settings).synthesize(question.question, found)
    assert [
        (d["answer"], d["rationale"], [str(i) for i in d["documents"]], d["score"]) for d in result["drafts"]
    ] == expected
    assert [(d["answer"], d["rationale"], d["nodes"], d["score"]) for d in response.metadata["drafts"]] == expected
    assert result["answer"] == core.text == str(response)
    source = "passages" if with_embeddings else "embedder"
    assert {core.embedding_source, result["details"]["embedding_source"], response.metadata["embedding_source"]} == {
        source
    }
