"""What begins, ends and fails on the way to an answer, as traces show it."""

from collections import Counter

import pytest

from specrag import Passage, Prompts, Sampling, SpeculativeRAG
from specrag.errors import ModelError
from specrag.schema import Draft, ReadingDone, SubsetsChosen, Verdict
from specrag.speculative.work import Ended, Failed, Started, Work, WorkTracker, current_work, working_on
from tests.fakes import NAN, HashEmbedder, ScriptedLM, ScriptedReader

PASSAGES = [Passage(f"passage {i} .") for i in range(4)]
PERSPECTIVES = Work("perspectives")


def steps_of(reply=lambda text: ("because", "42"), passages=PASSAGES, **options) -> list:
    """Every step of one question, with that of the end."""
    lm = {name: options.pop(name) for name in ("batched", "scores", "delay") if name in options}
    rag = SpeculativeRAG(drafter=ScriptedLM(reply, **lm), embedder=HashEmbedder(), drafts=2, **options)
    tracker = WorkTracker()
    steps = tracker.begin()
    try:
        for event in rag.stream("q", passages):
            steps += tracker.see(event)
    except ModelError as error:
        return steps + tracker.close(error)
    return steps + tracker.close()


def check_balance(steps: list) -> None:
    """Every piece of work begins once and ends or fails once, in this order."""
    begun = [step.work for step in steps if isinstance(step, Started)]
    done = [step.work for step in steps if not isinstance(step, Started)]
    assert Counter(begun) == Counter(done) and max(Counter(begun).values()) == 1
    for work in begun:
        kinds = [type(step) for step in steps if step.work == work]
        assert kinds[0] is Started and len(kinds) == 2


@pytest.mark.parametrize("batched", [True, False])
def test_a_draft_is_drafted_then_verified(batched):
    steps = steps_of(batched=batched)
    check_balance(steps)
    assert [step.work for step in steps[:4]] == [PERSPECTIVES, PERSPECTIVES, Work("draft", 0), Work("draft", 1)]
    made = {step.work: step.made for step in steps if isinstance(step, Ended)}
    assert isinstance(made[PERSPECTIVES], SubsetsChosen)
    given = {step.work: step.given for step in steps if isinstance(step, Started)}
    for j, subset in enumerate(made[PERSPECTIVES].subsets):
        assert given[Work("draft", j)] == subset
        assert isinstance(made[Work("draft", j)], Draft) and made[Work("draft", j)].subset == subset
        assert given[Work("verify", j)] is made[Work("draft", j)]
        assert isinstance(made[Work("verify", j)], Verdict) and made[Work("verify", j)].draft.index == j


def test_a_draft_that_abstains_is_not_verified():
    steps = steps_of(lambda text: ("x", Prompts().abstention))
    check_balance(steps)
    assert {step.work.stage for step in steps} == {"perspectives", "draft"}


@pytest.mark.parametrize("position", [0, 1])
def test_the_draft_that_failed_fails_also_beside_one_with_its_subset(position):
    calls = []

    def reply(text):
        calls.append(text)
        return RuntimeError("away") if len(calls) == position + 1 else ("because", "42")

    steps = steps_of(reply, PASSAGES[:1], batched=False, sampling=Sampling(temperature=1.0, seed=0))
    check_balance(steps)
    (failed,) = [step for step in steps if isinstance(step, Failed)]
    assert failed.work == Work("draft", position) and str(failed.error) == "RuntimeError: away"


def test_a_draft_lost_in_verification_fails_there():
    steps = steps_of(
        lambda text: ("x", "bad" if "passage 0 " in text else "good"), scores=lambda t: NAN if "bad" in t else -1
    )
    check_balance(steps)
    (failed,) = [step for step in steps if isinstance(step, Failed)]
    assert failed.work.stage == "verify" and "NaN" in str(failed.error)


def test_what_is_open_at_the_end_is_late():
    steps = steps_of(batched=False, delay=lambda text: 30.0 if "passage 0 " in text else 0.0, deadline=0.3)
    check_balance(steps)
    (late,) = [step for step in steps if isinstance(step, Ended) and step.made is None]
    assert late.work.stage == "draft"


