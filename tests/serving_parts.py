"""What the tests of `specrag serve` share: real servers on free ports, over small real models."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import httpx

from specrag import SpeculativeRAG
from specrag.models import bundled
from specrag.rapid import RapidGenerator
from specrag.retrieval import PassageIndex
from specrag.schema import Passage
from specrag.serving import Models, ServerSettings
from specrag.serving.server import Server, listening, make_server
from tests.fakes import HashEmbedder, ScriptedLM
from tests.rapid_parts import generator

RADIUM = (
    "Marie Curie and Pierre Curie discovered radium in December 1898.",
    "Radium was once used in luminous paint for watches.",
    "Henri Becquerel discovered radioactivity in 1896.",
    "The Radium Institute in Paris opened in 1914.",
)
TOWER = (
    "The Eiffel Tower was designed by Maurice Koechlin and opened in March 1889.",
    "The Eiffel Tower in Paris is 330 metres tall.",
)
QUESTION = "when was radium discovered"
ALICE, BOB = "alice-key-0123456789", "bob-key-9876543210abc"


def index_of(texts, embedder) -> PassageIndex:
    index = PassageIndex(embedder)
    index.add(Passage(text, id=f"passage-{at}", title="Notes") for at, text in enumerate(texts))
    return index


@cache
def real_models() -> Models:
    """The bundled reader over two small indexes."""
    embedder = bundled("minilm")
    indexes = {"radium": index_of(RADIUM, embedder), "tower": index_of(TOWER, embedder)}
    rag = SpeculativeRAG(drafter=bundled("minilm-reader"), embedder=embedder, min_confidence=0.25)
    return Models(rag=rag, indexes=indexes, embedder=embedder)


def instant_models(reply=lambda prompt: ("It says so.", "1898"), *, delay: float = 0.0, rapid=None) -> Models:
    """A language model that answers at once, or after ``delay`` seconds."""
    embedder = HashEmbedder()
    lm = ScriptedLM(reply, batched=False, delay=lambda text: delay)
    rag = SpeculativeRAG(drafter=lm, embedder=embedder, drafts=2, passages_per_draft=1)
    return Models(rag=rag, indexes={"radium": index_of(RADIUM, embedder)}, embedder=embedder, rapid=rapid)


def rapid_models(lm, **settings) -> Models:
    """RAPID alone, over ``lm``."""
    made: RapidGenerator = generator(lm, **settings)
    return Models(rapid=made, embedder=HashEmbedder())


@dataclass
class Served:
    """A running server."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def served(models: Models, *, wait: bool = True, **settings) -> Iterator[Served]:
    """A server in a thread, on a free port; ready, unless ``wait`` says otherwise."""
    options = {"load": lambda: models, **settings}
    server = make_server(ServerSettings(**options))
    listener = listening("127.0.0.1", 0)
    running = Served(server, listener.getsockname()[1])
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        if wait:
            until(lambda: server.serving.models is not None)
        yield running
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def until(true, seconds: float = 20.0) -> None:
    """Wait until ``true()``; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def chat(question: str = QUESTION, model: str = "speculative-rag", **fields) -> dict:
    """The body of a chat completion."""
    return {"model": model, "messages": [{"role": "user", "content": question}], **fields}
