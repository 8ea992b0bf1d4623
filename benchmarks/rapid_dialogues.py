"""Dialogues over one long document: quality, acceptance, speed and the time to the first token, turn by turn.

    python benchmarks/rapid_dialogues.py --target MODEL --drafter MODEL --out FOLDER [--dialogues 10] [--turns 6]

A dialogue asks questions of NQ and HotpotQA (dev) about one document, which holds the evidence of all of them at
random depths. Each system sees its own earlier answers. The document is read once for all systems; a turn reads what
follows the document: the earlier turns and its question. The time to the first token is that reading and the
retrieval. The drafter reads its retrieved chunks after the first token; it keeps what it has read until another
question retrieves other chunks.

FOLDER, `--report` and a start without models: as in `rapid_accuracy.py`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from _systems import Told, documents, loaded, names_of, questions
from _timing import machine, median

from specrag.evaluation.long_rows import long_figures, long_table
from specrag.evaluation.long_run import run_dialogues
from specrag.evaluation.long_systems import LongSystems
from specrag.evaluation.runs import Run
from specrag.models import Sampling
from specrag.rapid import RapidSettings

SYSTEMS = ("long-context", "rag", "rapid-self-0", "rapid-self-10", "hybrid-self-10", "rapid-upward-20")


def report(folder: Path) -> None:
    """Two tables: the systems, and each of their turns."""
    run = Run.load(folder)
    names, turns = list(run.info.systems), int(run.info.settings["turns"])
    turn_of = {question.id: i % turns for i, question in enumerate(run.questions)}
    print(f"\n{long_table(list(long_figures(run.answers, names)))}\n")
    print("Per turn: right, time to the first token in seconds (median), tokens per second (median)\n")
    print(f"| system | {' | '.join(f'turn {i + 1}' for i in range(turns))} |\n| --- |{' --- |' * turns}")
    for name in names:
        cells = defaultdict(list)
        for row in run.of_system(name).values():
            if row.error is None and row.rapid is not None:
                cells[turn_of[row.id]].append(row)
        shown = []
        for i in range(turns):
            first = [row.rapid["first_token_seconds"] for row in cells[i]]
            speeds = [row.rapid["tokens_per_second"] or 0 for row in cells[i]]
            right = sum(row.right for row in cells[i])
            shown.append(f"{right}/{len(first)}, {median(first):.1f} s, {median(speeds):.1f}" if first else "")
        print(f"| {name} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder or .gguf file; by default tiny random weights")
    parser.add_argument("--drafter", type=Path, help='of the systems with "upward"')
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--dialogues", type=int, default=10)
    parser.add_argument("--turns", type=int, default=6)
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
    room = args.tokens - args.turns * (args.max_tokens + 60)
    chosen, made = questions(args.dialogues * args.turns), documents(target, room)
    dialogues = [made.share(chosen[at : at + args.turns]) for at in range(0, len(chosen), args.turns)]
    run_dialogues(
        runner, dialogues, args.out, source="NQ and HotpotQA dev",
        settings={"tokens": args.tokens, "turns": args.turns}, progress=Told(len(chosen)),
    )  # fmt: skip
    return report(args.out)


if __name__ == "__main__":
    main()
