"""What the transfer strength η does to the answers, "auto" included.

    python benchmarks/rapid_transfer.py [--documents 16] [--questions 3] [--tokens 48] [--model FOLDER] [--json FILE]

A document is the ten passages of each of a few NQ dev questions, mixed. All of these questions are asked about it.
Every row decodes greedily with self-speculation and five candidates per round, so the rows differ in what is sampled
only. The rows: the target alone, the drafter alone (the same model on the retrieved chunks), and transfers at several
η. A text is right when it holds one of the right answers; 95 % Wilson intervals stand in brackets. "Won" and "lost"
count questions against the target alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from _long_context import DATA, stretched_model
from _timing import machine, median

from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models import Sampling, bundled
from specrag.rapid import LongContext, RapidGenerator
from specrag.text import passage_text

ROWS = {
    "target alone": {"candidates": 0},
    "drafter alone": {"candidates": 0},
    "rapid, 5": {"transfer": "rapid", "transfer_strength": 5.0},
    "rapid, 10": {"transfer": "rapid", "transfer_strength": 10.0},
    "rapid, 20": {"transfer": "rapid", "transfer_strength": 20.0},
    "rapid, auto": {"transfer": "rapid", "transfer_strength": "auto"},
    "augmented, 10": {"transfer": "augmented", "transfer_strength": 10.0},
    "augmented, auto": {"transfer": "augmented", "transfer_strength": "auto"},
}


def mixed_document(questions: list[Question]) -> str:
    """All their passages, the questions taking turns."""
    turns = zip(*(q.passages for q in questions), strict=True)
    return "\n\n".join(dict.fromkeys(passage_text(p) for turn in turns for p in turn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=3, help="per document")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path, help="a folder with another model; by default the bundled SmolLM2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(machine())
    lm, embedder = stretched_model(8192, args.model), bundled("minilm")
    generators = {
        name: RapidGenerator(
            lm, embedder=embedder, sampling=Sampling(), **{"candidates": 5, "proposer": "rag", **options}
        )
        for name, options in ROWS.items()
    }
    data = load_questions(DATA)
    right: dict[str, list[bool]] = {name: [] for name in ROWS}
    accepted: dict[str, list[float]] = {name: [] for name in ROWS}
    replies, lengths, confidences, held = [], [], [], []
    for at in range(0, args.documents * args.questions, args.questions):
        asked, start = data[at : at + args.questions], time.perf_counter()
        session = LongContext(mixed_document(asked), generators["target alone"])
        lengths.append(session.tokens)
        for question in asked:
            shown, confidence = session.retrieve(question.question)
            retrieved = lm.tokenizer.decode(shown)
            confidences.append(confidence)
            held.append(contains_answer(retrieved, question.answers))
            said = {"question": question.question, "answers": list(question.answers), "confidence": confidence}
            for name, rapid in generators.items():
                session.rapid = rapid
                source = LongContext(retrieved, rapid) if name == "drafter alone" else session
                out = source.ask(question.question, max_tokens=args.tokens)
                right[name].append(contains_answer(out.text, question.answers))
                accepted[name].append(out.stats.acceptance)
                said[name] = out.text
            replies.append(said)
        print(f"  {at + len(asked)} questions, the last document in {time.perf_counter() - start:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "right": right, "replies": replies}, indent=1))

    print(
        f"\n{len(replies)} questions over documents of {median(lengths):.0f} tokens; the retrieved context holds an "
        f"answer for {sum(held)}; confidence {min(confidences):.2f} to {max(confidences):.2f}, "
        f"median {median(confidences):.2f}"
    )
    alone = right["target alone"]
    for name, hits in right.items():
        low, high = wilson_interval(sum(hits), len(hits))
        won = sum(a and not b for a, b in zip(hits, alone, strict=True))
        lost = sum(b and not a for a, b in zip(hits, alone, strict=True))
        print(
            f"{name:16} {sum(hits):3} right  {sum(hits) / len(hits):5.1%} ({low:.0%} to {high:.0%})  "
            f"won {won}, lost {lost}, accepted {median(accepted[name]):.0%}"
        )


if __name__ == "__main__":
    main()
