"""Standard RAG against a span reader whose drafts the same model verifies side by side.

    python benchmarks/reader_accuracy.py --out FILE.jsonl [--verifier MODEL] [--readers minilm-reader]
        [--questions 150] [--skip 150]

Data: NQ dev with ten passages per question (`data/`). Right: the answer contains one of the right answers.
Standard RAG is the verifier that reads all ten passages. Per reader there are two rows: its best span, and its five
best distinct spans compared by the verifier (`Scoring(mode="listwise")`). "Covered": one of the five holds a right
answer. Per question the rows take turns. Without a verifier the readers run alone.
Every answer is written to FILE at once; a run that is repeated goes on where it stopped. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from _timing import machine
from drafter_quality import DATA, answered_by_standard

from specrag import Prompts, Scoring, SpeculativeRAG
from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models import TransformersLM, bundled
from specrag.models.reader import SpanReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", help="model folder or .gguf file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--readers", nargs="+", default=["minilm-reader"], help="bundled names, or NAME=BASE:ADAPTER")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--skip", type=int, default=150)
    parser.add_argument("--no-standard", action="store_true")
    parser.add_argument("--no-listwise", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    questions = load_questions(DATA)[args.skip :][: args.questions]
    rows = [json.loads(line) for line in args.out.open()] if args.out.exists() else []
    done = {(row["row"], row["id"]) for row in rows}
    lm = TransformersLM(args.verifier, dtype=getattr(torch, args.dtype)) if args.verifier else None
    embedder, prompts = bundled("minilm"), Prompts()
    readers = {name.partition("=")[0]: load(name) for name in args.readers}
    listwise = {
        name: SpeculativeRAG(drafter=reader, verifier=lm, embedder=embedder, scoring=Scoring(mode="listwise"))
        for name, reader in readers.items()
        if lm is not None and not args.no_listwise
    }
    print(machine(), lm, flush=True)
    with args.out.open("a") as out:

        def keep(row: str, q: Question, text: str, seconds: float, **more: object) -> None:
            made = {"row": row, "id": q.id, "text": text, "right": contains_answer(text, q.answers), "seconds": seconds}
            rows.append(made | more)
            out.write(json.dumps(made | more) + "\n")
            out.flush()

        for number, q in enumerate(questions, 1):
            if lm is not None and not args.no_standard and ("standard", q.id) not in done:
                keep("standard", q, *answered_by_standard(lm, prompts, q))
            for name, reader in readers.items():
                pipelines = {f"{name} alone": SpeculativeRAG(drafter=reader, embedder=embedder)}
                pipelines |= {f"{name} + listwise": listwise[name]} if name in listwise else {}
                for row, rag in pipelines.items():
                    if (row, q.id) in done:
                        continue
                    start = time.perf_counter()
                    answer = rag.answer(q.question, q.passages)
                    seconds = time.perf_counter() - start
                    drafts = [
                        {"text": v.draft.text, "draft": v.log_draft, "listwise": v.log_listwise}
                        for v in answer.verdicts
                    ]
                    covered = any(contains_answer(draft["text"], q.answers) for draft in drafts)
                    keep(row, q, answer.text, seconds, drafts=drafts, covered=covered, confidence=answer.confidence)
            if number % 10 == 0:
                report(rows)
    report(rows)


def load(name: str) -> SpanReader:
    name, _, place = name.partition("=")
    base, _, adapter = place.partition(":")
    return SpanReader(base, adapter=adapter) if place else bundled(name)


def report(rows: list[dict]) -> None:
    standard = {row["id"]: row["seconds"] for row in rows if row["row"] == "standard"}
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        right = sum(row["right"] for row in own)
        low, high = wilson_interval(right, len(own))
        ratios = [row["seconds"] / standard[row["id"]] for row in own if row["id"] in standard]
        covered = [row["covered"] for row in own if "covered" in row]
        print(
            f"{name:28} {right:4} of {len(own):4} right {right / len(own):6.1%} ({low:.0%}-{high:.0%})  "
            f"{median(row['seconds'] for row in own):5.1f} s"
            + (f", {median(ratios):.2f} of standard RAG's" if ratios else "")
            + (f", covered {sum(covered) / len(covered):.1%}" if covered else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
