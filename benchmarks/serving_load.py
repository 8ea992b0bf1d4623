"""What `specrag serve` does under load: does it grow, and how long do requests take at a given rate?

    python benchmarks/serving_load.py                      # 1,000 questions, then the rates; a model that is instant
    python benchmarks/serving_load.py --model minilm-reader --questions 200 --rates 2 4 6

The server is a process of its own. First, questions are asked one after another by a few clients, and the memory, the
sockets and the threads of the server are counted before and after. Then questions come at each rate, whether or not
earlier ones are answered (open loop: exponential gaps), and the seconds of each count from the moment at which it was
due. Refusals (429) are counted by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import random
import statistics
import time
from collections import Counter
from multiprocessing.connection import Connection

import httpx
import numpy as np
import psutil

from specrag import Passage, SpeculativeRAG
from specrag.models import bundled
from specrag.models.base import Reader, Reading, Span
from specrag.models.embedders import Embedder
from specrag.retrieval import PassageIndex
from specrag.serving import Models, ServerSettings
from specrag.serving.server import listening, make_server

TEXTS = [f"Room {n} was painted in {1900 + n} by painter number {n % 7}." for n in range(100)]


class InstantReader(Reader):
    """Copies the first two words of every passage."""

    name = "instant"

    def read(self, question, texts, *, spans_per_passage=8):
        share = math.log(0.9 / len(texts))
        ends = [len(" ".join(text.split()[:2])) for text in texts]
        return Reading(tuple(Span(n, 0, end, share) for n, end in enumerate(ends)), math.log(0.1), len(texts))

    def score(self, question, texts, spans):
        return [0.0] * len(spans)


class InstantEmbedder(Embedder):
    name = "instant"

    def embed(self, texts):
        vectors = np.array([[1.0, len(text) % 7, len(text) % 5] for text in texts], dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def load(model: str) -> Models:
    embedder = InstantEmbedder() if model == "instant" else bundled("minilm")
    reader = InstantReader() if model == "instant" else bundled(model)
    index = PassageIndex(embedder)
    index.add(Passage(text) for text in TEXTS)
    return Models(rag=SpeculativeRAG(drafter=reader, embedder=embedder), indexes={"rooms": index}, embedder=embedder)


def serve(model: str, concurrency: int, queue: int, told: Connection) -> None:
    server = make_server(ServerSettings(load=lambda: load(model), concurrency=concurrency, queue=queue))
    listener = listening("127.0.0.1", 0)
    told.send(listener.getsockname()[1])
    server.run([listener])


def held(server: psutil.Process) -> tuple[float, int, int]:
    """Memory in MiB, sockets, threads."""
    return server.memory_info().rss / 2**20, len(server.net_connections()), server.num_threads()


async def one(http: httpx.AsyncClient, at: int) -> str:
    body = {
        "model": "speculative-rag",
        "stream": at % 2 == 0,
        "messages": [{"role": "user", "content": f"who painted room {at % len(TEXTS)}"}],
    }
    try:
        response = await http.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return type(error).__name__
    whole = not body["stream"] or response.text.endswith("data: [DONE]\n\n")
    return str(response.status_code) if whole or response.status_code != 200 else "cut"


async def closed_loop(url: str, count: int, clients: int) -> tuple[Counter[str], float]:
    left = iter(range(count))
    outcomes: Counter[str] = Counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for at in left:
                outcomes[await one(http, at)] += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes, time.perf_counter() - began


async def open_loop(url: str, rate: float, seconds: float, seed: int) -> tuple[Counter[str], list[float]]:
    gaps = random.Random(seed)
    outcomes: Counter[str] = Counter()
    took: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def ask(at: int, due: float) -> None:
            outcome = await one(http, at)
            outcomes[outcome] += 1
            if outcome == "200":
                took.append(time.perf_counter() - due)

        tasks, due, at = [], time.perf_counter(), 0
        end = due + seconds
        while (due := due + gaps.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(at, due)))
            at += 1
        await asyncio.gather(*tasks)
    return outcomes, took


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else math.nan


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="instant", help="instant, or a bundled reader")
    options.add_argument("--questions", type=int, default=1000)
    options.add_argument("--clients", type=int, default=4)
    options.add_argument("--concurrency", type=int, default=4)
    options.add_argument("--queue", type=int, default=32)
    options.add_argument("--rates", type=float, nargs="*", default=[10, 20, 40, 80], help="questions per second")
    options.add_argument("--seconds", type=float, default=15.0, help="for each rate")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()

    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(given.model, given.concurrency, given.queue, there), daemon=True
    )
    process.start()
    url, server = f"http://127.0.0.1:{here.recv()}", psutil.Process(process.pid)
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.1)

    asyncio.run(closed_loop(url, max(20, given.questions // 10), given.clients))  # pools and caches fill
    time.sleep(6)  # uvicorn ends idle connections after 5 s
    print(f"| after questions ({given.model}) | MiB | sockets | threads | outcomes | per second |")
    print("| --: | --: | --: | --: | --- | --: |")
    print("| 0 | {:.1f} | {} | {} | | |".format(*held(server)))
    done = 0
    for _ in range(4):
        outcomes, seconds = asyncio.run(closed_loop(url, given.questions // 4, given.clients))
        time.sleep(6)
        done += given.questions // 4
        shown = ", ".join(f"{name}: {count}" for name, count in sorted(outcomes.items()))
        rate = outcomes.total() / seconds
        print("| {} | {:.1f} | {} | {} | {} | {:.1f} |".format(done, *held(server), shown, rate))

    print("\n| per second | asked | answered | refused (429) | other | p50 s | p95 s | p99 s | mean s |")
    print("| --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    for rate in given.rates:
        outcomes, took = asyncio.run(open_loop(url, rate, given.seconds, given.seed))
        other = outcomes.total() - outcomes["200"] - outcomes["429"]
        counts = " | ".join(map(str, (outcomes.total(), outcomes["200"], outcomes["429"], other)))
        shown = " | ".join(f"{percentile(took, share):.3f}" for share in (0.5, 0.95, 0.99))
        mean = statistics.mean(took) if took else math.nan
        print(f"| {rate:g} | {counts} | {shown} | {mean:.3f} |")
    process.terminate()
    process.join(20)


if __name__ == "__main__":
    main()
