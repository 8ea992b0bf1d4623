"""A training step of the bundled drafter: seconds, tokens per second, memory.

    python benchmarks/gpu_training.py [--steps 25] [--batch 16] [--json FILE]

LoRA on SmolLM2, with examples of three passages from NQ dev. This measures speed; nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from _timing import machine

from specrag import Prompts
from specrag.evaluation.data import load_questions
from specrag.models import bundled
from specrag.speculative.drafting import Drafter
from specrag.text import passage_text
from specrag.training import TrainingSettings, train
from specrag.training.examples import Example

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"
WARM_UP = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.batch * (args.steps + WARM_UP)
    examples = []
    for question in load_questions(DATA) * -(-wanted // 300):
        at = question.gold[0]
        shown = (*question.passages[:at], *question.passages[at + 1 :])[:2]
        gold = question.passages[at]
        rationale = " ".join(passage_text(gold).split()[:40])
        examples.append(Example(question.question, (gold, *shown), rationale, question.answers[0]))
    lm, prompts = bundled("smollm2", dtype=torch.float32), Prompts()
    drafter = Drafter(lm, prompts=prompts)
    requests = [drafter.request(e.question, e.passages) for e in examples[: 4 * args.batch]]
    each = sum(len(lm.encoder.encode_generation(request)) for request in requests) / len(requests)
    marks: list[float] = []
    seen = -1

    def progress(step, steps, logged):
        nonlocal seen
        if step != seen:
            seen = step
            marks.append(time.perf_counter())

    settings = TrainingSettings(
        batch_size=args.batch, micro_batch_size=args.batch, checkpoint_steps=10_000, precision=args.precision
    )
    with tempfile.TemporaryDirectory() as folder:
        train(lm, [examples[:wanted]], Path(folder) / "out", settings=settings, prompts=prompts, progress=progress)
    steps = [b - a for a, b in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)]
    seconds = median(steps)
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    result = {
        "machine": machine(), "batch": args.batch, "steps": len(steps), "seconds": seconds,
        "tokens_per_second": each * args.batch / seconds, "memory_gib": memory,
    }  # fmt: skip
    print(f"{seconds:.3f} s per step of {args.batch} examples, {result['tokens_per_second']:,.0f} tokens per second")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
