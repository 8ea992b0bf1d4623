"""Speculative RAG with a drafter that writes, and with the span reader: latency of each stage.

    python benchmarks/gpu_stages.py [--questions 30] [--warm-up 3] [--json FILE]

NQ dev with ten passages per question. The drafter and the verifier are the bundled SmolLM2, in bfloat16 on a GPU. With
random weights (`benchmarks/gpu.sh`) every draft has as many tokens as it may have.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from _timing import machine

from specrag import SpeculativeRAG
from specrag.evaluation.data import load_questions
from specrag.evaluation.metrics import contains_answer, percentiles
from specrag.models import bundled

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"
STAGES = ("embed", "cluster", "draft", "verify", "total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3, help="questions before them, not counted")
    parser.add_argument("--max-rationale-tokens", type=int, default=SpeculativeRAG.max_rationale_tokens)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    embedder = bundled("minilm")
    systems = {
        "SmolLM2 drafts and verifies": SpeculativeRAG(
            drafter=bundled("smollm2-rag-drafter", dtype=dtype), verifier=bundled("smollm2", dtype=dtype),
            embedder=embedder, seed=0, max_rationale_tokens=args.max_rationale_tokens,
        ),
        "span reader": SpeculativeRAG(drafter=bundled("minilm-reader"), embedder=embedder, seed=0),
    }  # fmt: skip
    questions = load_questions(DATA)
    results = {}
    print(machine(), flush=True)
    for name, rag in systems.items():
        seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        right = tokens = 0
        for i, question in enumerate(questions[: args.warm_up + args.questions]):
            start = time.perf_counter()
            answer = rag.answer(question.question, question.passages)
            whole = time.perf_counter() - start
            if i < args.warm_up:
                continue
            for stage in STAGES:
                seconds[stage].append(whole if stage == "total" else getattr(answer.timings, stage))
            right += contains_answer(answer.text, question.answers)
            tokens += answer.drafter_usage.completion_tokens
        shown = {stage: percentiles(values) for stage, values in seconds.items()}
        results[name] = {
            "questions": args.questions, "right": right, "draft_tokens": tokens / args.questions,
            "seconds": {stage: dict(values) for stage, values in shown.items()},
        }  # fmt: skip
        said = ", ".join(f"{stage} {1e3 * next(iter(values.values())):.0f}" for stage, values in shown.items())
        print(f"{name}: milliseconds, medians: {said}; {right} of {args.questions} right", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
