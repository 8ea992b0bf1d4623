"""`specrag serve` from its start to its end: readiness, a full queue, clients that leave, draining, and no growth."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from specrag.cli import app
from specrag.retrieval import PassageIndex
from tests.serving_parts import RADIUM, chat, index_of, instant_models, rapid_models, served, until
from tests.test_serving_requests import refusal

# --- the start ------------------------------------------------------------------------------------------


def test_it_is_healthy_at_once_and_ready_when_the_models_are_loaded():
    loaded = threading.Event()

    def load():
        loaded.wait(20)
        return instant_models()

    with served(None, wait=False, load=load) as running, running.client() as http:
        until(lambda: running.server.started)
        assert http.get("/health").json() == {"status": "ok"}
        for response in (http.get("/ready"), http.post("/v1/chat/completions", json=chat())):
            assert refusal(response, 503)["code"] == "not_ready" and int(response.headers["retry-after"]) >= 1
        loaded.set()
        until(lambda: http.get("/ready").status_code == 200)
        assert http.post("/v1/chat/completions", json=chat()).status_code == 200


COMMAND = [sys.executable, "-m", "specrag.cli", "serve"]


def one_line(code: int, err: str) -> str:
    """The one line that a server which cannot start prints, before its exit with code 2."""
    lines = [line for line in err.splitlines() if not line.startswith(("{", "specrag serves"))]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def refused_at_once(*options: str) -> str:
    """Of a start that is refused before anything is set up: in this process."""
    made = CliRunner().invoke(app, ["serve", *options])
    return one_line(made.exit_code, made.output)


def refused_to_start(*options: str, **more) -> str:
    """Of a start that fails while the models load: in a process of its own."""
    made = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120, check=False, **more)
    assert made.stdout == ""
    return one_line(made.returncode, made.stderr)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, minilm):
    folder = tmp_path_factory.mktemp("indexes") / "radium"
    index_of(RADIUM, minilm).save(folder)
    assert PassageIndex.is_saved_at(folder)
    return folder


def test_a_start_that_cannot_succeed_ends_with_one_line(saved, tmp_path, monkeypatch):
    assert "no index at" in refused_at_once("--index", str(tmp_path))
    assert "nothing to serve" in refused_at_once()
    assert "no file with API keys" in refused_at_once("--index", str(saved), "--keys", str(tmp_path / "none"))
    assert "two indexes are named" in refused_at_once("--index", str(saved), "--index", f"radium={saved}")
    assert "NAME=FOLDER" in refused_at_once("--index", f"../x={saved}")
    assert "no calibration at" in refused_at_once("--index", str(saved), "--calibration", str(tmp_path / "none"))
    rest = ("--rapid", "smollm2", "--rapid-proposer", "rest")
    assert "give --rapid-datastore FOLDER" in refused_at_once(*rest)
    assert "no file or folder at" in refused_at_once(*rest, "--rapid-datastore", str(tmp_path / "none"))
    no_rest = ("--rapid", "smollm2", "--rapid-datastore", str(tmp_path))
    assert "--rapid-proposer hybrid looks up no datastore" in refused_at_once(*no_rest)
    assert "need --rapid MODEL" in refused_at_once("--index", str(saved), "--rapid-proposer", "match")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused_at_once("--index", str(saved), "--port", str(port))
    monkeypatch.setenv("SPECRAG_API_KEYS", "short")
    assert "API key 1 has 5 characters" in refused_at_once("--index", str(saved), "--port", "0")


@pytest.mark.slow
def test_a_model_that_is_missing_ends_the_start_with_one_line(saved, tmp_path):
    options = ("--index", str(saved), "--port", "0")
    assert "nowhere" in refused_to_start(*options, "--drafter", str(tmp_path / "nowhere"))
    assert "nowhere" in refused_to_start("--rapid", str(tmp_path / "nowhere"), "--port", "0")


# --- a full queue, and clients that leave ---------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again_and_loses_nobody_else():
    with served(instant_models(delay=0.3), concurrency=1, queue=2) as running, running.client() as http:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: http.post("/v1/chat/completions", json=chat()), range(8)))
        refusals = [response for response in made if response.status_code == 429]
        assert 1 <= len(refusals) <= 5 and sum(response.status_code == 200 for response in made) == 8 - len(refusals)
        for response in refusals:
            assert refusal(response, 429)["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1
        text = http.get("/metrics").text
        counted = f'specrag_requests_total{{route="/v1/chat/completions",status="429"}} {len(refusals)}.0'
        assert counted in text
        assert "specrag_queue_depth 0.0" in text and "specrag_running 0.0" in text


def test_the_deadline_of_a_question_counts_from_its_arrival_and_not_from_its_turn():
    with served(instant_models(delay=0.5), concurrency=1) as running, running.client() as http:
        first = threading.Thread(target=http.post, args=("/v1/chat/completions",), kwargs={"json": chat()})
        first.start()
        until(lambda: running.server.serving.gate.running == 1)
        made = http.post("/v1/chat/completions", json=chat(specrag={"deadline": 0.3})).json()["specrag"]
        first.join()
    assert made["abstained"] and "the deadline of 0.3 s passed before the drafts began" in made["notes"]


@pytest.mark.parametrize("stream", [False, True])
def test_work_ends_when_its_client_goes_away(stream):
    models = instant_models(delay=30.0)
    with served(models, concurrency=1, queue=1) as running:
        state = running.server.serving
        with running.raw() as raw, running.raw() as waiting:
            body = json.dumps(chat(stream=stream)).encode()
            request = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            raw.sendall(request)
            until(lambda: state.gate.running == 1)
            waiting.sendall(request)
            until(lambda: state.gate.waiting == 1)
        until(lambda: state.in_flight == 0)
        assert state.gate.waiting == 0 and state.gate.running == 0
        with running.client() as http:
            assert 'outcome="cancelled"' in http.get("/metrics").text


def test_rapid_stops_when_its_client_goes_away(tiny):
    with served(rapid_models(tiny, candidates=1), max_tokens=100_000) as running, running.client() as http:
        state = running.server.serving
        made = http.post("/v1/files", files={"file": ("a.txt", "The lamp is blue. " * 60)}).json()
        body = chat("what is blue", "rapid", max_tokens=6000, stream=True, specrag={"file_ids": [made["id"]]})
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if '"content": "' in line and '"content": ""' not in line:
                    break
        until(lambda: state.in_flight == 0)
        body |= {"max_tokens": 3, "stream": False}
        assert http.post("/v1/chat/completions", json=body).status_code == 200


# --- the end --------------------------------------------------------------------------------------------


def test_running_requests_end_and_new_ones_are_refused_while_it_drains():
    with served(instant_models(delay=1.0), drain=20.0) as running, running.client() as http:
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(lambda: http.post("/v1/chat/completions", json=chat(stream=True)).text)
            whole = pool.submit(lambda: http.post("/v1/chat/completions", json=chat()))
            until(lambda: running.server.serving.in_flight == 2)
            running.server.handle_exit(signal.SIGTERM, None)
            late = http.post("/v1/chat/completions", json=chat())
            assert refusal(late, 503)["code"] == "draining" and late.headers["retry-after"]
            assert refusal(http.get("/ready"), 503)["code"] == "draining"
            assert http.get("/health").status_code == 200
            assert whole.result().json()["choices"][0]["message"]["content"] == "1898"
            assert stream.result().endswith("data: [DONE]\n\n")
        until(lambda: running.server.should_exit)


def test_what_does_not_end_while_it_drains_is_cut_off():
    with (
        served(instant_models(delay=60.0), drain=0.3) as running,
        running.client() as http,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(lambda: http.post("/v1/chat/completions", json=chat()))
        until(lambda: running.server.serving.in_flight == 1)
        began = time.monotonic()
        running.server.handle_exit(signal.SIGTERM, None)
        until(lambda: running.server.should_exit)
    assert time.monotonic() - began < 40


@pytest.mark.slow
def test_a_signal_ends_the_command_after_what_runs(saved, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen([*COMMAND, "--index", str(saved), "--port", str(port)], stderr=err)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

                def ready() -> bool:
                    try:
                        return http.get("/ready").status_code == 200
                    except httpx.HTTPError:
                        return False

                until(ready, seconds=120)
                assert http.post("/v1/chat/completions", json=chat()).json()["choices"][0]["message"]["content"]
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
        finally:
            process.kill()
    lines = log.read_text().splitlines()
    assert lines[0] == f"specrag serves http://127.0.0.1:{port}"
    assert {"ready", "request", "drained"} <= {json.loads(line)["event"] for line in lines[1:]}


# --- no growth ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_questions_leave_no_memory_sockets_or_threads_behind():
    process = psutil.Process()

    def ask(http, count):
        for at in range(count):
            response = http.post("/v1/chat/completions", json=chat(stream=at % 2 == 0))
            assert response.status_code == 200

    def held():
        return len(process.net_connections()), process.num_threads(), process.memory_info().rss

    with served(instant_models()) as running, running.client() as http:
        ask(http, 30)
        sockets, threads, memory = held()
        ask(http, 100)
        for _ in range(10):  # and clients that come once
            with running.client() as once:
                ask(once, 1)
        until(lambda: held()[0] <= sockets)
        assert held()[1] <= threads + 4  # the pool of threads may still grow to its size
        assert held()[2] - memory < 16 << 20
