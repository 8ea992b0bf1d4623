"""`specrag serve` over servers: the same answers as in one process, and how long they take at a given rate.

    python benchmarks/serving_servers.py --drafter URL --drafter URL --verifier URL --model smollm2

The servers serve the bundled SmolLM2 under the name `--model`, in float32. First, questions are asked one by one,
greedily, and compared with the answers of the same model in this process. Then they come at each rate, whether or not
earlier ones are answered; the seconds of each count from the moment at which it was due.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import time
from typing import Any

import httpx
from _over_servers import QUESTIONS, TOP, index, over_servers, pipeline, questions
from _serving import Reply, ask, body_of, open_loop, percentile, served

from specrag.models import bundled


def compared(url: str, count: int) -> str:
    """How many of the first questions have the same answer, drafts and best scores as in this process."""
    lm, found = bundled("smollm2"), index()
    rag = pipeline(lm, lm).replace(embedder=found.embedder)
    same, drafts, apart = 0, 0, 0.0
    replies = asyncio.run(one_by_one(url, questions()[:count]))
    for question, reply in zip(questions(), replies, strict=False):
        answer = rag.answer(question, found.search(question, TOP))
        told: dict[str, Any] = (reply.body or {})["specrag"]
        same += reply.body["choices"][0]["message"]["content"] == answer.text
        ours = {v.draft.index: (v.draft.rationale, v.draft.text) for v in answer.verdicts}
        theirs = {draft["index"]: (draft["rationale"], draft["answer"]) for draft in told["drafts"]}
        drafts += ours == theirs
        if ours == theirs:
            scores = {draft["index"]: draft["score"] for draft in told["drafts"]}
            apart = max([apart, *(abs(v.log_score - scores[v.draft.index]) for v in answer.verdicts)])
        if ours != theirs:
            print(f"  {question}\n    here:    {ours}\n    servers: {theirs}", flush=True)
    return (
        f"{count} questions: {same} answers equal, all drafts equal in {drafts}; scores at most {apart:.0e} nats apart"
    )


async def one_by_one(url: str, asked: list[str]) -> list[Reply]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        return [await ask(http, body_of(question, top=TOP)) for question in asked]


def row(rate: float, replies: list[Reply], seconds: float) -> str:
    took = [reply.seconds for reply in replies if reply.answered]
    refused, lost = sum(reply.clear_error for reply in replies), sum(reply.lost for reply in replies)
    shown = " | ".join(f"{percentile(took, share):.1f}" for share in (0.5, 0.95, 0.99))
    return f"| {rate:g} | {len(replies)} | {len(took)} | {refused} | {lost} | {len(took) / seconds:.2f} | {shown} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--drafter", action="append", required=True, metavar="URL", help="repeat for several")
    options.add_argument("--verifier", action="append", required=True, metavar="URL", help="repeat for several")
    options.add_argument("--model", default="smollm2")
    options.add_argument("--compare", type=int, default=10, help="questions that are compared")
    options.add_argument("--rates", type=float, nargs="*", default=[0.1, 0.2, 0.4], help="questions per second")
    options.add_argument("--questions", type=int, default=QUESTIONS, help="for each rate")
    options.add_argument("--concurrency", type=int, default=4)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()

    load = functools.partial(over_servers, given.model, given.drafter, given.verifier)
    with served(load, concurrency=given.concurrency, top=TOP) as (url, _):
        if given.compare:
            print(compared(url, given.compare), flush=True)
        print("| per second | asked | answered | refused | lost | answers per second | p50 s | p95 s | p99 s |")
        print("| --: | --: | --: | --: | --: | --: | --: | --: | --: |")
        for rate in given.rates:
            asked = itertools.islice(itertools.cycle(questions()), given.questions)
            bodies, began = [body_of(question, top=TOP) for question in asked], time.perf_counter()
            replies = asyncio.run(open_loop(url, bodies, rate, given.seed, 600))
            print(row(rate, replies, time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
