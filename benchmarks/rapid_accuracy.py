"""RAPID's claim with models that read: accuracy over long documents, every system of the paper side by side.

    python benchmarks/rapid_accuracy.py --target MODEL --drafter MODEL --out FOLDER [--questions 40] [--tokens 8192]

The questions are of NQ and HotpotQA (dev), taking turns. Each document is made of other passages, with the evidence
at a random depth. Every document is read once by the target; all systems continue that reading. All decode greedily,
so a run repeats; the authors sample (temperature 1 on InfiniteBench, 0.1 on LongBench v2). Under greedy decoding the
transfer decides by the likeliest token of the augmented target. The first token of an answer and the one after a round
without a rejection are the target's own.

"self": the target drafts for itself. "upward": the other model drafts. Both read prompts in the target's chat
template. With "-irrelevant", chunks of the same document that hold no answer stand in place of those that the question
retrieves.

`specrag eval DATA --documents 8192 --systems ... --target MODEL` does the same with your questions.

FOLDER is a run (`specrag.evaluation.runs`): a killed run continues, and after each question every system has its row.
`--report` prints the tables of what is there and asks nothing. Without models it runs on tiny random weights.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from _systems import Told, corpus, loaded, names_of, questions
from _timing import machine

from specrag.evaluation.long_data import DocumentPlan, made_documents
from specrag.evaluation.long_rows import long_figures, long_table
from specrag.evaluation.long_run import run_long_systems
from specrag.evaluation.long_systems import LongSystems
from specrag.evaluation.runs import Run
from specrag.models import Sampling
from specrag.rapid import RapidSettings

MAIN = (
    "long-context", "rag", "rag-upward", "naive-sd-self", "magicdec-self",
    "rapid-self-0", "rapid-self-5", "rapid-self-10", "rapid-self-20", "hybrid-self-10",
    "rapid-upward-0", "rapid-upward-10", "rapid-upward-20", "rapid-upward-40",
)  # fmt: skip
ROBUSTNESS = (
    "rag-irrelevant", "rapid-self-0-irrelevant", "rapid-self-10-irrelevant", "rapid-self-20-irrelevant",
    "rapid-self-50-irrelevant", "rag-upward-irrelevant", "rapid-upward-0-irrelevant", "rapid-upward-10-irrelevant",
    "rapid-upward-20-irrelevant", "rapid-upward-50-irrelevant",
)  # fmt: skip


def chosen(text: str) -> list[str]:
    """Names of systems; "main" and "robustness" stand for several."""
    several = {"main": MAIN, "robustness": ROBUSTNESS}
    return [name for given in names_of(text) for name in several.get(given, (given,))]


def report(folder: Path) -> None:
    """The tables of the run in ``folder``, and how often the retrieved context holds an answer."""
    run = Run.load(folder)
    names = list(run.info.systems)
    reference = "long-context" if "long-context" in names else names[0]
    for title, shown in (
        ("The question's own retrieved context", [name for name in names if not name.endswith("-irrelevant")]),
        ("An irrelevant retrieved context", [reference, *(name for name in names if name.endswith("-irrelevant"))]),
    ):
        if len(shown) > 1:
            print(f"\n{title}\n\n{long_table(list(long_figures(run.answers, shown, reference=reference)))}")
    asked = [row.rapid for row in run.answers if row.system == reference and row.rapid]
    if asked:
        held = sum(bool(made["retrieved_holds_answer"]) for made in asked)
        print(f"\nThe retrieved context holds an answer for {held} of {len(asked)} questions.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a folder or .gguf file; by default tiny random weights")
    parser.add_argument("--drafter", type=Path, help='of the systems with "upward"')
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=8192, help="of a document with its question and answer")
    parser.add_argument("--share", type=int, default=1, help="questions per document")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--window", type=int, default=512, help="of window and triforce")
    parser.add_argument("--datastore", type=Path, help="of rest")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--systems", type=chosen, default=[*MAIN, *ROBUSTNESS],
        help="names with commas between them, main, robustness; by default both",
    )  # fmt: skip
    parser.add_argument("--sessions", type=Path, help="keep each document's reading in this folder, for a later run")
    parser.add_argument("--report", action="store_true", help="the tables of what is there")
    args = parser.parse_args()
    if args.report:
        return report(args.out)
    print(machine(), flush=True)
    target, drafter = loaded(args.target), loaded(args.drafter)
    sampling = Sampling(temperature=args.temperature, seed=0)
    settings = RapidSettings(candidates=args.candidates, sampling=sampling, window=args.window)
    if args.datastore is not None:
        settings = replace(settings, proposer="rest", datastore=args.datastore)
    runner = LongSystems(
        args.systems, target, drafter, settings=settings, max_tokens=args.max_tokens, sessions=args.sessions
    )
    plan = DocumentPlan(tokens=(args.tokens,), share=args.share)
    picked, count = questions(args.questions), target.count_tokens
    asked = [q for group in made_documents(picked, corpus(), count, plan, max_tokens=args.max_tokens) for q in group]
    run_long_systems(
        runner, asked, args.out, source="NQ and HotpotQA dev", settings={"tokens": args.tokens, "share": args.share},
        retry=True, progress=Told(len(asked)),
    )  # fmt: skip
    return report(args.out)


if __name__ == "__main__":
    main()
