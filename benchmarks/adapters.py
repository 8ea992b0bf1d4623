"""What the adapters add to the core's latency, with models that answer at once.

    python benchmarks/adapters.py [--calls 200]

The core, the LangChain Runnable and the LlamaIndex synthesizer answer the same question from the same ten passages,
which have embeddings. They take turns. Each row is the median of its calls, and the median difference to the core's
call of the same turn.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import numpy as np
from _timing import machine, median
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import specrag
from langchain_specrag import SpeculativeRAGRunnable
from llamaindex_specrag import SpeculativeSynthesizer
from specrag import Passage
from specrag.models import Capabilities, Completion, GeneratedText, LanguageModel, Score


class Instant(LanguageModel):
    """Answers and scores without thinking."""

    @property
    def capabilities(self):
        return Capabilities(True, True, True, True)

    def generate(self, requests, sampling=None, *, top_log_probs=0):
        part = GeneratedText("so it is", (-0.5,) * 3, 3)
        return [Completion((part, part)) for _ in requests]

    def score(self, requests):
        return [Score({"self_contain": (-1.0,), "self_reflect": (-1.0,)}) for _ in requests]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    args = parser.parse_args()
    vectors = np.random.default_rng(0).standard_normal((10, 384)).astype(np.float32)
    texts = [f"passage {i} " + "word " * 80 for i in range(10)]
    passages = [Passage(t, id=str(i), embedding=v) for i, (t, v) in enumerate(zip(texts, vectors, strict=True))]
    documents = [Document(text, id=str(i)) for i, text in enumerate(texts)]
    nodes = [
        NodeWithScore(node=TextNode(text=t, id_=str(i), embedding=v.tolist()))
        for i, (t, v) in enumerate(zip(texts, vectors, strict=True))
    ]
    core = specrag.SpeculativeRAG(drafter=Instant())
    chain = SpeculativeRAGRunnable(drafter=Instant(), vector_store=lambda found: [vectors[int(d.id)] for d in found])
    synthesizer = SpeculativeSynthesizer(Instant())

    async def measure() -> dict[str, list[float]]:
        times: dict[str, list[float]] = {"core": [], "LangChain": [], "LlamaIndex": []}
        calls = {
            "core": lambda: core.aanswer("why", passages),
            "LangChain": lambda: chain.ainvoke({"input": "why", "context": documents}),
            "LlamaIndex": lambda: synthesizer.asynthesize("why", nodes),
        }
        for turn in range(args.calls + 10):
            for name, call in calls.items():
                start = time.perf_counter()
                await call()
                if turn >= 10:  # the first ones warm up
                    times[name].append(time.perf_counter() - start)
        return times

    times = asyncio.run(measure())
    print(machine())
    for name, values in times.items():
        extra = [a - b for a, b in zip(values, times["core"], strict=True)]
        print(f"{name:12} {median(values) * 1e3:6.2f} ms per call, {median(extra) * 1e3:+.2f} ms over the core")


if __name__ == "__main__":
    main()
