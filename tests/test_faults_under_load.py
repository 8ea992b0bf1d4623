"""Many questions at once over two drafter servers and one verifier server, of which one has a fault.

The servers replay what a real vLLM answered; a proxy in front of one of them makes the fault on the wire. Every
question ends in its right answer, or in an error that says what happened: none is lost.
"""

import asyncio
import time
from contextlib import ExitStack

import pytest

from benchmarks._fault_proxy import FaultProxy
from specrag import SpeculativeRAG
from specrag.errors import DraftingError, SpecRAGError
from specrag.models import OpenAILM, _dispatch
from tests.fakes import HashEmbedder
from tests.servers import replaying
from tests.test_openai_lm import PASSAGES, QUESTION

COUNT, DEADLINE = 8, 20.0


class Fleet:
    """Two drafters and a verifier, each behind a proxy."""

    def __init__(self, stack, tokenizer, **options):
        self.drafters = [stack.enter_context(FaultProxy(stack.enter_context(replaying()))) for _ in range(2)]
        self.verifier = stack.enter_context(FaultProxy(stack.enter_context(replaying())))
        self.rag = SpeculativeRAG(
            drafter=OpenAILM("smollm2", [d.url for d in self.drafters], tokenizer=tokenizer, **options),
            verifier=OpenAILM("smollm2", self.verifier.url, tokenizer=tokenizer, **options),
            embedder=HashEmbedder(),
            drafts=2,
            max_rationale_tokens=16,
            max_answer_tokens=8,
            deadline=DEADLINE,
        )

    async def asked(self, count=COUNT):
        """What each of the questions comes to: an answer or an error. Another exception is a lost question."""

        async def ask():
            start = time.monotonic()
            try:
                return await self.rag.aanswer(QUESTION, PASSAGES)
            except SpecRAGError as error:
                return error
            finally:
                assert time.monotonic() - start < DEADLINE + 15  # what hangs, hangs for good

        return await asyncio.gather(*(ask() for _ in range(count)))


@pytest.fixture(autouse=True)
def late_is_soon(monkeypatch):
    monkeypatch.setattr(_dispatch, "LATE_UNKNOWN", 0.5)


@pytest.fixture
def fleet(smollm2):
    with ExitStack() as stack:
        yield Fleet(stack, smollm2.tokenizer)


@pytest.fixture(scope="module")
def right(smollm2):
    """The answer of servers that are well."""
    with ExitStack() as stack:
        answer = Fleet(stack, smollm2.tokenizer).rag.answer(QUESTION, PASSAGES)
    assert answer.text and answer.scores_used == ("draft", "self_contain", "self_reflect") and not answer.failures
    return answer


def verified(answers, right):
    """How many have the right answer, with the verifier's scores of both drafts."""
    return sum(
        isinstance(a, type(right)) and a.text == right.text and len(a.verdicts) == 2 and not a.unverified
        for a in answers
    )


@pytest.mark.parametrize("fault", ["none", "reset", "hang", "rubbish", "half", "busy", "slow"])
async def test_a_drafter_with_a_fault_costs_no_answer(fleet, right, fault):
    fleet.drafters[0].fault = fault
    assert verified(await fleet.asked(), right) == COUNT
    assert fleet.drafters[1].asked >= COUNT


async def test_a_drafter_that_is_killed_in_the_middle_of_requests_costs_no_answer(fleet, right):
    fleet.drafters[0].fault = "slow"  # so that requests are under way

    async def kill():
        while not (fleet.drafters[0].asked and fleet.drafters[0].open):
            await asyncio.sleep(0.01)
        fleet.drafters[0].kill()

    answers, _ = await asyncio.gather(fleet.asked(), kill())
    assert verified(answers, right) == COUNT


async def test_a_verifier_that_is_started_again_verifies_what_waits(fleet, right):
    async def restart():
        while fleet.verifier.asked < 3:
            await asyncio.sleep(0.01)
        fleet.verifier.kill()
        await asyncio.sleep(1.0)
        fleet.verifier.revive()

    answers, _ = await asyncio.gather(fleet.asked(), restart())
    assert verified(answers, right) == COUNT


async def test_a_verifier_that_asks_to_wait_is_obeyed_and_verifies_later(fleet, right):
    await fleet.rag.verifier.prepare()  # what was recorded was sent to a server that is known
    fleet.verifier.fault = "busy"

    async def recover():
        await asyncio.sleep(1.5)
        fleet.verifier.fault = "none"

    answers, _ = await asyncio.gather(fleet.asked(), recover())
    assert verified(answers, right) == COUNT
    assert fleet.verifier.asked <= COUNT * 2 * 4  # two drafts each: the first try, and those after a second or more


async def test_without_the_verifier_the_drafters_scores_decide_and_every_answer_says_so(fleet):
    fleet.rag = fleet.rag.replace(deadline=3.0)
    fleet.verifier.kill()
    answers = await fleet.asked(3)
    assert all(
        not a.abstained and len(a.unverified) == 2 and "no draft was verified" in " ".join(a.notes) for a in answers
    )


async def test_without_a_drafter_every_question_ends_in_a_clear_error(fleet):
    for drafter in fleet.drafters:
        drafter.kill()
    answers = await fleet.asked()
    assert all(isinstance(a, DraftingError) and "is the server running" in str(a) for a in answers)


async def test_questions_beyond_the_queue_get_a_clear_error_and_the_others_their_answers(smollm2, right):
    with ExitStack() as stack:
        fleet = Fleet(stack, smollm2.tokenizer, max_concurrency=1, max_waiting=6)
        answers = await fleet.asked()
    refused = [a for a in answers if isinstance(a, SpecRAGError)]
    assert refused and all("requests wait for" in str(a) and "max_waiting" in str(a) for a in refused)
    assert any(getattr(a, "text", None) == right.text for a in answers)
