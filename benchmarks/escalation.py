"""Standard RAG, readers, and escalation, compared on the answers that `reader_accuracy.py` has kept.

    python benchmarks/reader_accuracy.py --verifier MODEL --readers minilm-reader mpnet-reader --no-listwise \
        --questions 300 --skip 0 --out rows.jsonl
    python benchmarks/escalation.py rows.jsonl

No model runs here. Escalation: where the probability of a reader's best span is below a bound, the answer of standard
RAG counts in its place. The bound with the most right answers on the first half of the questions is taken, the smaller
one of several; its figures are those of the other half. Intervals are 95 %, p is McNemar's.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drafter_quality import DATA

from specrag.evaluation.data import load_questions
from specrag.evaluation.statistics import compare, wilson_interval

BOUNDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of reader_accuracy.py")
    args = parser.parse_args()
    by_name: dict[str, dict[str, Row]] = {}
    for row in (json.loads(line) for file in args.rows for line in file.open()):
        by_name.setdefault(row["row"], {})[row["id"]] = row
    standard = by_name.pop("standard")
    ids = [q.id for q in load_questions(DATA) if q.id in standard]
    halves = {"first half": ids[: len(ids) // 2], "other half": ids[len(ids) // 2 :], "all": ids}
    for half, asked in halves.items():
        show(f"standard RAG, {half}", [right(standard[i]) for i in asked])
    for name, rows in by_name.items():
        if not name.endswith(" alone") or not all(i in rows for i in ids):
            continue
        for half, asked in halves.items():
            show(f"{name}, {half}", [right(rows[i]) for i in asked], [right(standard[i]) for i in asked])
        first, other = halves["first half"], halves["other half"]
        bound = max(BOUNDS, key=lambda at: (sum(right(escalated(rows, standard, at)[i]) for i in first), -at))
        mixed = escalated(rows, standard, bound)
        share = sum(mixed[i] is standard[i] for i in other) / len(other)
        print(f"{name}, escalated below {bound}: {share:.0%} of the other half")
        show("  other half", [right(mixed[i]) for i in other], [right(standard[i]) for i in other])


def escalated(rows: Mapping[str, Row], standard: Mapping[str, Row], bound: float) -> dict[str, Row]:
    """The rows that count: standard RAG's where the reader's best span is less likely than ``bound``."""
    sure = {i: math.exp(row["drafts"][0]["draft"]) if row["drafts"] else 0.0 for i, row in rows.items()}
    return {i: standard[i] if sure[i] < bound else rows[i] for i in rows if i in standard}


def right(row: Row) -> float:
    return float(row["right"])


def show(name: str, rights: Sequence[float], reference: Sequence[float] | None = None) -> None:
    low, high = wilson_interval(int(sum(rights)), len(rights))
    print(f"{name}: {sum(rights) / len(rights):.1%} ({low:.0%} to {high:.0%}) of {len(rights)}")
    if reference is not None:
        print(f"  less standard RAG: {compare(rights, reference)}")


if __name__ == "__main__":
    main()
