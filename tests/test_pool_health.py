"""Members of a pool that are out, bounds on waiting, and who is told that nobody waits any more."""

import asyncio
import time
import types

import pytest

from benchmarks._fault_proxy import FaultProxy
from specrag.errors import InvalidInputError, ServerBusyError
from specrag.models import OpenAIEmbedder, OpenAILM, _circuit, _dispatch
from tests.servers import serving
from tests.serving_parts import until
from tests.test_server_pool import ASK, Member


@pytest.fixture(autouse=True)
def times(monkeypatch):
    """Health checks are frequent. Pauses end in no test by themselves, and a busy machine makes no server late."""
    monkeypatch.setattr(_circuit, "CHECK_EVERY", 0.05)
    for name in ("PASSED_OVER", "PASSED_OVER_LATE", "LONGEST_PASSED_OVER"):
        monkeypatch.setattr(_circuit, name, 600.0)
    late_after(60.0, monkeypatch)


def late_after(seconds, monkeypatch):
    for name in ("LATE_LEAST", "LATE_UNKNOWN"):
        monkeypatch.setattr(_dispatch, name, seconds)


async def under_load(lm, true, seconds=20.0):
    """Requests, one after another, until ``true()``; whether that came."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        await lm.agenerate([ASK])
        await asyncio.sleep(0.02)
    return true()


async def happened(true, seconds=20.0):
    await asyncio.to_thread(until, true, seconds)


async def prepared(lm, proxy):
    """The pool knows what its servers are, and nothing is under way at the proxy."""
    await lm.prepare()
    await happened(lambda: proxy.open == 0)


# --- health checks ----------------------------------------------------------------------------------------


async def test_a_server_that_is_started_again_gets_requests_long_before_its_pause_is_over():
    member = Member()
    other = Member(seconds=0.02)
    with serving(member) as first, serving(other) as second, FaultProxy(first) as proxy:
        lm = OpenAILM("m", [proxy.url, second])
        assert await under_load(lm, lambda: member.asked > 2)
        proxy.kill()
        assert await under_load(lm, lambda: other.asked > 4)
        before = member.asked
        proxy.revive()
        assert await under_load(lm, lambda: member.asked > before)  # its pause ends in 600 s


async def test_no_request_is_risked_on_a_server_whose_health_checks_are_not_answered(monkeypatch):
    monkeypatch.setattr("specrag.models._servers.DISCOVERY", 0.1)
    late_after(0.4, monkeypatch)
    member = Member()
    with serving(member) as first, serving(Member()) as second, FaultProxy(first) as proxy:
        lm = OpenAILM("m", [proxy.url, second])
        await prepared(lm, proxy)
        proxy.fault = "hang"
        assert await under_load(lm, lambda: proxy.asked == 1)
        checks = proxy.left
        assert await under_load(lm, lambda: proxy.left > checks + 1)  # a check was given up
        in_an_hour = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
        monkeypatch.setattr(_circuit, "time", in_an_hour)  # the pause after the failure is over
        await under_load(lm, lambda: False, 0.5)
        assert proxy.asked == 1
        proxy.fault = "none"
        assert await under_load(lm, lambda: proxy.asked > 1)


async def test_a_server_that_only_lists_its_models_is_left_alone_for_its_whole_pause(monkeypatch):
    """A health check is answered, and says nothing about requests."""
    late_after(0.4, monkeypatch)
    ill = Member(seconds=30)
    with serving(ill) as first, serving(Member()) as second:
        lm = OpenAILM("m", [first, second])
        assert await under_load(lm, lambda: ill.asked == 1)
        assert await under_load(lm, lambda: ill.listed > 1)  # a health check was answered
        await under_load(lm, lambda: False, 0.3)
    assert ill.asked == 1


async def test_a_pool_that_nobody_uses_sends_no_health_checks():
    member = Member()
    with serving(member) as first, serving(Member()) as second, FaultProxy(first) as proxy:
        lm = OpenAILM("m", [proxy.url, second])
        await prepared(lm, proxy)
        proxy.fault = "reset"
        await lm.agenerate([ASK])
        listed = member.listed
        await asyncio.sleep(0.5)
        assert proxy.open == 0 and member.listed == listed
        proxy.fault = "none"
        await lm.agenerate([ASK])
        await happened(lambda: member.listed == listed + 1)


async def test_a_server_that_says_it_is_still_loading_gets_no_request_early():
    member = Member()
    with serving(member) as first, serving(Member()) as second, FaultProxy(first) as proxy:
        lm = OpenAILM("m", [proxy.url, second])
        await prepared(lm, proxy)
        proxy.kill()
        await under_load(lm, lambda: False, 0.2)
        member.models, before = (503, b'{"error": {"message": "Loading model"}}'), member.asked
        listed = member.listed
        proxy.revive()
        assert await under_load(lm, lambda: member.listed > listed + 2)
        assert member.asked == before
        member.models = (200, b'{"data": []}')
        assert await under_load(lm, lambda: member.asked > before)


# --- waiting ----------------------------------------------------------------------------------------------


async def test_one_request_too_many_is_refused_at_once_and_says_what_to_do():
    member = Member()
    with serving(member) as url:
        lm = OpenAILM("m", url, max_concurrency=2, max_waiting=3)
        await lm.prepare()
        member.go.clear()
        asked = [asyncio.ensure_future(lm.agenerate([ASK])) for _ in range(5)]
        await happened(lambda: member.asked == 2)
        with pytest.raises(ServerBusyError, match=r"3 requests wait for http.*max_waiting"):
            await lm.agenerate([ASK])
        assert not any(one.done() for one in asked)
        member.go.set()
        assert [made[0].text for made in await asyncio.gather(*asked)] == ["Answer: 42"] * 5
        assert (await lm.agenerate([ASK]))[0].text == "Answer: 42"  # the queue is empty again
    assert member.asked == 6


async def test_a_batch_of_one_call_waits_in_the_call():
    member = Member(seconds=0.05)
    with serving(member) as url:
        lm = OpenAILM("m", url, max_concurrency=2, max_waiting=0)
        assert len(await lm.agenerate([ASK] * 20)) == 20
    assert member.peak == 2


async def test_requests_of_a_batch_that_failed_are_not_begun():
    member = Member(400, b'{"error": {"message": "too long"}}', seconds=0.05)
    with serving(member) as url:
        lm = OpenAILM("m", url, max_concurrency=1)
        with pytest.raises(Exception, match="too long"):
            await lm.agenerate([ASK] * 50)
    assert member.asked <= 2


@pytest.mark.parametrize("value", [-1, 1.5, None, True])
def test_the_bound_on_waiting_is_a_whole_number(value):
    for make in (OpenAILM, lambda model, url, **more: OpenAIEmbedder(url, model, **more)):
        with pytest.raises(InvalidInputError, match="max_waiting"):
            make("m", "http://127.0.0.1:9/v1", max_waiting=value)


# --- cancelled on the server ------------------------------------------------------------------------------


async def test_the_loser_of_a_hedge_is_cancelled_on_its_server(monkeypatch):
    late_after(0.4, monkeypatch)
    with serving(Member()) as first, serving(Member()) as second, FaultProxy(first) as late:
        lm = OpenAILM("m", [late.url, second])
        await prepared(lm, late)
        late.fault = "hang"
        replies = await lm.agenerate([ASK, ASK])  # one for each server
        assert [reply.text for reply in replies] == ["Answer: 42"] * 2
        await happened(lambda: late.asked == late.left == 1 and late.open == 0)


async def test_requests_of_a_question_that_is_cancelled_are_cancelled_on_their_servers():
    with serving(Member()) as url, FaultProxy(url) as proxy:
        lm = OpenAILM("m", proxy.url)
        await prepared(lm, proxy)
        proxy.fault = "hang"
        asked = asyncio.ensure_future(lm.agenerate([ASK] * 4))
        await happened(lambda: proxy.asked == 4)
        asked.cancel()
        await happened(lambda: proxy.left == 4 and proxy.open == 0)


# --- the last server that is left hangs -------------------------------------------------------------------


async def test_a_server_that_fails_once_is_asked_again_while_the_other_one_hangs(monkeypatch):
    """Each was asked, and the one that hangs would be waited for until the timeout."""
    late_after(0.4, monkeypatch)
    well = Member()
    with serving(well) as first, serving(Member()) as second, FaultProxy(first) as once, FaultProxy(second) as hung:
        lm = OpenAILM("m", [once.url, hung.url], backoff=0.1)
        await prepared(lm, once)
        once.fault, hung.fault = "reset", "hang"
        asked = asyncio.ensure_future(lm.agenerate([ASK]))
        await happened(lambda: hung.asked == 1)
        once.fault = "none"
        assert (await asyncio.wait_for(asked, 30))[0].text == "Answer: 42"
        await happened(lambda: hung.left == 1)
    assert well.asked == 1


async def test_a_server_that_is_loading_at_first_is_asked_later_what_it_is(monkeypatch):
    monkeypatch.setattr("specrag.models._discovery.ASK_AGAIN", 0.1)
    member = Member(models=(503, b'{"error": {"message": "Loading model"}}'))
    with serving(member) as url:
        lm = OpenAILM("m", url)
        await lm.prepare()
        assert lm.context_window is None
        member.models = (200, b'{"data": [{"id": "m", "max_model_len": 512}]}')
        await asyncio.sleep(0.2)
        await lm.prepare()
        assert lm.context_window == 512
