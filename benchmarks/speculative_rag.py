"""Speculative RAG against standard RAG: latency by stage, tokens, answers.

    python benchmarks/speculative_rag.py --verifier PATH [--drafter PATH] [--questions 20]

Standard RAG is the verifier model reading all ten passages, with an answer-only prompt and the same stop rule. All
sides use the same engine, dtype (`--dtype`) and threads. They take turns on every question, and another side goes
first each time. On the CPU, a second speculative row has its drafter in int8. The verifier is any model folder; in
the figures of docs/results.md it is Qwen2.5-Coder-1.5B-Instruct.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

from _timing import Forwards, machine, median

from specrag import Prompts, SpeculativeRAG
from specrag.evaluation.data import load_questions
from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models import GenerationRequest, Stage, TransformersLM, Turn, bundled
from specrag.schema import SpeculativeAnswer

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", required=True)
    parser.add_argument("--drafter", help="by default the bundled drafter")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-rationale-tokens", type=int, default=SpeculativeRAG.max_rationale_tokens)
    parser.add_argument("--max-answer-tokens", type=int, default=SpeculativeRAG.max_answer_tokens, help="of every side")
    parser.add_argument("--drafters", nargs="+", choices=["same", "int8"], default=["same", "int8"])
    parser.add_argument("--json", type=Path, help="write every measurement here")
    args = parser.parse_args()

    import torch

    dtype = getattr(torch, args.dtype)

    def load_drafter(**options):
        return TransformersLM(args.drafter, **options) if args.drafter else bundled("smollm2-rag-drafter", **options)

    drafters = {}
    if "same" in args.drafters:
        drafters["speculative"] = load_drafter(dtype=dtype)
    if "int8" in args.drafters and not torch.cuda.is_available():
        drafters["speculative_int8_drafter"] = load_drafter(quantization="int8")
    verifier = TransformersLM(args.verifier, dtype=dtype)
    embedder = bundled("minilm")
    prompts = Prompts()
    watches = {name: Forwards().attach(lm.model) for name, lm in drafters.items()}
    watches |= {"verifier": Forwards().attach(verifier.model), "embedder": Forwards().attach(embedder._model)}
    pipelines = {
        name: SpeculativeRAG(
            drafter=lm,
            verifier=verifier,
            embedder=embedder,
            prompts=prompts,
            max_rationale_tokens=args.max_rationale_tokens,
            max_answer_tokens=args.max_answer_tokens,
            seed=0,
        )
        for name, lm in drafters.items()
    }

    def speculative(name, question) -> dict:
        start = time.perf_counter()
        answer: SpeculativeAnswer = pipelines[name].answer(question.question, question.passages)
        total = time.perf_counter() - start
        forwards = {name: watch.take() for name, watch in watches.items()}
        inside = sum(sum(seconds) for seconds, _ in forwards.values())
        winner = next((v.draft for v in answer.verdicts if not v.draft.abstained), None)
        return {
            "total": total,
            **{stage: getattr(answer.timings, stage) for stage in ("embed", "cluster", "draft", "verify")},
            "own": total - inside,
            "draft_prompt_tokens": answer.drafter_usage.prompt_tokens,
            "draft_output_tokens": answer.drafter_usage.completion_tokens,
            "verify_tokens": sum(forwards["verifier"][1]),
            "verify_passes": len(forwards["verifier"][1]),
            "answer_tokens": verifier.count_tokens(winner.text) if winner else 0,
            "answer": answer.text,
            "right": contains_answer(answer.text, question.answers),
            "some_draft_right": any(contains_answer(v.draft.text, question.answers) for v in answer.verdicts),
        }

    def standard(question) -> dict:
        request = GenerationRequest(
            (Turn.of("user", prompts.standard_text(question.question, question.passages)),),
            (Stage(prompts.answer_header, args.max_answer_tokens, ("\n",)),),
        )
        start = time.perf_counter()
        completion = verifier.generate([request])[0]
        total = time.perf_counter() - start
        seconds, _ = watches["verifier"].take()
        return {
            "total": total,
            "prefill": seconds[0],
            "per_token": median(seconds[1:]) if len(seconds) > 1 else float("nan"),
            "prompt_tokens": completion.usage.prompt_tokens,
            "output_tokens": completion.usage.completion_tokens,
            "answer": completion.text.strip(),
            "right": contains_answer(completion.text, question.answers),
        }

    runs = {name: partial(speculative, name) for name in pipelines} | {"standard": standard}
    questions = load_questions(args.data)[: args.questions + 1]
    for name in pipelines:
        runs[name](questions[-1])  # warm-up, not counted
    rows = []
    for i, question in enumerate(questions[: args.questions]):
        names = list(runs)
        names = names[i % len(names) :] + names[: i % len(names)]
        made = {name: runs[name](question) for name in names}
        std = made["standard"]
        per_token = 0.0 if math.isnan(std["per_token"]) else std["per_token"]
        for name in pipelines:  # standard RAG as if it had written as many tokens as the winning draft's answer
            missing = made[name]["answer_tokens"] + 1 - std["output_tokens"]  # 1: the token that ends it
            made[name]["standard_at_equal_length"] = std["total"] + per_token * missing
        rows.append({"id": question.id, "question": question.question, **made})
        shown = [f"standard {std['total']:5.1f} s {'right' if std['right'] else 'wrong'}"]
        for name in pipelines:
            m = made[name]
            parts = f"draft {m['draft']:.1f}, verify {m['verify']:.1f}"
            shown.append(f"{name} {m['total']:5.1f} s ({parts}) {'right' if m['right'] else 'wrong'}")
        print(f"{i + 1:3d} {' | '.join(shown)} | {question.question}", flush=True)
    report(rows)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine(), "dtype": args.dtype, "rows": rows}, indent=1, ensure_ascii=False)
        )


def report(rows: list[dict]) -> None:
    def mid(side: str, key: str) -> float:
        return median([row[side][key] for row in rows])

    print(f"\n{machine()}\n{len(rows)} questions, medians")
    print("standard")
    for key in ("total", "prefill", "per_token"):
        print(f"  {key:24s}{mid('standard', key):9.3f} s")
    for key in ("prompt_tokens", "output_tokens"):
        print(f"  {key:24s}{mid('standard', key):9.0f}")
    print_right(rows, "standard", "right")
    for side in (name for name in rows[0] if name.startswith("speculative")):
        print(side)
        for key in ("total", "embed", "cluster", "draft", "verify"):
            print(f"  {key:24s}{mid(side, key):9.3f} s")
        own = median([row[side]["own"] / row[side]["total"] for row in rows])
        print(f"  outside model forwards  {100 * own:9.2f} %")
        for key in ("draft_prompt_tokens", "draft_output_tokens", "verify_tokens", "verify_passes", "answer_tokens"):
            print(f"  {key:24s}{mid(side, key):9.0f}")
        ratio = median([row[side]["total"] / row["standard"]["total"] for row in rows])
        equal = median([row[side]["total"] / row[side]["standard_at_equal_length"] for row in rows])
        print(f"  {side} / standard: {ratio:.3f} ({100 * (1 - ratio):.1f} % less); at equal answer length {equal:.3f}")
        print_right(rows, side, "right")
        print_right(rows, side, "some_draft_right")


def print_right(rows: list[dict], side: str, key: str) -> None:
    count = sum(row[side][key] for row in rows)
    low, high = wilson_interval(count, len(rows))
    print(f"  {key}: {count}/{len(rows)} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)")


if __name__ == "__main__":
    main()
