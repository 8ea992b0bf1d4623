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
import functools
import math
import statistics
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import psutil
from _serving import Reply, ask, body_of, open_loop, percentile, served

from specrag import Passage, SpeculativeRAG
from specrag.models import bundled
from specrag.models.base import Reader, Reading, Span
from specrag.models.embedders import Embedder
from specrag.retrieval import PassageIndex
from specrag.serving import Models

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


def held(server: psutil.Process) -> tuple[float, int, int]:
    """Memory in MiB, sockets, threads."""
    return server.memory_info().rss / 2**20, len(server.net_connections()), server.num_threads()


def body(at: int) -> dict[str, Any]:
    return body_of(f"who painted room {at % len(TEXTS)}", stream=at % 2 == 0)


async def closed_loop(url: str, count: int, clients: int) -> tuple[Counter[str], float]:
    left = iter(range(count))
    outcomes: Counter[str] = Counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for at in left:
                reply = await ask(http, body(at))
                outcomes["cut" if reply.cut else str(reply.status)] += 1

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes, time.perf_counter() - began


def row(rate: float, replies: list[Reply]) -> str:
    took = [reply.seconds for reply in replies if reply.answered]
    refused = sum(reply.status == 429 for reply in replies)
    counts = " | ".join(map(str, (len(replies), len(took), refused, len(replies) - len(took) - refused)))
    shown = " | ".join(f"{percentile(took, share):.3f}" for share in (0.5, 0.95, 0.99))
    return f"| {rate:g} | {counts} | {shown} | {statistics.mean(took) if took else math.nan:.3f} |"


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

    settings = {"concurrency": given.concurrency, "queue": given.queue}
    with served(functools.partial(load, given.model), **settings) as (url, pid):
        server = psutil.Process(pid)
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
            bodies = [body(at) for at in range(max(1, round(rate * given.seconds)))]
            print(row(rate, asyncio.run(open_loop(url, bodies, rate, given.seed, 120))), flush=True)


if __name__ == "__main__":
    main()