def test_an_error_fails_what_is_open():
    steps = steps_of(lambda text: ModelError("broken"))
    check_balance(steps)
    assert [type(step) for step in steps if step.work.stage == "draft"].count(Failed) == 2
    tracker = WorkTracker()
    (begun,) = tracker.begin()
    error = ValueError("x")
    assert tracker.close(error) == [Failed(begun.work, error)] and tracker.close() == []


def test_calls_know_the_draft_that_they_serve():
    seen = []

    class Watched(ScriptedLM):
        async def agenerate(self, requests, sampling=None, *, top_log_probs=0):
            seen.append(current_work.get())
            return await super().agenerate(requests, sampling, top_log_probs=top_log_probs)

        async def ascore(self, requests):
            seen.append(current_work.get())
            return await super().ascore(requests)

    def asked_for(batched):
        seen.clear()
        lm = Watched(lambda text: ("x", "a" if "passage 0 " in text else "b"), batched=batched)
        SpeculativeRAG(drafter=lm, embedder=HashEmbedder(), drafts=2).answer("q", PASSAGES)
        return set(seen)

    assert asked_for(False) == {Work(stage, j) for stage in ("draft", "verify") for j in (0, 1)}
    assert asked_for(True) == {None}  # one call for both
    with working_on(Work("draft", 1)):
        assert current_work.get() == Work("draft", 1)
    assert current_work.get() is None


# --- readers --------------------------------------------------------------------------------------------


def steps_with(reader: ScriptedReader, question: str = "which passage", **options) -> list:
    """Every step of one question that a reader reads first, and a language model where it is asked."""
    lm = ScriptedLM(lambda text: ("because", "42"))
    rag = SpeculativeRAG(drafter=[reader, lm], embedder=HashEmbedder(), drafts=2, **options)
    tracker = WorkTracker(readers=True)
    steps = tracker.begin()
    for event in rag.stream(question, PASSAGES):
        steps += tracker.see(event)
    return steps + tracker.close()


def test_a_reader_reads_before_anything_else_and_alone_where_it_is_sure():
    steps = steps_with(ScriptedReader({"passage 1": 0.6, "passage 2": 0.3}))
    check_balance(steps)
    reading = Work("read", 2)  # the first two indexes belong to the language model's drafts
    assert [step.work for step in steps[:2]] == [reading, reading] and steps[0].model == "scripted-reader"
    (done,) = [step.made for step in steps if isinstance(step, Ended) and step.work == reading]
    assert isinstance(done, ReadingDone) and done.drafts == 2 and done.log_no_answer == pytest.approx(-2.302585)
    assert {step.work.stage for step in steps} == {"read", "verify"}


def test_after_a_doubtful_reading_the_perspectives_begin_and_the_model_drafts():
    steps = steps_with(ScriptedReader({"passage 1": 0.1}))
    check_balance(steps)
    order = list(dict.fromkeys(step.work for step in steps if isinstance(step, Started)))
    assert [order.index(work) for work in (Work("read", 2), PERSPECTIVES, Work("draft", 0))] == [0, 2, 3]
    assert order[1] == Work("verify", 2)  # the copied draft


def test_a_reader_that_fails_ends_its_reading_with_the_error():
    steps = steps_with(ScriptedReader({}, error=RuntimeError("away")))
    check_balance(steps)
    (failed,) = [step for step in steps if isinstance(step, Failed)]
    assert failed.work == Work("read", 2) and "away" in str(failed.error)
    assert Work("draft", 1) in {step.work for step in steps}


async def test_whoever_listens_knows_of_a_piece_of_work_before_its_model_is_called():
    begun, seen = set(), []

    class Watched(ScriptedLM):
        async def agenerate(self, requests, sampling=None, *, top_log_probs=0):
            seen.append(current_work.get() in begun)
            return await super().agenerate(requests, sampling, top_log_probs=top_log_probs)

    class WatchedReader(ScriptedReader):
        async def aread(self, question, texts, **options):
            seen.append(current_work.get() in begun)
            return await super().aread(question, texts, **options)

    drafters = [WatchedReader({"passage 1": 0.1}), Watched(lambda text: ("x", "y"), batched=False)]
    tracker = WorkTracker(readers=True)
    rag = SpeculativeRAG(drafter=drafters, embedder=HashEmbedder(), drafts=2)
    async for event in rag.astream("q", PASSAGES):
        begun |= {step.work for step in tracker.see(event) if isinstance(step, Started)}
    assert seen == [True] * 3
