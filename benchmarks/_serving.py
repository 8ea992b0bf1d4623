"""What the benchmarks of `specrag serve` share: a server in a process of its own, and questions that come at a rate."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx

from specrag.serving import Models, ServerSettings
from specrag.serving.server import listening, make_server


@dataclass(frozen=True)
class Reply:
    """What became of one request.

    Attributes:
        status: Of the response; 0: there was none.
        seconds: From the moment at which the request was due to the end of the response.
        body: What the response holds; ``None`` where it is no JSON.
        cut: The stream ended without its last line.
    """

    status: int
    seconds: float
    body: dict[str, Any] | None = None
    cut: bool = False

    @property
    def answered(self) -> bool:
        return self.status == 200 and not self.cut

    @property
    def clear_error(self) -> bool:
        """Whether it is an error in OpenAI's form, with a message."""
        error = (self.body or {}).get("error")
        return self.status >= 400 and isinstance(error, dict) and bool(error.get("message"))

    @property
    def lost(self) -> bool:
        return not (self.answered or self.clear_error)


@contextlib.contextmanager
def served(load: Callable[[], Models], **settings: Any) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server. ``load`` must be a function that another process can import."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(load, settings, there), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{here.recv()}"
    while httpx.get(f"{url}/ready").status_code != 200:
        time.sleep(0.1)
    try:
        yield url, process.pid or 0
    finally:
        process.terminate()
        process.join(20)


def _serve(load: Callable[[], Models], settings: dict[str, Any], told: Connection) -> None:
    server = make_server(ServerSettings(load=load, **settings))
    listener = listening("127.0.0.1", 0)
    told.send(listener.getsockname()[1])
    server.run([listener])


def body_of(question: str, *, stream: bool = False, **options: Any) -> dict[str, Any]:
    """The body of a chat completion. ``options``: of the field ``specrag``."""
    messages = [{"role": "user", "content": question}]
    return {"model": "speculative-rag", "stream": stream, "messages": messages, "specrag": options}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], due: float | None = None) -> Reply:
    began = time.perf_counter() if due is None else due
    try:
        response = await http.post("/v1/chat/completions", json=body)
    except httpx.HTTPError:
        return Reply(0, time.perf_counter() - began)
    seconds = time.perf_counter() - began
    if body["stream"] and response.status_code == 200:
        return Reply(200, seconds, cut=not response.text.endswith("data: [DONE]\n\n"))
    try:
        return Reply(response.status_code, seconds, response.json())
    except json.JSONDecodeError:
        return Reply(response.status_code, seconds, cut=True)


async def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float, seed: int, timeout: float) -> list[Reply]:
    """Ask at random moments, ``rate`` times per second, whether or not earlier questions are answered."""
    gaps = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as http:
        tasks, due = [], time.perf_counter()
        for body in bodies:
            due += gaps.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http, body, due)))
        return await asyncio.gather(*tasks)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else math.nan
