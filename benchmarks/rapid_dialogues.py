"""Dialogues over one long document: quality, acceptance, speed and the time to the first token, turn by turn.

    python benchmarks/rapid_dialogues.py --target MODEL --drafter MODEL --out FOLDER [--dialogues 10] [--turns 6]
        [--data FILE]

A dialogue asks questions of NQ and HotpotQA (dev) about one document, which holds the evidence of all of them at
random depths. With `--data`, the dialogues are those of a file, such as MT-Bench-101's `mtbench101.jsonl` or specrag's
own format with `turns`; the document of each is its own, or made of other dialogues. A turn with a reply and without
answers is compared with the reply: look at F1 and ROUGE-L, not at "right". `specrag eval` asks such a file too.

Each system sees its own earlier answers. The document is read once for all systems; a turn reads what
follows the document: the earlier turns and its question. The time to the first token is that reading and the
retrieval. The drafter reads its retrieved chunks after the first token; it keeps what it has read until another
question retrieves other chunks.

FOLDER, `--report` and a start without models: as in `rapid_accuracy.py`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean

from _systems import Told, corpus, loaded, names_of, questions
from _timing import machine, median

from specrag.evaluation.data import Question, load
from specrag.evaluation.long_data import DocumentPlan, check_long_questions, filler_of, made_documents, turns_of
from specrag.evaluation.long_rows import long_figures, long_table
from specrag.evaluation.long_run import run_dialogues
from specrag.evaluation.long_systems import LongSystems
from specrag.evaluation.runs import Run
from specrag.models import Sampling, TransformersLM
from specrag.rapid import RapidSettings

SYSTEMS = ("long-context", "rag", "rag-upward", "rapid-self-0", "rapid-self-10", "hybrid-self-10", "rapid-upward-20")


def report(folder: Path) -> None:
    """Two tables: the systems, and each of their turns."""
    run = Run.load(folder)
    names, turn_of = list(run.info.systems), turns(run.questions)
    count = 1 + max(turn_of.values())
    print(f"\n{long_table(list(long_figures(run.answers, names)))}\n")
    print("Per turn: right, F1 (mean), time to the first token in seconds (median), tokens per second (median)\n")
    print(f"| system | {' | '.join(f'turn {i + 1}' for i in range(count))} |\n| --- |{' --- |' * count}")
    for name in names:
        cells = defaultdict(list)
        for row in run.of_system(name).values():
            if row.error is None and row.rapid is not None:
                cells[turn_of[row.id]].append(row)
        shown = []
        for i in range(count):
            first = [row.rapid["first_token_seconds"] for row in cells[i]]
            speeds = [row.rapid["tokens_per_second"] or 0 for row in cells[i]]
            right, f1 = sum(row.right for row in cells[i]), [row.metrics["f1"] for row in cells[i]]
            told = f"{right}/{len(first)}, {mean(f1):.2f}, {median(first):.1f} s, {median(speeds):.1f}" if first else ""
            shown.append(told)
        print(f"| {name} | {' | '.join(shown)} |")


def turns(asked: Sequence[Question]) -> dict[str, int]:
    """The turn of each question, from 0, by its id: questions of one dialogue follow one another over one document."""
    dialogues = groupby(asked, key=lambda question: question.context)
    return {question.id: turn for _, group in dialogues for turn, question in enumerate(group)}


def dialogues(args: argparse.Namespace, target: TransformersLM) -> list[list[Question]]:
    """The questions of each dialogue, with its document."""
    count = target.count_tokens
    if args.data is None:
        plan = DocumentPlan(tokens=(args.tokens,), share=args.turns)
        chosen = questions(args.dialogues * args.turns)
        return made_documents(chosen, corpus(), count, plan, max_tokens=args.max_tokens, turns=args.turns)
    every = load(args.data)
    chosen = every[: args.dialogues]
    plan = None if all(question.context for question in chosen) else DocumentPlan(tokens=(args.tokens,))
    check_long_questions(chosen, plan)
    if plan is not None:
        made = made_documents(chosen, filler_of(every), count, plan, max_tokens=args.max_tokens)
        chosen = [question for group in made for question in group]
    return [turns_of(question) for question in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder or .gguf file; by default tiny random weights")
    parser.add_argument("--drafter", type=Path, help='of the systems with "upward"')
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--dialogues", type=int, default=10)
    parser.add_argument("--turns", type=int, default=6, help="of a dialogue, without --data")
    parser.add_argument("--data", type=Path, help="dialogues in any known format, in place of NQ and HotpotQA")
    parser.add_argument("--tokens", type=int, default=8192, help="of a document with its dialogue")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--systems", type=names_of, default=list(SYSTEMS), help="names with commas between them")
    parser.add_argument("--sessions", type=Path, help="keep each document's reading in this folder, for a later run")
    parser.add_argument("--report", action="store_true", help="the tables of what is there")
    args = parser.parse_args()
    if args.report:
        return report(args.out)
    print(machine(), flush=True)
    target, drafter = loaded(args.target), loaded(args.drafter)
    settings = RapidSettings(candidates=args.candidates, sampling=Sampling())
    runner = LongSystems(
        args.systems, target, drafter, settings=settings, max_tokens=args.max_tokens, sessions=args.sessions
    )
    asked = dialogues(args, target)
    run_dialogues(
        runner, asked, args.out, source="NQ and HotpotQA dev" if args.data is None else args.data.name,
        settings={"tokens": args.tokens}, retry=True, progress=Told(sum(map(len, asked))),
    )  # fmt: skip
    return report(args.out)


if __name__ == "__main__":
    main()
