"""Spans, events and legacy callbacks of the LlamaIndex adapter."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler

from llamaindex_specrag.events import DraftEvent, DraftFailedEvent, VerdictEvent
from specrag import Sampling
from specrag.speculative.verification import Scoring
from tests.fakes import ScriptedLM, failing_lm, first_passage_lm
from tests.llamaindex_parts import WithLogProbs, collecting, engine_of, nodes


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
    assert ours[0] == "PerspectivesEvent"
    assert sorted(ours[1:]) == ["DraftEvent", "DraftEvent", "VerdictEvent", "VerdictEvent"]
    told = [event for event in events if isinstance(event, DraftEvent | VerdictEvent)]
    for index in (0, 1):  # drafts run side by side, and each is verified when it is there
        assert [type(event) for event in told if event.index == index] == [DraftEvent, VerdictEvent]
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


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("stage", ["draft", "verify"])
def test_of_drafts_with_equal_subsets_the_span_of_the_failed_one_is_dropped(collected, stage, position):
    events, spans = collected
    response = engine_of(
        failing_lm(position, stage), nodes(1), drafts=2, sampling=Sampling(temperature=1.0, seed=0)
    ).query("q")
    assert [row["subset"] for row in response.metadata["drafts"]] == [[0]]
    (dropped,) = spans.dropped_spans
    (failed,) = [event for event in events if isinstance(event, DraftFailedEvent)]
    assert (failed.index, failed.subset, failed.span_id) == (position, [0], dropped.id_)
    assert dropped.id_.startswith(f"SpeculativeRAG.{stage}-") and "away" in failed.error
    # The other draft's spans end with its own result.
    (verdict,) = [event for event in events if isinstance(event, VerdictEvent)]
    assert verdict.index == 1 - position and verdict.answer == f"answer {1 - position}" == str(response)
    arrived = {event.index: event.span_id for event in events if isinstance(event, DraftEvent)}
    assert set(arrived) == ({0, 1} if stage == "verify" else {1 - position})
    assert len(set(arrived.values())) == len(arrived) and dropped.id_ not in arrived.values()
    assert verdict.span_id in {span.id_ for span in spans.completed_spans} and not spans.open_spans


def test_a_draft_that_comes_after_the_deadline_ends_its_span(collected):
    events, spans = collected
    drafter = first_passage_lm(batched=False, delay=lambda text: 30.0 if "passage 0 " in text else 0.0)
    engine_of(drafter, drafts=3, deadline=0.5).query("q")
    drafts = [span.id_ for span in spans.completed_spans if span.id_.startswith("SpeculativeRAG.draft")]
    arrived = [event.span_id for event in events if isinstance(event, DraftEvent)]
    assert len(drafts) == 3 and len(arrived) == 2 and set(arrived) < set(drafts)
    assert not spans.open_spans and not spans.dropped_spans
