"""What each weight format costs in quality: nats per token of real passages, against float32.

    python benchmarks/weight_formats.py [MODEL] [--questions 30] [--formats float32 bfloat16 int8 int4 gguf]

MODEL is a folder or a .gguf file; by default the bundled SmolLM2. `gguf` needs a file. The text: the gold passages of
NQ dev, two at a time, each pair as a user's turn. The formats are loaded one after another. Printed for each: the mean
negative log-probability of a token, how much more it is than in float32 with its 95 % interval (bootstrap over the
pairs), and the mean size of a token's change.
"""

from __future__ import annotations

import argparse
import gc

import numpy as np
import torch
from _long_context import DATA
from _timing import machine

from specrag.evaluation.data import load_questions
from specrag.evaluation.statistics import bootstrap_interval
from specrag.models import Segment, TransformersLM, Turn
from specrag.models.bundled import located
from specrag.text import passage_text

FORMATS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "gguf": {"quantization": "gguf"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="by default the bundled SmolLM2")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, help="float32 always comes first")
    args = parser.parse_args()
    model = args.model or located("smollm2")
    file = str(model).endswith(".gguf")
    names = args.formats or [name for name in FORMATS if name != "gguf" or file]
    gold = [passage_text(q.passages[q.gold[0]]) for q in load_questions(DATA)[: args.questions]]
    turns = [(Turn("user", (Segment("\n".join(gold[i : i + 2]), "text"),)),) for i in range(0, len(gold), 2)]
    print(machine(), flush=True)
    full: list[np.ndarray] = []
    for name in ["float32", *(name for name in names if name != "float32")]:
        lm = TransformersLM(model, device="cpu", **FORMATS[name])  # type: ignore[arg-type]
        found = [np.array(lm.score([turn])[0].log_probs["text"]) for turn in turns]
        full = full or found
        tokens = sum(map(len, found))
        more = [float((reference - own).mean()) for own, reference in zip(found, full, strict=True)]
        low, high = bootstrap_interval(more, [0.0] * len(more))
        moved = sum(float(np.abs(own - reference).sum()) for own, reference in zip(found, full, strict=True)) / tokens
        nats = -sum(float(own.sum()) for own in found) / tokens
        print(
            f"{name:9} {nats:.4f} nats per token, {np.mean(more):+.4f} ({low:+.4f} to {high:+.4f}), "
            f"a token moved by {moved:.4f}; {tokens} tokens; native: {lm.native is not None}",
            flush=True,
        )
        del lm
        gc.collect()


if __name__ == "__main__":
    main()
