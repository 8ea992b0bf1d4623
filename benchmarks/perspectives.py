"""What reaches the drafters: how often some subset holds the passage that answers, or all passages that are needed.

    python benchmarks/perspectives.py [--drafts 3] [--passages-per-draft 2] [--data data/hotpotqa_dev.jsonl]

Compares the ways to choose subsets, and emb(d | Q) against the passages' own embeddings, by default on the questions of
Natural Questions. With m * k below the number of passages the choice matters. With the defaults (5 * 2 of 10) the
drafts together read every passage. A question of HotpotQA needs two passages: one subset must hold both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specrag.evaluation.data import load_questions
from specrag.evaluation.metrics import wilson_interval
from specrag.models import bundled
from specrag.speculative.perspectives import SUBSET_MODES, WITHOUT_GROUPS, sample_perspectives
from specrag.text import passage_text

DATA = Path(__file__).parent / "data" / "nq_dev_10_passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--passages-per-draft", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    questions, embedder = load_questions(args.data), bundled("minilm")
    texts = [[passage_text(p) for p in q.passages] for q in questions]
    vectors = {
        "emb(d | Q)": [
            embedder.embed(embedder.given_question(q.question, t)) for q, t in zip(questions, texts, strict=True)
        ],
        "emb(d)": [embedder.embed(t) for t in texts],
    }
    print(f"{len(questions)} questions, {args.seeds} seeds, k = {args.passages_per_draft}: all gold in one subset")
    for drafts in args.drafts:
        for mode in SUBSET_MODES:
            for name, embeddings in vectors.items():
                if mode in WITHOUT_GROUPS and name != "emb(d | Q)":
                    continue
                hits = 0
                for q, vector in zip(questions, embeddings, strict=True):
                    for seed in range(args.seeds):
                        made = sample_perspectives(
                            vector, len(q.passages), drafts, args.passages_per_draft, subsets=mode, seed=seed
                        )
                        hits += any(set(q.gold) <= set(subset) for subset in made.subsets)
                count = len(questions) * args.seeds
                low, high = wilson_interval(hits, count)
                label = "no embeddings" if mode in WITHOUT_GROUPS else name
                print(
                    f"m={drafts} {mode:15s}{label:14s}{100 * hits / count:6.1f} % ({100 * low:.1f} to {100 * high:.1f})"
                )


if __name__ == "__main__":
    main()
