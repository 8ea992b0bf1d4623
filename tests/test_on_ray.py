"""`specrag serve --ray` and `specrag batch --ray` over a real Ray, in an environment that has it (CONTRIBUTING.md)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from specrag.cli.served import OnRay, Served, application
from specrag.errors import InvalidInputError
from specrag.models.base import Sampling
from tests.rapid_parts import DOCUMENT
from tests.serving_parts import RADIUM, chat, index_of, served, until
from tests.test_remote_models import request

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402

from specrag.serving import on_ray  # noqa: E402
from specrag.serving.remote import remote_model  # noqa: E402
from specrag.serving.server import listening  # noqa: E402

pytestmark = pytest.mark.slow
LITTLE = {"ray_actor_options": {"num_cpus": 0.1}}
DEPLOYED = {
    "Server": LITTLE,
    "Drafter": {"num_replicas": 2, **LITTLE},
    "Verifier": {"user_config": {"max_batch_size": 4, "batch_wait_timeout_s": 0.05}, **LITTLE},
    "Rapid": {"num_replicas": 2, **LITTLE},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, minilm):
    folder = tmp_path_factory.mktemp("indexes") / "radium"
    index_of(RADIUM, minilm).save(folder)
    return folder


@pytest.fixture(scope="module")
def options(saved, tiny_path) -> Served:
    """A reader drafts, a language model scores its spans, and RAPID has random weights."""
    return Served(index=(str(saved),), verifier=str(tiny_path), rapid=str(tiny_path), min_confidence=None)


@pytest.fixture(scope="module")
def port() -> int:
    with listening("127.0.0.1", 0) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def http(options, port):
    """The whole application on a Ray of its own."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(on_ray.application(OnRay(options).parts(), DEPLOYED), name=on_ray.NAME, route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas(name: str) -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if process.name() == f"ray::ServeReplica:{on_ray.NAME}:{name}"[:15]] or [
        process for process in mine if f"ServeReplica:{on_ray.NAME}:{name}" in " ".join(process.cmdline())
    ]


def test_answers_are_those_of_one_process(http, options):
    with served(options.load()) as running, running.client() as here:
        expected = here.post("/v1/chat/completions", json=chat()).json()
    made = http.post("/v1/chat/completions", json=chat()).json()
    assert made["choices"] == expected["choices"]
    ours, own = made["specrag"], expected["specrag"]
    assert ours["scores_used"] == own["scores_used"] and ours["usage"] == own["usage"]
    for draft, other in zip(ours["drafts"], own["drafts"], strict=True):
        assert (draft["answer"], draft["subset"]) == (other["answer"], other["subset"])
        assert draft["score"] == pytest.approx(other["score"], abs=1e-4)


def test_the_reply_is_streamed(http):
    with http.stream("POST", "/v1/chat/completions", json=chat(stream=True, specrag={"events": True})) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and any('"type": "draft"' in line for line in lines)


def test_errors_of_the_models_keep_their_status(http):
    made = http.post("/v1/chat/completions", json=chat("lamp " * 20_000 + "\n\nwho", "rapid"))
    assert made.status_code == 400 and made.json()["error"]["code"] == "context_length_exceeded"


def test_calls_in_one_batch_get_what_each_gets_alone(http, tiny):
    lm = remote_model(serve.get_deployment_handle("Verifier", on_ray.NAME), on_ray.LOST)
    requests = [request(f"a lamp of room {at}") for at in range(6)]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        expected = [made.text for made in tiny.generate(requests, sampling)]
        assert [made.text for made in lm.generate(requests, sampling)] == expected
    with pytest.raises(InvalidInputError, match="exceed the 8192 positions"):
        lm.generate([*requests, request("x " * 9000)])


def held() -> list[set[str]]:
    """The keys of the sessions of each replica of RAPID."""
    handle = serve.get_deployment_handle("Rapid", on_ray.NAME)
    handle.held.remote().result()  # a broadcast goes to the replicas that a handle knows
    return [set(keys) for keys in handle.broadcast("held").results()]


def test_a_documents_questions_go_to_the_replica_that_has_read_it(http):
    files = [
        http.post("/v1/files", files={"file": (f"{at}.txt", f"Note {at}. {DOCUMENT}")}).json()["id"] for at in range(3)
    ]
    before, texts = set().union(*held()), set()
    for _ in range(4):
        for file in files:
            body = chat("who keeps the lamp", "rapid", temperature=0, max_tokens=4, specrag={"file_ids": [file]})
            made = http.post("/v1/chat/completions", json=body).json()
            texts.add((file, made["choices"][0]["message"]["content"]))
    assert len(texts) == 3
    first, second = (keys - before for keys in held())
    assert len(first) + len(second) == 3 and not first & second
    for file in files:
        assert http.delete(f"/v1/files/{file}").json()["deleted"]


