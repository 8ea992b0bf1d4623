"""What reaches the drafters: how often some subset, or one of the first few, holds the passage that answers.

    python benchmarks/perspectives.py [--drafts 3]

Compares the ways to choose subsets, and emb(d | Q) against the passages' own embeddings, on the 100 questions
of `data/`. With m * k below the number of passages the choice matters. With the defaults (5 * 2 of 10) the
drafts together read every passage.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specrag.evaluation.data import load_questions
from specrag.evaluation.metrics import wilson_interval
from specrag.models import bundled
from specrag.speculative.perspectives import SUBSET_MODES, sample_perspectives
from specrag.text import passage_text

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--passages-per-draft", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    questions, embedder = load_questions(DATA), bundled("minilm")
    texts = [[passage_text(p) for p in q.passages] for q in questions]
    vectors = {
        "emb(d | Q)": [
            embedder.embed(embedder.given_question(q.question, t)) for q, t in zip(questions, texts, strict=True)
        ],
        "emb(d)": [embedder.embed(t) for t in texts],
    }
    print(f"{len(questions)} questions, {args.seeds} seeds, k = {args.passages_per_draft}: gold passage in some subset")
    for drafts in args.drafts:
        for mode in SUBSET_MODES:
            for name, embeddings in vectors.items():
                if mode == "random" and name != "emb(d | Q)":
                    continue
                hits = 0
                for q, vector in zip(questions, embeddings, strict=True):
                    for seed in range(args.seeds):
                        made = sample_perspectives(
                            vector, len(q.passages), drafts, args.passages_per_draft, subsets=mode, seed=seed
                        )
                        hits += any(q.gold[0] in subset for subset in made.subsets)
                count = len(questions) * args.seeds
                low, high = wilson_interval(hits, count)
                label = "no embeddings" if mode == "random" else name
                print(
                    f"m={drafts} {mode:15s}{label:14s}{100 * hits / count:6.1f} % ({100 * low:.1f} to {100 * high:.1f})"
                )


if __name__ == "__main__":
    main()
