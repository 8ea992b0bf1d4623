"""A pool of servers of which one is ill: no question is lost while another one is well."""

import asyncio
import gc
import json
import os
import socket
import threading
import time
import types
from contextlib import ExitStack
from pathlib import Path

import pytest

from specrag import Passage, SpeculativeRAG
from specrag.errors import ServerError
from specrag.models import GenerationRequest, OpenAIEmbedder, OpenAILM, Stage, Turn, _circuit, _dispatch
from specrag.models._http import server_at
from specrag.models._servers import ServerPool
from tests.servers import serving
from tests.serving_parts import until

ASK = GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:"),))
GOOD = json.dumps({"choices": [{"message": {"content": "Answer: 42"}, "finish_reason": "stop"}], "usage": {}}).encode()
MODELS = json.dumps({"data": [{"id": "m", "owned_by": "someone", "max_model_len": 4096}]}).encode()


class Member:
    """A server of a pool: its answers to requests for a reply, and how long they take.

    Clear ``go``, and requests for a reply are held back until it is set.
    """

    def __init__(self, status=200, content=GOOD, *, seconds=0.0, models=(200, MODELS), headers=None):
        self.status, self.content, self.seconds, self.models = status, content, seconds, models
        self.headers = headers or {}
        self.asked = self.listed = self.running = self.peak = 0
        self._lock = threading.Lock()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, method, path, body, headers):
        if method == "GET":
            self.listed += 1
            return *self.models, {}
        with self._lock:
            self.asked += 1
            self.running += 1
            self.peak = max(self.peak, self.running)
        self.go.wait(60)
        time.sleep(self.seconds)
        with self._lock:
            self.running -= 1
        return self.status, self.content, self.headers


