"""Spans, events and legacy callbacks of the LlamaIndex adapter."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler

from specrag.speculative.verification import Scoring
from tests.fakes import ScriptedLM
from tests.llamaindex_parts import WithLogProbs, collecting, engine_of


@pytest.fixture
def collected():
    with collecting() as events_and_spans:
        yield events_and_spans


@pytest.mark.parametrize("door", ["query", "aquery"])
def test_spans_and_events_come_in_order_and_once(collected, door):
    events, spans = collected
    engine = engine_of(WithLogProbs(), drafts=2, scoring=Scoring(scores=("draft", "self_reflect")))
    if door == "query":
        engine.query("q")
    else:
        asyncio.run(engine.aquery("q"))
    names = [event.class_name() for event in events]
    ours = [name for name in names if name in ("PerspectivesEvent", "DraftEvent", "VerdictEvent")]
    assert ours == ["PerspectivesEvent", "DraftEvent", "DraftEvent", "VerdictEvent", "VerdictEvent"]
    for once in (
        "QueryStartEvent",
        "SynthesizeStartEvent",
        "RetrievalStartEvent",
        "SynthesizeEndEvent",
        "QueryEndEvent",
    ):
        assert names.count(once) == 1
    assert names.count("LLMChatStartEvent") == names.count("LLMChatEndEvent") == 4  # two drafts, two verdicts
    assert names.index("SynthesizeStartEvent") < names.index("PerspectivesEvent") < names.index("DraftEvent")
    assert names.index("VerdictEvent") < names.index("SynthesizeEndEvent") < names.index("QueryEndEvent")

    finished = {span.id_: span for span in spans.completed_spans}
    kinds = [span.id_.rsplit("-", 5)[0] for span in spans.completed_spans]
    assert kinds.count("SpeculativeRAG.perspectives") == 1 and not spans.open_spans and not spans.dropped_spans
    assert kinds.count("SpeculativeRAG.draft") == kinds.count("SpeculativeRAG.verify") == 2
    drafts = [span for span in spans.completed_spans if span.id_.startswith("SpeculativeRAG.draft")]
    assert all("synthesize" in span.parent_id for span in drafts)
    calls = [event for event in events if event.class_name() == "LLMChatStartEvent"]
    parents = [finished[event.span_id].parent_id.split("-")[0] for event in calls]
    assert sorted(parents) == ["SpeculativeRAG.draft"] * 2 + ["SpeculativeRAG.verify"] * 2


def test_a_failed_draft_drops_its_span(collected):
    events, spans = collected
    calls = []

    def reply(prompt):
        calls.append(1)
        return RuntimeError("away") if len(calls) == 1 else ("r", "a")

    engine_of(ScriptedLM(reply, batched=False), drafts=2).query("q")
    (failed,) = [event for event in events if event.class_name() == "DraftFailedEvent"]
    assert failed.error == "RuntimeError: away"
    (dropped,) = spans.dropped_spans
    assert dropped.id_.startswith("SpeculativeRAG.draft") and failed.span_id == dropped.id_


def test_the_legacy_callbacks_keep_working():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine_of(callback_manager=CallbackManager([debug])).query("q")
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE):
        ((start, end),) = debug.get_event_pairs(kind)
        assert start.payload and end.payload
