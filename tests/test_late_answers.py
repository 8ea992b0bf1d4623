"""What an answer says when the deadline passes: what went wrong, and the drafts that are there."""

import asyncio
import json
import socket
import time

import pytest

from specrag import SpeculativeRAG
from specrag.errors import ModelError
from specrag.models import OpenAIEmbedder, OpenAILM
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder, ScriptedLM, ScriptedReader
from tests.servers import serving
from tests.test_confidence import PASSAGES as TOWERS
from tests.test_confidence import answering, escalating
from tests.test_pipeline import PASSAGES, by_passage


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What the first question imports takes no time of a deadline."""
    asked(None)


def refusing_server(status, message):
    def answer(method, path, body, headers):
        if method == "GET":
            return 200, b'{"data": []}', {}
        return status, json.dumps({"error": {"message": message}}).encode(), {}

    return serving(answer)


def asked(deadline=1.0, *, verifier=None, drafter=None, **more):
    drafter = drafter or ScriptedLM(by_passage, batched=False)
    more.setdefault("embedder", HashEmbedder())
    rag = SpeculativeRAG(drafter=drafter, verifier=verifier, drafts=3, deadline=deadline, **more)
    start = time.monotonic()
    answer = rag.answer("q", PASSAGES)
    assert deadline is None or time.monotonic() - start < deadline + 15  # what hangs, hangs for 30 s or for good
    return answer


@pytest.mark.parametrize(("status", "message"), [(429, "slow down"), (500, "CUDA error"), (503, "loading model")])
def test_the_last_problem_of_the_verifier_is_in_the_answer(status, message):
    with refusing_server(status, message) as url:
        answer = asked(verifier=OpenAILM("m", url))
    assert len(answer.failures) == 3 and all(message in failure.error for failure in answer.failures)
    assert "last problem" in answer.failures[0].error


def test_a_verifier_that_cannot_be_reached_is_named():
    answer = asked(verifier=OpenAILM("m", "http://127.0.0.1:9/v1"))
    assert all("ConnectError" in failure.error and "127.0.0.1:9" in failure.error for failure in answer.failures)
    answer = asked(verifier=OpenAILM("m", "http://no-such-host.invalid/v1"))
    assert answer.failures and "no-such-host.invalid" in answer.failures[0].error


def test_the_last_problem_of_the_drafter_is_in_the_answer():
    with refusing_server(500, "CUDA error") as url:
        answer = asked(drafter=OpenAILM("m", url))
    assert answer.abstained and len(answer.failures) == 3
    assert all("not drafted by the deadline" in f.error and "CUDA error" in f.error for f in answer.failures)


def test_a_drafter_that_says_nothing_before_the_deadline_is_named():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        answer = asked(drafter=OpenAILM("m", f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=0.3))
    assert answer.failures and "no whole reply within 0.3 s" in answer.failures[0].error


def test_without_the_verifier_the_drafters_own_scores_decide_and_a_note_says_so():
    answer = asked(verifier=OpenAILM("m", "http://127.0.0.1:9/v1"))
    best = max(answer.verdicts, key=lambda verdict: verdict.log_draft)
    assert not answer.abstained and answer.text == best.draft.text and answer.passages == best.draft.passages
    assert answer.scores_used == ("draft",) and answer.confidence is None
    assert "no draft was verified by the deadline: the drafter's own scores decided" in answer.notes
    assert len(answer.unverified) == 3 and "unverified" not in answer.details()


def test_a_verifier_that_is_only_slow_is_no_failure():
    slow = ScriptedLM(by_passage, batched=False)

    async def score(requests):
        await asyncio.sleep(30)

    slow.ascore = score
    answer = asked(0.5, verifier=slow)
    assert answer.failures == () and len(answer.unverified) == 3 and not answer.abstained


@pytest.mark.parametrize("more", [{"scoring": Scoring(threshold=-5.0)}])
def test_a_draft_that_could_not_meet_the_threshold_is_no_answer(more):
    answer = asked(verifier=OpenAILM("m", "http://127.0.0.1:9/v1"), **more)
    assert answer.abstained and len(answer.unverified) == 3 and "no draft was verified in time" in answer.reason


def test_with_a_deadline_a_verifier_that_fails_in_time_costs_no_answer():
    broken = ScriptedLM(by_passage, batched=False)
    broken.score = lambda requests: (_ for _ in ()).throw(ModelError("out of memory"))
    answer = asked(5.0, verifier=broken)
    assert not answer.abstained and "out of memory" in answer.failures[0].error and len(answer.unverified) == 3
    with pytest.raises(ModelError, match="out of memory"):
        asked(None, verifier=broken)


@pytest.mark.parametrize("answered", [True, False])
def test_an_embedder_that_does_not_answer_before_the_deadline_is_named(answered):
    with socket.socket() as silent, refusing_server(500, "CUDA error") as url:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        answer = asked(0.5, embedder=OpenAIEmbedder(url if answered else hanging, "m"))
    assert answer.abstained
    (note,) = (note for note in answer.notes if "deadline" in note)
    assert "the passages were being embedded" in note and ("CUDA error" in note) == answered


def test_a_reader_that_does_not_end_before_the_deadline_is_named():
    reader = ScriptedReader({"1898": 0.9})

    async def read(*given, **options):
        await asyncio.sleep(30)

    reader.aread = read
    answer = asked(0.3, drafter=reader)
    assert answer.abstained and "the deadline of 0.3 s passed while scripted-reader read the passages" in answer.notes


def test_a_verifier_that_answers_itself_keeps_to_the_deadline():
    made = escalating(0.3, answering("in 1889"), deadline=0.5)
    ended = []

    async def agenerate(*given, **options):
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(time.monotonic())

    made.verifier.agenerate = agenerate
    start = time.monotonic()
    answer = made.answer("when", TOWERS)
    assert time.monotonic() - start < 15 and ended
    assert (answer.text, answer.escalated) == ("1889", None)
    assert "the deadline of 0.5 s passed before the verifier had answered itself" in answer.notes