FAULTS = {
    "half JSON": (200, GOOD[: len(GOOD) // 2]),
    "HTML": (200, b"<html>Welcome</html>"),
    "nothing": (200, b""),
    "a list": (200, b"[]"),
    "no choices": (200, b'{"object": "x"}'),
    "empty choices": (200, b'{"choices": []}'),
    "no message": (200, b'{"choices": [{"text": "x"}]}'),
    "an error inside": (200, b'{"error": {"message": "CUDA error"}, "choices": [{"message": {"content": ""}}]}'),
    "too deep": (200, b"[" * 100_000),
    "a redirect": (302, b""),
    "400": (400, b'{"error": {"message": "no such adapter"}}'),
    "401": (401, b'{"error": {"message": "invalid key"}}'),
    "404": (404, b'{"detail": "Not Found"}'),
    "413": (413, b"too large"),
    "422": (422, b"?"),
    "429": (429, b"slow down"),
    "502": (502, b"<html>Bad Gateway</html>"),
    "529": (529, b"overloaded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_request_is_lost_while_one_server_is_well(fault):
    ill, well = Member(*FAULTS[fault]), Member()
    with serving(ill) as first, serving(well) as second:
        lm = OpenAILM("m", [first, second], backoff=30)
        start = time.monotonic()
        made = [completion.text for _ in range(5) for completion in lm.generate([ASK] * 4)]
        assert made == ["Answer: 42"] * 20 and time.monotonic() - start < 20
    assert ill.asked <= 8  # those of the first batch; then it is left alone


def test_a_server_that_fails_fast_is_not_the_least_busy_one():
    ill, well = Member(502, b""), Member(seconds=0.1)
    with serving(ill) as first, serving(well) as second:
        OpenAILM("m", [first, second]).generate([ASK] * 24)
    assert ill.asked < 16 and well.asked >= 24


@pytest.mark.parametrize("seconds", [60, 4])
def test_a_hanging_or_slow_server_does_not_starve_the_other(seconds):
    ill, well = Member(seconds=seconds), Member(seconds=0.05)
    with serving(ill) as first, serving(well) as second:
        lm = OpenAILM("m", [first, second], max_concurrency=4)

        async def questions():
            return [await asyncio.wait_for(lm.agenerate([ASK] * 5), 30) for _ in range(10)]

        assert len(asyncio.run(questions())) == 10
    assert ill.asked <= 8


def test_a_long_reply_is_not_late_because_scores_are_quick(monkeypatch):
    """Both go to the same endpoint."""
    monkeypatch.setattr(_dispatch, "LATE_UNKNOWN", 60.0)
    asked = []

    def answer(method, path, body, headers):
        if method == "GET":
            return 200, MODELS, {}
        limit = json.loads(body)["max_tokens"]
        asked.append(limit)
        time.sleep(0.0 if limit == 1 else 1.2)
        return 200, b'{"choices": [{"text": "42", "finish_reason": "stop"}]}', {}

    with serving(answer) as first, serving(answer) as second:
        lm = OpenAILM("m", [first, second], api="completions")
        lm.generate([GenerationRequest(ASK.turns, (Stage(max_tokens=1),))] * 20)
        lm.generate([GenerationRequest(ASK.turns, (Stage(max_tokens=200),))] * 2)
    assert asked.count(200) == 2


def test_the_answer_of_a_late_server_still_counts_when_it_comes_first(monkeypatch):
    monkeypatch.setattr(_dispatch, "LATE_UNKNOWN", 0.2)
    late, later = Member(seconds=0.6), Member(seconds=60)
    with serving(late) as first, serving(later) as second:
        start = time.monotonic()
        assert OpenAILM("m", [first, second]).generate([ASK])[0].text == "Answer: 42"
        assert time.monotonic() - start < 30
    assert late.asked == later.asked == 1


def test_a_server_that_is_ill_is_tried_by_one_request_at_a_time_and_used_when_it_is_well_again(monkeypatch):
    sick, well = Member(502, b""), Member(seconds=0.05)
    with serving(sick) as first, serving(well) as second:
        lm = OpenAILM("m", [first, second])
        lm.generate([ASK] * 4)
        before = sick.asked
        monkeypatch.setattr(_circuit, "time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + 20))
        lm.generate([ASK] * 8)
        assert sick.asked == before + 1  # half open: one request tried it
        sick.status, sick.content = 200, GOOD
        monkeypatch.setattr(_circuit, "time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + 100))
        lm.generate([ASK] * 2)
        lm.generate([ASK] * 8)
    assert sick.asked > before + 4


def test_a_server_that_was_late_once_is_soon_used_again(monkeypatch):
    for name in ("LATE_LEAST", "LATE_UNKNOWN"):
        monkeypatch.setattr(_dispatch, name, 0.2)
    monkeypatch.setattr(_circuit, "PASSED_OVER_LATE", 0.1)
    monkeypatch.setattr(_circuit, "PASSED_OVER", 600.0)
    late, other = Member(), Member(seconds=0.02)
    with serving(late) as first, serving(other) as second:
        lm = OpenAILM("m", [first, second])
        late.go.clear()
        lm.generate([ASK])
        assert (late.asked, other.asked) == (1, 1)
        late.go.set()
        until(lambda: lm.generate([ASK]) and late.asked > 3)


@pytest.mark.parametrize("answer", ["an error", "a good one, and then it is late"])
def test_a_server_whose_health_checks_were_not_answered_is_not_locked_out_after_an_answer(answer):
    """Where no other server is left, it is asked all the same, and may answer."""
    server = server_at("http://127.0.0.1:9/v1")
    server.failed(silent=True)
    server.checked(answered=False, well=False)
    if answer == "an error":
        server.failed()
        assert not server.to_check
    else:
        server.answered()
        server.failed(silent=True, late=True)
    later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_circuit, "time", later)
        assert server.usable


@pytest.mark.parametrize("end", ["the reply cannot be read", "the event loop is closed"])
def test_a_server_is_tried_again_after_a_trial_without_a_result(monkeypatch, end):
    monkeypatch.setattr(_circuit, "PASSED_OVER", 0.0)
    member = Member(status=500)

    def broken(reply):
        raise KeyError("choices")

    with serving(member) as url:
        pool = ServerPool(url, "m", retries=0)
        with pytest.raises(ServerError):
            asyncio.run(pool.post("chat/completions", {}))
        member.status = 200
        if end == "the reply cannot be read":
            with pytest.raises(KeyError):
                asyncio.run(pool.post("chat/completions", {}, broken))
        else:
            member.go.clear()
            loop = asyncio.new_event_loop()
            asked = loop.create_task(pool.post("chat/completions", {}))
            loop.run_until_complete(asyncio.to_thread(until, lambda: member.asked == 2))
            loop.close()
            del asked
            member.go.set()
            asyncio.run(pool.discover())  # the next event loop
    assert pool.servers[0].failures == 1 and pool.servers[0].usable


def test_permits_are_per_server():
    members = [Member(seconds=0.1), Member(seconds=0.1)]
    with serving(members[0]) as first, serving(members[1]) as second:
        OpenAILM("m", [first, second], max_concurrency=3).generate([ASK] * 18)
    assert [member.peak for member in members] == [3, 3]


def test_a_request_that_every_server_refuses_is_refused_and_makes_none_of_them_ill():
    members = [Member(400, b'{"error": {"message": "too long"}}') for _ in range(2)]
    with serving(members[0]) as first, serving(members[1]) as second:
        lm = OpenAILM("m", [first, second], backoff=30)
        with pytest.raises(ServerError, match="too long"):
            lm.generate([ASK])
        assert [member.asked for member in members] == [1, 1]
        for member in members:
            member.status, member.content = 200, GOOD
        lm.generate([ASK] * 6)
    assert all(member.asked >= 3 for member in members)


def test_embeddings_that_cannot_be_used_move_to_the_other_server_too():
    def vectors(count):
        return json.dumps({"data": [{"embedding": [1.0, 0.0]} for _ in range(count)]}).encode()

    with serving(Member(200, vectors(1))) as first, serving(Member(200, vectors(2))) as second:
        assert OpenAIEmbedder([first, second], "m", backoff=30).embed(["a", "b"]).shape == (2, 2)


# --- what the servers say about themselves --------------------------------------------------------------


def test_each_server_is_asked_once_what_it_is_whoever_waits():
    members = [Member(), Member()]
    with serving(members[0]) as first, serving(members[1]) as second:
        lm = OpenAILM("m", [first, second])
        lm.generate([ASK] * 8)
        lm.generate([ASK] * 8)
    assert [member.listed for member in members] == [1, 1]


def test_the_first_question_is_cut_to_the_servers_window():
    longest = 0

    def answer(method, path, body, headers):
        nonlocal longest
        if method == "GET":
            return 200, b'{"data": [{"id": "m", "meta": {"n_ctx": 1024}}]}', {}
        longest = max(longest, len(body))
        return (200, GOOD, {}) if len(body) < 2500 else (400, b'{"error": {"message": "exceeds the context"}}', {})

    with serving(answer) as url:
        rag = SpeculativeRAG(drafter=OpenAILM("m", url, prompt_log_probs="never"), drafts=2, subsets="random")
        made = rag.answer("q", [Passage("word " * 3000), Passage("other " * 3000)])
    assert not made.failures and "window of 1024 tokens" in " ".join(made.notes) and longest > 1000


@pytest.fixture
def hanging():
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_a_server_that_does_not_say_what_it_is_holds_up_nobody(hanging, monkeypatch):
    monkeypatch.setattr("specrag.models._servers.DISCOVERY", 60.0)
    well = Member()
    with serving(well) as url:
        lm = OpenAILM("m", [hanging, url])
        start = time.monotonic()
        asyncio.run(lm.prepare())
        assert lm.context_window == 4096 and time.monotonic() - start < 30


def test_a_dead_server_is_found_out_once_and_costs_later_questions_no_waiting(monkeypatch):
    sent, fetch = [], _dispatch.fetch
    monkeypatch.setattr(_dispatch, "fetch", lambda *given, **more: sent.append(given) or fetch(*given, **more))
    lm = OpenAILM("m", "http://127.0.0.1:9/v1", retries=2, backoff=0.1)
    attempts = []
    for _ in range(3):
        sent.clear()
        with pytest.raises(ServerError, match="is the server running"):
            lm.generate([ASK] * 5)
        attempts.append(len(sent))
    assert attempts[0] > 5 and attempts[1:] == [5, 5]


def test_where_nobody_listens_and_nobody_ever_did_that_is_said_at_once():
    for lm in (OpenAILM("m", "http://127.0.0.1:9/v1"), OpenAILM("m", "http://nowhere.invalid/v1")):
        with pytest.raises(ServerError, match="after 2 attempts.*is the server running"):
            lm.generate([ASK])


def test_a_server_that_is_started_again_is_waited_for():
    with serving(Member()) as url:
        lm = OpenAILM("m", url, backoff=0.3)
        lm.generate([ASK])
    with ExitStack() as again:
        starts = threading.Timer(1.5, lambda: again.enter_context(serving(Member(), int(url.split(":")[2][:-3]))))
        starts.start()
        assert lm.generate([ASK])[0].text == "Answer: 42"
        starts.join()


@pytest.mark.parametrize(
    "models",
    [
        (200, b'[{"id": "m", "max_model_len": 512}]'),
        (200, b"<html>"),
        (200, b""),
        (200, b"{}"),
        (200, b'{"data": null}'),
        (200, b'{"data": ["m"]}'),
        (200, b'{"data": [{"id": "m", "meta": "x", "max_model_len": "big"}]}'),
        (301, b""),
        (404, b"?"),
        (401, b"?"),
        (500, b"?"),
    ],
)
def test_a_list_of_models_in_any_state_makes_no_server_unusable(models):
    member = Member(models=models)
    with serving(member) as url:
        lm = OpenAILM("m", url)
        assert lm.generate([ASK])[0].text == "Answer: 42"
        assert lm.context_window == (512 if models[1].startswith(b"[") else None)
    assert member.listed == 1


# --- connections ------------------------------------------------------------------------------------------


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts the open files of Linux")
@pytest.mark.parametrize("runner", ["asyncio.run", "a bare loop"])
def test_event_loops_that_end_leave_no_socket_open(runner):
    def run(coroutine):
        if runner == "asyncio.run":
            return asyncio.run(coroutine)
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    with ExitStack() as stack:
        urls = [stack.enter_context(serving(Member())) for _ in range(2)]
        lm, embedder = OpenAILM("m", urls), OpenAIEmbedder(urls, "m", retries=0)

        async def work():
            await lm.agenerate([ASK] * 3)
            with pytest.raises(ServerError):
                await embedder.aembed(["x"])

        for _ in range(3):
            run(work())
        gc.collect()
        before = open_files()
        for _ in range(40):
            run(work())
        if runner == "a bare loop":
            gc.collect()  # nothing holds them any more; they are part of reference cycles
        end = time.monotonic() + 30
        while open_files() > before + 8 and time.monotonic() < end:
            time.sleep(0.05)  # the servers, which are in this process too, close their ends
        assert open_files() <= before + 8
