"""Span readers in both adapters: by name and in lists, their settings, their stage in traces, and escalation."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from llama_index.core.schema import NodeWithScore, TextNode

from langchain_specrag import SpeculativeRAGRunnable, create_speculative_rag_chain
from llamaindex_specrag import SpeculativeSynthesizer
from llamaindex_specrag.events import DraftEvent, ReadingEvent
from specrag.errors import NotFoundError
from specrag.speculative.confidence import Calibration
from tests.fakes import HashEmbedder, ScriptedLM, ScriptedReader
from tests.langchain_parts import CollectingTracer, FixedRetriever
from tests.llamaindex_parts import WithLogProbs, collecting
from tests.reader_parts import reader_in_place

TEXTS = ("Work began in 1887.", "The tower was finished in 1889.", "The river is long.")
QUESTION = "when was it finished"
READER = ScriptedReader({"1889": 0.5, "1887": 0.3})
DOCUMENTS = [Document(text, id=str(i)) for i, text in enumerate(TEXTS)]
NODES = [NodeWithScore(node=TextNode(text=text, id_=str(i))) for i, text in enumerate(TEXTS)]


def by_langchain(drafter: Any, question: str = QUESTION, **settings: Any) -> dict[str, Any]:
    settings.setdefault("embedder", HashEmbedder())
    made = SpeculativeRAGRunnable(drafter=drafter, **settings).invoke({"input": question, "context": DOCUMENTS})
    return {**made.pop("details"), **made}


def by_llamaindex(drafter: Any, question: str = QUESTION, **settings: Any) -> dict[str, Any]:
    settings.setdefault("embedder", HashEmbedder())
    made = SpeculativeSynthesizer(drafter, **settings).synthesize(question, NODES)
    return {"answer": "" if made.metadata["abstained"] else str(made), **made.metadata}


BOTH = pytest.mark.parametrize("ask", [by_langchain, by_llamaindex])


@BOTH
def test_a_reader_is_a_drafter_by_its_bundled_name_by_its_folder_and_as_it_is(ask, tmp_path, monkeypatch):
    folder = reader_in_place(tmp_path, monkeypatch)
    answers = [ask(drafter, drafts=3) for drafter in ("minilm-reader", str(folder), folder)]
    loaded = ask(ScriptedReader({"1889": 0.5}), verifier="minilm-reader")
    assert loaded["answer"] == "1889" and loaded["scores_used"] == ["draft", "span"]
    for made in answers:
        assert made["answer"] == answers[0]["answer"] and made["answer"] in "  ".join(TEXTS)
        assert 1 <= len(made["drafts"]) <= 3 and made["scores_used"] == ["draft"]


@BOTH
def test_drafters_in_a_list_are_pooled(ask):
    lm = ScriptedLM(lambda prompt: ("because", "1889"))
    made = ask([READER, lm], routing=None, drafts=2, passages_per_draft=1)
    assert made["answer"] == "1889" and "agreement" in made["scores_used"]
    assert lm.generate_calls and len(made["drafts"]) == 2  # equal answers are one draft
    lm.generate_calls.clear()
    assert ask([READER, lm])["answer"] == "1889"  # by the routing's default, the reader is sure enough
    assert lm.generate_calls == []


@BOTH
def test_confidence_and_its_settings_pass_through(ask, tmp_path):
    made = Calibration(("scripted-reader",), "", "pointwise", {"draft": 4.0}, 4 * 0.6931472, 100, 0.5)
    made.save(tmp_path / "mine.json")
    for calibration in (made, tmp_path / "mine.json", str(tmp_path / "mine.json")):
        assert ask(READER, calibration=calibration)["confidence"] == pytest.approx(0.5, abs=1e-3)
    unsure = ask(READER, calibration=made, min_confidence=0.6)
    assert unsure["abstained"] and unsure["reason"].startswith("the confidence is too low: 0.50 < 0.60")
    with pytest.raises(ValueError, match="min_confidence needs a calibration"):
        ask(READER, min_confidence=0.5)
    with pytest.raises(NotFoundError, match="no calibration at"):
        ask(READER, calibration=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="the calibration was made for scripted-reader verified by nobody"):
        ask(ScriptedReader({}, name="other"), calibration=made)


def escalating(framework_model: Any) -> dict[str, Any]:
    return {
        "verifier": framework_model,
        "calibration": Calibration(("scripted-reader",), "", "pointwise", {"draft": 4.0}, 0.0, 100, 0.5),
        "escalate": "passages",
        "escalate_below": 0.9,
    }


def test_langchain_shows_the_reading_and_the_escalation_as_runs():
    model, tracer = FakeListChatModel(responses=["Answer: it was in 1889"]), CollectingTracer()
    rag = SpeculativeRAGRunnable(drafter=READER, **escalating(model))
    made = rag.invoke({"input": QUESTION, "context": DOCUMENTS}, {"callbacks": [tracer]})
    assert made["answer"] == "it was in 1889" and made["details"]["escalated"] == "passages"
    assert made["citations"] == DOCUMENTS[:2]
    (root,) = tracer.roots
    runs = {run.name: run for run in root.child_runs}
    assert "perspectives" not in runs and all(run.end_time is not None and not run.error for run in runs.values())
    assert runs["reading: scripted-reader"].outputs["drafts"] == 2
    escalation = runs["escalation: FakeListChatModel"]
    assert [child.name for child in escalation.child_runs] == ["FakeListChatModel"]
    assert escalation.outputs == {"answer": "it was in 1889", "abstained": False, "documents": [0, 1]}


async def test_langchain_tells_of_the_reading_as_a_custom_event():
    rag = SpeculativeRAGRunnable(drafter=READER)
    asked = {"input": QUESTION, "context": DOCUMENTS}
    told = [e async for e in rag.astream_events(asked, version="v2") if e["event"] == "on_custom_event"]
    drafted = ["specrag_draft", "specrag_verdict"] * 2
    assert [e["name"] for e in told] == ["specrag_reading", *drafted, "specrag_subsets"]
    assert told[0]["data"]["reader"] == "scripted-reader" and told[0]["data"]["drafts"] == 2
    failing = SpeculativeRAGRunnable(
        drafter=[ScriptedReader({}, error=RuntimeError("away")), FakeListChatModel(responses=["Answer: 1889"])],
        drafts=1,
    )
    tracer = CollectingTracer()
    assert (await failing.ainvoke(asked, {"callbacks": [tracer]}))["answer"] == "1889"
    runs = {run.name: run for run in tracer.roots[0].child_runs}
    assert "away" in runs["reading: scripted-reader"].error
    assert [child.name for child in runs["draft 1"].child_runs] == ["FakeListChatModel"]


def test_llamaindex_shows_the_reading_and_the_escalation_as_spans():
    settings = escalating(WithLogProbs())
    with collecting() as (events, spans):
        response = SpeculativeSynthesizer(READER, **settings).synthesize(QUESTION, NODES)
    assert response.metadata["escalated"] == "passages"
    kinds = [span.id_.rsplit("-", 5)[0] for span in spans.completed_spans]
    assert kinds.count("SpeculativeRAG.read") == kinds.count("SpeculativeRAG.escalate") == 1
    assert "SpeculativeRAG.perspectives" not in kinds and not spans.open_spans and not spans.dropped_spans
    (reading,) = [event for event in events if isinstance(event, ReadingEvent)]
    assert (reading.reader, reading.drafts, reading.index) == ("scripted-reader", 2, 0)
    assert len([event for event in events if isinstance(event, DraftEvent)]) == 2
    finished = {span.id_: span for span in spans.completed_spans}
    calls = [event for event in events if event.class_name() == "LLMChatStartEvent"]
    assert finished[calls[-1].span_id].parent_id.startswith("SpeculativeRAG.escalate-")
    with collecting() as (_, spans):
        SpeculativeSynthesizer(
            [ScriptedReader({}, error=RuntimeError("away")), ScriptedLM(lambda p: ("r", "a"))], embedder=HashEmbedder()
        ).synthesize(QUESTION, NODES)
    (dropped,) = spans.dropped_spans
    assert dropped.id_.startswith("SpeculativeRAG.read-")


@BOTH
@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (
            "minilm",
            r"a bundled model \(smollm2, smollm2-rag-drafter, minilm-reader, mpnet-reader\), the folder of .* "
            r"got 'minilm'",
        ),
        ("gpt", "drafter must be .* got 'gpt'"),
        (3, "drafter must be a specrag LanguageModel .*a SpanReader, the name of a bundled model .* or a L.*got int"),
        ([READER, 3], r"drafter\[1\] must be"),
        ([], "drafter must be .* got tuple"),
    ],
)
def test_what_is_no_drafter_is_named(ask, drafter, message):
    with pytest.raises(ValueError, match=message):
        ask(drafter)


def test_the_settings_of_the_routing_may_be_a_mapping_and_a_misspelt_one_is_named():
    lm = ScriptedLM(lambda prompt: ("because", "no"))
    chain = create_speculative_rag_chain(
        FixedRetriever(documents=DOCUMENTS), [READER, lm], embedder=HashEmbedder(), routing={"no_answer_above": 0.1}
    )
    chain.invoke({"input": QUESTION})
    assert lm.generate_calls
    with pytest.raises(ValueError, match="routing has no field form: there are forms, no_answer_above"):
        SpeculativeRAGRunnable(drafter=READER, routing={"form": True})
