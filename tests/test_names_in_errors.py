"""Errors name classes that a reader can look up."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableLambda

from langchain_specrag import MultiPerspectiveRetriever, SpecRAGEmbeddings, SpeculativeRAGRunnable
from langchain_specrag import create_speculative_rag_chain as chain_over
from langchain_specrag._messages import to_message
from llamaindex_specrag import MultiPerspectivePostprocessor, SpeculativeRAGQueryEngine, SpeculativeSynthesizer
from specrag import Passage, SpeculativeRAG
from specrag._fields import json_kind
from specrag.errors import a, described, kind_of
from specrag.rapid.conversation import document_texts
from tests.fakes import HashEmbedder, first_passage_lm
from tests.langchain_parts import chain_of

LM = first_passage_lm()


class Public:
    """Something that fits nowhere."""


class _Private(Public):
    """Its own module's affair."""


class _Message(BaseMessage):
    type: str = "oracle"


class _Document(Document):
    """A document of somebody's own."""


ODD = _Private()
RAG = SpeculativeRAGRunnable(drafter=LM, embedder=HashEmbedder())
ASKED = {
    "drafter": lambda: SpeculativeRAGRunnable(drafter=ODD),
    "verifier": lambda: SpeculativeRAGRunnable(drafter=LM, verifier=ODD),
    "embedder": lambda: SpeculativeRAGRunnable(drafter=LM, embedder=ODD),
    "context": lambda: RAG.invoke({"input": "q", "context": ODD}),
    "a document": lambda: RAG.invoke({"input": "q", "context": [ODD]}),
    "question": lambda: RAG.invoke({"input": ODD, "context": []}),
    "inputs": lambda: RAG.invoke(ODD),
    "retriever": lambda: chain_over(ODD, LM),
    "condense": lambda: chain_of(condense=ODD),
    "diverse": lambda: MultiPerspectiveRetriever(retriever=ODD, embedder=HashEmbedder()),
    "synthesizer": lambda: SpeculativeSynthesizer(ODD),
    "engine": lambda: SpeculativeRAGQueryEngine.from_args(None, LM, ODD),
    "postprocessor": lambda: MultiPerspectivePostprocessor(embedder=ODD),
    "the core's drafter": lambda: SpeculativeRAG(drafter=ODD),
    "one of the core's drafters": lambda: SpeculativeRAG(drafter=[LM, ODD]),
    "the core's verifier": lambda: SpeculativeRAG(drafter=LM, verifier=ODD),
    "the core's embedder": lambda: SpeculativeRAG(drafter=LM, embedder=ODD),
    "passage": lambda: Passage.of(ODD),
    "passages": lambda: SpeculativeRAG(drafter=LM).answer("q", ODD),
    "text": lambda: Passage(ODD),
    "documents": lambda: document_texts([ODD]),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_type_that_was_given_is_named_by_its_public_class(name):
    with pytest.raises(ValueError, match=r"\bPublic\b") as caught:
        ASKED[name]()
    assert "_Private" not in str(caught.value).split("[type=")[0]


def test_a_message_and_a_reply_of_a_private_class():
    with pytest.raises(ValueError, match="got BaseMessage of the role 'oracle'"):
        to_message(_Message("x"))
    rag = SpeculativeRAGRunnable(drafter=RunnableLambda(lambda messages: ODD), embedder=HashEmbedder(), drafts=1)
    with pytest.raises(Exception, match="RunnableLambda gave a Public") as caught:
        rag.invoke({"input": "q", "context": [_Document("x")]})
    assert "_Private" not in str(caught.value)


def test_fields_of_the_packages_classes_are_named_by_their_public_class():
    with pytest.raises(ValueError, match="1 validation error for SpecRAGEmbeddings"):
        SpecRAGEmbeddings(embedder=HashEmbedder(), dratfs=1)
    assert (kind_of(ODD), kind_of(3), kind_of(None), kind_of(object())) == ("Public", "int", "None", "object")


@pytest.mark.parametrize(
    ("name", "spoken"),
    [("Answer", "an Answer"), ("LLM", "an LLM"), ("HTTPError", "an HTTPError"), ("UUID", "a UUID"), ("Path", "a Path")]
    + [("Unit", "a Unit"), ("Update", "an Update"), ("_Hidden", "an object"), ("I", "an I")],
)
def test_a_type_has_its_article(name, spoken):
    assert a(type(name, (), {})()) == spoken


def test_what_needs_no_article_has_none():
    assert [a(value) for value in (None, b"", 3, 2.0, True, [], {})] == [
        "None", "bytes", "an int", "a float", "a bool", "a list", "a dict",
    ]  # fmt: skip
    assert [json_kind(value) for value in (None, True, 3, 2.5, "x", [], {})] == [
        "null", "true or false", "a number", "a number", "a string", "a list", "an object",
    ]  # fmt: skip


def test_an_error_is_described_by_its_public_type_and_what_it_says():
    class _LineError(ConnectionError):
        """A private class of somebody's client."""

    assert described(_LineError("cut")) == "ConnectionError: cut"
    assert described(TimeoutError()) == "TimeoutError"
