"""How many questions per second so many devices answer: a model, checked against a simulation.

    python benchmarks/capacity.py                                       # from benchmarks/data/service_times.json
    python benchmarks/capacity.py --drafters 4 --verifiers 2
    python benchmarks/capacity.py --drafts-per-second 60 --verifications-per-second 200    # of your own devices
    python benchmarks/capacity.py --measure --python PYTHON --gguf FILE                    # writes the file anew

The file holds the seconds of one core for a retrieval, a draft and its verification: SmolLM2 on llama.cpp's server.
PYTHON is that of an environment with the package xllamacpp. What is measured is the processor time of the server's
process, so other work on the machine changes it little.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from _capacity import Part, Simulation, capacity
from _over_servers import TOP, index, pipeline, questions, server
from _serving import percentile
from serving_faults import NAME, Llama

from specrag import _blocking
from specrag.errors import ModelError
from specrag.models import OpenAILM
from specrag.retrieval import PassageIndex
from specrag.schema import Usage
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.verification import Verifier

TIMES = Path(__file__).parent / "data" / "service_times.json"
WARM_UP = 3  # jobs after which everything is loaded, and known of the server
DAY = 86400.0
PEAK, BUSY = 3.0, 0.7  # the busiest hour against the mean of the day; how busy devices may be then


@dataclass(frozen=True)
class Job:
    """What one job took: processor seconds, and tokens read and written."""

    seconds: float
    usage: Usage = Usage()


def measure(python: str, gguf: str, count: int) -> dict[str, Any]:
    """Processor seconds of ``count`` retrievals, drafts and verifications, one after another, with their tokens."""
    llama, found = Llama(python, gguf), index()
    llama.start()
    try:
        lm, process = server(NAME, [llama.url]), psutil.Process(llama.pid)
        jobs: list[dict[str, Job]] = []
        for question in itertools.cycle(questions()):
            with contextlib.suppress(ModelError):  # a small model may write an empty answer
                jobs.append(measured_once(lm, process, found, question))
            if len(jobs) == count + WARM_UP:
                break
    finally:
        llama.kill()
    del jobs[:WARM_UP]
    seconds = {name: [round(job[name].seconds, 4) for job in jobs] for name in jobs[0]}
    tokens = {
        name: [
            round(mean(getattr(job[name].usage, kind) for job in jobs), 1)
            for kind in ("prompt_tokens", "completion_tokens")
        ]
        for name in ("draft", "verification")
    }
    return {"seconds": seconds, "tokens": tokens}


def measured_once(lm: OpenAILM, process: psutil.Process, found: PassageIndex, question: str) -> dict[str, Job]:
    """One retrieval, one draft and its verification."""

    def cpu() -> float:
        used = process.cpu_times()
        return used.user + used.system

    rag = pipeline(lm, lm)
    drafter = Drafter(lm, rag.texts, rag.max_rationale_tokens, rag.max_answer_tokens)
    began = time.process_time()
    passages = found.search(question, TOP)
    searched, before = time.process_time() - began, cpu()
    made = lm.generate([drafter.request(question, passages[:2])])[0]
    drafted = cpu()
    draft = drafter.read(made, Assignment(0, (0, 1), tuple(passages[:2])))
    scored = _blocking.run(Verifier(lm, rag.texts, rag.roles.settled).verify(question, [draft]))
    return {
        "retrieval": Job(searched),
        "draft": Job(drafted - before, made.usage),
        "verification": Job(cpu() - drafted, scored.usage),
    }


def show_parts(parts: list[Part], tokens: dict[str, list[float]]) -> None:
    print("| part | devices | jobs per question | seconds per job | jobs/s of one | tokens/s of one | questions/s |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    names = {"drafters": "draft", "verifiers": "verification"}
    for part in parts:
        seconds, read = mean(part.seconds), tokens.get(names.get(part.name, ""))
        shown = f"{sum(read) / seconds:.0f}" if read else ""
        row = f"{part.name} | {part.devices} | {part.jobs} | {seconds:.3f} | {1 / seconds:.2f} | {shown}"
        print(f"| {row} | {part.capacity:.2f} |")


def show_check(parts: list[Part], horizon: float, seed: int) -> None:
    most, first = capacity(parts)
    print(f"\nThe model: {most:.2f} questions per second, {most * DAY:,.0f} per day; {first.name} saturate first.\n")
    print("| questions/s | of the capacity | answered/s | busy, model | busy, simulation | p50 s | p95 s | p99 s |")
    print("| --: | --: | --: | --- | --- | --: | --: | --: |")
    for share in (0.3, 0.5, 0.7, 0.9, 1.2):
        rate = share * most
        seen = Simulation(*parts, rate=rate, horizon=horizon / rate, seed=seed).run()
        model = " / ".join(f"{min(rate, most) / part.capacity:.0%}" for part in parts)
        simulated = " / ".join(f"{seen.busy[part.name]:.0%}" for part in parts)
        took = " | ".join(f"{percentile(seen.seconds, q):.2f}" for q in (0.5, 0.95, 0.99))
        print(f"| {rate:.2f} | {share:.0%} | {seen.per_second:.2f} | {model} | {simulated} | {took} |")


def show_day(parts: list[Part], per_day: float) -> None:
    average = per_day / DAY
    peak = average * PEAK
    print(f"\n{per_day:,.0f} questions per day: {average:.1f}/s on average, {peak:.1f}/s in the busiest hour.")
    for part in parts:
        print(f"  {part.name}: {part.devices_for(peak, BUSY)} (each busy at most {BUSY:.0%} of the time)")


def parts_of(given: argparse.Namespace, times: dict[str, list[float]]) -> list[Part]:
    drafting = [1 / given.drafts_per_second] if given.drafts_per_second else times["draft"]
    verifying = [1 / given.verifications_per_second] if given.verifications_per_second else times["verification"]
    return [
        Part("retrieval", given.retrieval, 1, times["retrieval"]),
        Part("drafters", given.drafters, given.drafts, drafting),
        Part("verifiers", given.verifiers, given.drafts, verifying),
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--drafts", type=int, default=5, help="of a question")
    options.add_argument("--retrieval", type=int, default=1, help="cores of `specrag serve`")
    options.add_argument("--drafters", type=int, default=2, help="devices")
    options.add_argument("--verifiers", type=int, default=1, help="devices")
    options.add_argument("--drafts-per-second", type=float, help="of one device under load, in place of the file's")
    options.add_argument("--verifications-per-second", type=float, help="the same")
    options.add_argument("--per-day", type=float, default=1e6, help="questions")
    options.add_argument("--questions", type=int, default=5000, help="that are simulated, for each rate")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--measure", action="store_true", help="measure the service times, and write the file")
    options.add_argument("--count", type=int, default=30, help="jobs that are measured")
    options.add_argument("--python", help="of an environment with the package xllamacpp")
    options.add_argument("--gguf")
    given = options.parse_args()
    if given.measure:
        TIMES.write_text(json.dumps(measure(given.python, given.gguf, given.count)) + "\n")
    measured = json.loads(TIMES.read_text())
    parts = parts_of(given, measured["seconds"])
    own = given.drafts_per_second or given.verifications_per_second
    show_parts(parts, {} if own else measured["tokens"])
    show_check(parts, given.questions, given.seed)
    show_day(parts, given.per_day)


if __name__ == "__main__":
    main()
