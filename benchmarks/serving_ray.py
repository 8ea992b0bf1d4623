"""What `specrag serve --ray` loses while its replicas come, go and die: two drafters and a verifier, under load.

    python benchmarks/serving_ray.py

Needs the extra ``ray``, and `specrag models fetch mpnet-reader`. The drafter is mpnet-reader, in two to four replicas,
as Ray Serve's autoscaling decides. The verifier, minilm-reader, has one. Questions come at random moments, whether or
not earlier ones are answered: slowly, quickly, and slowly again. Then a drafter is killed in the middle of the load,
and then the only verifier. Each load but the third begins when two drafters and the verifier run. A question is lost
where it gets neither an answer nor an error in OpenAI's form.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import ray
from _over_servers import index, questions
from _serving import Reply, body_of, open_loop, percentile
from ray import serve

from specrag.cli.served import OnRay, Served
from specrag.serving import on_ray
from specrag.serving.server import listening

TOP = 4  # passages that are read for a question
LITTLE = {"ray_actor_options": {"num_cpus": 0.1}}
SCALING = {
    "min_replicas": 2,
    "max_replicas": 4,
    "target_ongoing_requests": 1,
    "upscale_delay_s": 2,
    "downscale_delay_s": 10,
    "look_back_period_s": 5,
    "metrics_interval_s": 1,
}
DEPLOYED = {"Server": LITTLE, "Drafter": {"autoscaling_config": SCALING, **LITTLE}, "Verifier": LITTLE}


def running(name: str) -> int:
    """Replicas of the deployment that run."""
    deployment = serve.status().applications[on_ray.NAME].deployments[name]
    return sum(count for state, count in deployment.replica_states.items() if str(state).endswith("RUNNING"))


def kill(name: str) -> None:
    """End one of them with SIGKILL."""
    found = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:{on_ray.NAME}:{name}" in " ".join(process.cmdline())
    ]
    os.kill(found[0], signal.SIGKILL)


@dataclass
class Watched:
    """How many replicas ran, twice per second."""

    name: str
    counts: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stopped = threading.Event()

        def look() -> None:
            while not stopped.wait(0.5):
                self.counts.append(running(self.name))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def __str__(self) -> str:
        """The counts one after the other, without repetitions."""
        return " → ".join(str(count) for count, _ in itertools.groupby(self.counts))


@dataclass(frozen=True)
class Phase:
    """A load. ``killed``: after a third of the questions, a replica of this deployment is."""

    name: str
    rate: float
    count: int
    watched: str = "Drafter"
    killed: str = ""


def asked(url: str, phase: Phase, given: argparse.Namespace) -> tuple[list[Reply], Watched]:
    bodies = [body_of(question, top=TOP) for question in itertools.islice(itertools.cycle(questions()), phase.count)]
    watched = Watched(phase.watched)
    if phase.killed:
        threading.Timer(phase.count / phase.rate / 3, kill, [phase.killed]).start()
    with watched.watching():
        replies = asyncio.run(open_loop(url, bodies, phase.rate, given.seed, 600))
    return replies, watched


def row(phase: Phase, replies: list[Reply], watched: Watched) -> str:
    took = [reply.seconds for reply in replies if reply.answered]
    errors = sum(reply.clear_error for reply in replies)
    counts = [len(replies), len(took), errors, sum(reply.lost for reply in replies)]
    shown = f"{percentile(took, 0.5):.1f} | {percentile(took, 0.95):.1f} | {percentile(took, 1):.1f}"
    return f"| {phase.name} | {phase.rate:g} | {watched.name}: {watched} | {' | '.join(map(str, counts))} | {shown} |"


def waited(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.5)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--slow", type=float, default=0.4, help="questions per second")
    options.add_argument("--quick", type=float, default=1.5, help="questions per second")
    options.add_argument("--count", type=int, default=100, help="questions that come quickly")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    phases = [
        Phase("slow", given.slow, 12),
        Phase("quick", given.quick, given.count),
        Phase("slow again", given.slow, 12),
        Phase("a drafter is killed", given.slow, 30, killed="Drafter"),
        Phase("the verifier is killed", given.slow, 30, watched="Verifier", killed="Verifier"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        index().save(Path(folder) / "nq")
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            with listening("127.0.0.1", 0) as free:
                port = free.getsockname()[1]
            served = Served(
                index=(str(Path(folder) / "nq"),),
                drafter=("mpnet-reader",),
                verifier="minilm-reader",
                concurrency=16,
                queue=1000,
            )
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            made = on_ray.application(OnRay(served).parts(), DEPLOYED)
            serve.run(made, name=on_ray.NAME, route_prefix="/")
            url = f"http://127.0.0.1:{port}"
            for question in questions()[:2]:  # all is loaded
                httpx.post(f"{url}/v1/chat/completions", json=body_of(question, top=TOP), timeout=600)
            print("| load | questions/s | replicas | asked | answered | error | lost | p50 s | p95 s | longest s |")
            print("| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |", flush=True)
            for phase in phases:
                if phase.name != "slow again":  # which shows the way down
                    waited(lambda: running("Drafter") == SCALING["min_replicas"] and running("Verifier") == 1, 180)
                print(row(phase, *asked(url, phase, given)), flush=True)
        finally:
            serve.shutdown()
            ray.shutdown()


if __name__ == "__main__":
    main()
