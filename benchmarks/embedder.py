"""The bundled embedder by batch size: seconds, for the passages of a question and for a document's pieces.

    python benchmarks/embedder.py

Medians of five, taking turns.
"""

from __future__ import annotations

import argparse
import time

from _long_context import DATA
from _timing import machine, median

from specrag.evaluation.data import load_questions
from specrag.models import bundled
from specrag.text import passage_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    print(machine())
    embedder = bundled("minilm")
    passages = [passage_text(p) for question in load_questions(DATA) for p in question.passages]
    for what, texts in (
        ("a question and ten passages", passages[:11]),
        ("96 pieces of a document", [(text * 4)[:800] for text in passages[:96]]),
    ):
        times: dict[int, list[float]] = {size: [] for size in args.sizes}
        for _ in range(5):
            for size in args.sizes:
                embedder.batch_size = size
                start = time.perf_counter()
                embedder.embed(texts)
                times[size].append(time.perf_counter() - start)
        print(f"{what}: " + ", ".join(f"batches of {size} {median(taken):.3f} s" for size, taken in times.items()))


if __name__ == "__main__":
    main()
