"""Runs and custom events of the LangChain adapter."""

from __future__ import annotations

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel

from langchain_specrag import SpeculativeRAGRunnable
from specrag import Sampling
from tests.fakes import ScriptedLM, failing_lm, first_passage_lm
from tests.langchain_parts import QUESTION, CollectingTracer, chain_of, documents


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


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("stage", ["draft", "verify"])
async def test_of_drafts_with_equal_subsets_the_run_of_the_failed_one_ends_with_the_error(stage, position):
    tracer, lost = CollectingTracer(), []

    class Handler(BaseCallbackHandler):
        def on_custom_event(self, name, data, *, run_id, **kwargs):
            if name == "specrag_draft_failed":
                lost.append(data)

    rag = SpeculativeRAGRunnable(
        drafter=failing_lm(position, stage), drafts=2, sampling=Sampling(temperature=1.0, seed=0)
    )
    result = await rag.ainvoke({"input": "q", "context": documents(1)}, {"callbacks": [tracer, Handler()]})
    assert [row["documents"] for row in result["drafts"]] == [[0]]  # two drafts of the one subset, one of them lost
    runs = {run.name: run for run in tracer.roots[0].child_runs}
    name = {"draft": "draft", "verify": "verification"}[stage]
    assert [run.name for run in runs.values() if run.error] == [f"{name} {position + 1}"]
    assert "away" in runs[f"{name} {position + 1}"].error
    kept = f"verification {2 - position}"
    assert set(runs[kept].outputs) == {"log_draft", "log_self_contain", "log_self_reflect"}
    assert runs[kept].inputs["answer"] == f"answer {1 - position}" == result["answer"]
    assert all(run.end_time is not None for run in runs.values())
    assert [(data["index"], data["documents"]) for data in lost] == [(position, [0])]


async def test_a_draft_that_comes_after_the_deadline_ends_as_late():
    tracer = CollectingTracer()
    drafter = first_passage_lm(batched=False, delay=lambda text: 30.0 if "passage 0 " in text else 0.0)
    await chain_of(drafter, drafts=3, passages_per_draft=2, deadline=0.5).ainvoke(QUESTION, {"callbacks": [tracer]})
    runs = next(run for run in tracer.roots[0].child_runs if run.name == "SpeculativeRAG").child_runs
    late = [run for run in runs if run.outputs == {"late": True}]
    assert [run.name.split()[0] for run in late] == ["draft"] and all(run.end_time is not None for run in runs)
