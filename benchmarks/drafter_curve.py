"""Accuracy against the number of training examples (the paper's Table 9). Each drafter is trained from the base.

    python benchmarks/drafter_curve.py train.jsonl --out FOLDER [--sizes 0 250 500 1000 2000] [--questions 100]

`train.jsonl` is as for `specrag train`. For every size, a drafter is trained for one round over that many records,
with the defaults of `specrag train`. A size whose adapter is in the folder already is not trained again, so a killed
run can go on. Evaluation: NQ dev (`data/`), with the gold passage alone, and with a hard distractor before or after
it; greedy, int8 weights on the CPU. Right: the text of the answer contains a right answer. Brackets: 95 % Wilson
intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from _timing import machine

from specrag.evaluation.data import load_questions
from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models import bundled
from specrag.speculative.drafting import Drafter
from specrag.training import TrainingSettings, make_examples, train

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 250, 500, 1000, 2000])
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()
    print(machine())
    records, questions = load_questions(args.data), load_questions(DATA)[: args.questions]
    embedder = bundled("minilm")
    rows = []
    for size in args.sizes:
        adapter, start = args.out / str(size), time.perf_counter()
        if size and not (adapter / "adapter_model.safetensors").exists():
            # Every n-th record: no size sees one part of the data only.
            step = len(records) / size
            used = [records[int(i * step)] for i in range(size)]
            rounds = make_examples(used, embedder, corpus=[p for record in records for p in record.passages])
            train(bundled("smollm2"), rounds, adapter, settings=TrainingSettings())
        seconds = time.perf_counter() - start
        lm = bundled("smollm2", quantization="int8", **({"adapter": adapter} if size else {}))
        drafter, found = Drafter(lm), {}
        for kind in ("gold alone", "gold and one"):
            right = []
            for at in range(0, len(questions), 8):
                group = questions[at : at + 8]
                requests = []
                for i, q in enumerate(group):
                    shown = [q.passages[q.gold[0]]]
                    if kind == "gold and one":
                        other = next(p for j, p in enumerate(q.passages) if j not in q.gold)
                        shown.insert(i % 2, other)
                    requests.append(drafter.request(q.question, shown))
                made = lm.generate(requests)
                right += [contains_answer(c.parts[1].text, q.answers) for c, q in zip(made, group, strict=True)]
            low, high = wilson_interval(sum(right), len(right))
            found[kind] = (sum(right) / len(right), low, high)
        rows.append({"examples": size, "training seconds": seconds, **found})
        shown = ", ".join(
            f"{kind} {share:5.1%} ({low:.0%} to {high:.0%})" for kind, (share, low, high) in found.items()
        )
        print(f"{size:5d} examples: {shown}; trained in {seconds / 60:.0f} min", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "curve.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
