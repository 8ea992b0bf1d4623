"""What a session saves, and what it takes: time to first token of the second question, and peak memory.

    python benchmarks/rapid_sessions.py [--first-token 8192] [--memory 16384]

First token: document, question and answer fill the given tokens. The first question waits for the document to be
read, the next ones (median of five) for themselves only. Memory (Linux): the peak resident set during prefill and
decoding, from after the weights' load, less what the process had after its imports; as a multiple of weights, target
cache and drafter cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
from _long_context import long_documents, stock_model, stretched_model
from _timing import machine, median

from specrag.models import Sampling, bundled
from specrag.rapid import LongContext, RapidGenerator, proposing
from specrag.rapid.cached_model import CachedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-token", type=int, default=8192)
    parser.add_argument("--memory", type=int, default=16384)
    args = parser.parse_args()
    print(machine())
    embedder = bundled("minilm")
    before = psutil.Process().memory_info().rss
    lm = stretched_model(max(args.first_token, args.memory))
    rapid = RapidGenerator(lm, sampling=Sampling(), transfer="none", proposer="rag", candidates=4, embedder=embedder)

    if args.first_token:
        ((question, text),) = long_documents(lm, args.first_token, 1, reserve=192)
        start = time.perf_counter()
        session = LongContext(text, rapid)
        first_piece(session, question.question)
        first = time.perf_counter() - start
        later = []
        for other in ("what is this about", "who wrote it", "when was it", "where was it", "why"):
            start = time.perf_counter()
            first_piece(session, other)
            later.append(time.perf_counter() - start)
        print(
            f"first token at {session.tokens} tokens: {first:.2f} s, next questions {median(later):.3f} s, "
            f"{first / median(later):.0f}x"
        )
        del session

    if args.memory:
        ((question, text),) = long_documents(lm, args.memory, 1)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: the load's
        session = LongContext(text, rapid)
        drafters: list[CachedModel] = []

        class Watched(CachedModel):
            def __init__(self, *given) -> None:
                super().__init__(*given)
                drafters.append(self)

        proposing.CachedModel = Watched
        session.ask(question.question, max_tokens=32)
        caches = [session.nbytes, *(drafter.cache.nbytes for drafter in drafters)]
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        weights = sum(p.nbytes for p in stock_model(8192).parameters())
        wanted = weights + sum(caches)
        print(
            f"memory at {session.tokens} tokens: peak {(peak - before) / 2**20:.0f} MiB over the imports; "
            f"weights {weights / 2**20:.0f}, target cache {caches[0] / 2**20:.0f}, "
            f"drafter cache {sum(caches[1:]) / 2**20:.0f} MiB: {(peak - before) / wanted:.2f}x"
        )


def first_piece(session: LongContext, question: str) -> None:
    """Up to the first token; leaving the stream ends the generation."""
    stream = session.stream(question, max_tokens=8)
    next(stream)
    stream.close()


if __name__ == "__main__":
    main()
