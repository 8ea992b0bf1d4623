"""A drafter in float32, bfloat16 and int8: the time of five drafts, and how much its log-probabilities differ.

    python benchmarks/drafter_precision.py [--questions 8] [--tokens 48] [--model FOLDER]

For each question, five prompts of two passages; greedy; every draft writes all its tokens. Reading the prompts is
timed as generating one token of each, and decoding is the rest. The precisions take turns; medians.
Log-probabilities: those of the passages' own tokens, against float32.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from _long_context import DATA
from _timing import machine, median

from specrag.evaluation.data import load_questions
from specrag.models import GenerationRequest, Sampling, Segment, Stage, TransformersLM, Turn
from specrag.models.bundled import located
from specrag.text import passage_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path, help="a model folder; by default the bundled SmolLM2")
    args = parser.parse_args()
    print(machine())
    path = args.model or located("smollm2")
    sides = {
        "float32": TransformersLM(path, dtype=torch.float32, device="cpu"),
        "bfloat16": TransformersLM(path, dtype=torch.bfloat16, device="cpu"),
        "int8": TransformersLM(path, quantization="int8", device="cpu"),
    }
    reading: dict[str, list[float]] = {side: [] for side in sides}
    writing: dict[str, list[float]] = {side: [] for side in sides}
    moved: dict[str, list[float]] = {side: [] for side in sides}
    for lm in sides.values():
        lm.__dict__["end_tokens"] = frozenset()  # every draft writes all its tokens
    for i, question in enumerate(load_questions(DATA)[: args.questions]):
        pairs = ["\n".join(map(passage_text, question.passages[at : at + 2])) for at in range(0, 10, 2)]
        turns = [(Turn.of("user", f"{pair}\n\n{question.question}"),) for pair in pairs]
        scored = [(Turn("user", (Segment(pair, "text"),)),) for pair in pairs]
        found = {}
        for name in [*sides][i % 3 :] + [*sides][: i % 3]:
            lm, times = sides[name], []
            for tokens in (1, args.tokens):
                start = time.perf_counter()
                lm.generate(
                    [GenerationRequest(t, (Stage(max_tokens=tokens),)) for t in turns], Sampling(temperature=0.0)
                )
                times.append(time.perf_counter() - start)
            reading[name].append(times[0])
            writing[name].append((times[1] - times[0]) / (args.tokens - 1))
            found[name] = [x for score in lm.score(scored) for x in score.log_probs["text"]]
        for name, values in found.items():
            moved[name] += [abs(a - b) for a, b in zip(values, found["float32"], strict=True)]
    for name in sides:
        total = median([r + (args.tokens - 1) * w for r, w in zip(reading[name], writing[name], strict=True)])
        print(
            f"{name:9} reading {median(reading[name]):5.2f} s, "
            f"a step of five rows {1e3 * median(writing[name]):5.1f} ms, both {total:5.2f} s; "
            f"log-probabilities moved by {sum(moved[name]) / len(moved[name]):.3f} nats a token"
        )


if __name__ == "__main__":
    main()