def test_a_drafter_that_is_killed_costs_no_question(http):
    before = {process.pid for process in replicas("Drafter")}
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(http.post, "/v1/chat/completions", json=chat()) for _ in range(12)]
        until(lambda: any(made.done() for made in asked))
        os.kill(min(before), signal.SIGKILL)
        answers = [made.result() for made in asked]
    assert [made.status_code for made in answers] == [200] * 12
    assert {made.json()["choices"][0]["message"]["content"] for made in answers} == {
        answers[0].json()["choices"][0]["message"]["content"]
    }
    until(lambda: len(replicas("Drafter")) == 2 and min(before) not in {one.pid for one in replicas("Drafter")}, 120)


def test_a_config_file_of_ray_serve_deploys_the_same(http, saved):
    made = application({"index": [str(saved)]})
    serve.run(made, name="second", route_prefix="/second")
    assert http.get("/second/ready").json() == {"status": "ready"}
    serve.delete("second")


def test_a_setting_that_ray_refuses_is_told_in_one_line(options):
    with pytest.raises(InvalidInputError, match="the deployment Drafter: .*max_ongoing_requests") as raised:
        on_ray.application(OnRay(options).parts(), {"Drafter": {"max_ongoing_requests": -1}})
    assert "\n" not in str(raised.value)


def test_what_a_replica_raised_is_found_in_what_ray_says():
    told = "The deployment failed\nTraceback\n  File x\nspecrag.errors.NotFoundError: no index at x\nRetrying."
    assert on_ray.last_error([told]) == "no index at x"
    assert on_ray.last_error(["it waits", "builtins.KeyError: 'x'"]) == "builtins.KeyError: 'x'"
    assert on_ray.last_error([]) == "no reason is known"


# --- the commands, each with a Ray of its own -----------------------------------------------------------


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "specrag.cli", *options]


def test_a_signal_ends_the_command_after_what_runs(saved, tmp_path):
    with listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    (tmp_path / "deployments.yaml").write_text(
        "deployments:\n"
        + "".join(f"  - {{name: {name}, ray_actor_options: {{num_cpus: 0.1}}}}\n" for name in ("Server", "Drafter"))
    )
    options = ("--ray", "--index", str(saved), "--port", str(port), "--deployments", str(tmp_path / "deployments.yaml"))
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command("serve", *options), stderr=log, stdout=log)
    try:
        until(lambda: "specrag serves" in (tmp_path / "log").read_text() or process.poll() is not None, 180)
        ours = psutil.Process(process.pid).children(recursive=True)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client, ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(client.post, "/v1/chat/completions", json=chat()) for _ in range(6)]
            until(lambda: any(made.done() for made in asked))
            process.send_signal(signal.SIGTERM)
            statuses = [made.result().status_code for made in asked]
        assert statuses == [200] * 6 and process.wait(120) == 0
        until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ours), 60)
    finally:
        process.kill()


def test_a_killed_run_of_ray_data_loses_nothing_and_repeats_nothing(saved, tmp_path):
    rows = [{"id": f"q{at}", "question": f"when was radium discovered {at}"} for at in range(120)]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad", "question": " "}])
    )
    to = tmp_path / "out.jsonl"
    options = ("batch", str(tmp_path / "in.jsonl"), "--out", str(to), "--docs", str(saved), "--ray", "--workers", "2")
    process = subprocess.Popen(command(*options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 180
    while not (to.exists() and to.read_bytes().count(b"\n") >= 8):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    written = to.read_bytes()
    kept = written[: written.rfind(b"\n") + 1]
    assert kept.count(b"\n") < len(rows)
    done = subprocess.run(command(*options), capture_output=True, text=True, timeout=300, check=True)
    assert "questions could not be answered" in done.stderr and "121 questions" in done.stdout
    assert to.read_bytes().startswith(kept)
    answers = [json.loads(line) for line in to.read_text().splitlines()]
    assert sorted(row["id"] for row in answers) == sorted([*(row["id"] for row in rows), "bad"])
    assert [row["id"] for row in answers if row["error"]] == ["bad"]
