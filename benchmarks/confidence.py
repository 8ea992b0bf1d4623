"""The confidence of a reader without a verifier: fitted on the first half of NQ dev, measured on the second.

    python benchmarks/confidence.py [--reader minilm-reader] [--questions 300] [--save FILE]

Data: NQ dev with ten passages per question (`data/`). Right: the answer contains one of the right answers. Printed:

- the expected calibration error on the second half, that of chance alone (confidences that are exactly right), and how
  many of its more confident answers are right;
- for several values of `min_confidence`: the share of the second half's questions on which it abstains when their gold
  passage is taken away, and how many right answers it loses when it is there.

`--save` writes the calibration that is fitted on both halves, as it ships.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from _timing import machine
from drafter_quality import DATA

from specrag import SpeculativeRAG
from specrag.evaluation.calibration import Examples, calibrate, calibration_examples
from specrag.evaluation.data import Question, load_questions
from specrag.evaluation.metrics import calibration_error_by_chance, expected_calibration_error
from specrag.models import bundled
from specrag.speculative.confidence import Calibration

FLOORS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
# The expected calibration error has this many bins, with equally many questions in each.
BINS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default="minilm-reader", help="name of a bundled reader")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    questions = load_questions(DATA)[: args.questions]
    half = len(questions) // 2
    rag = SpeculativeRAG(drafter=bundled(args.reader), embedder=bundled("minilm"), calibration=None)
    first, second = (calibration_examples(rag, part) for part in (questions[:half], questions[half:]))
    bare = calibration_examples(rag, [without_gold(question) for question in questions[half:]])
    fitted = calibrate(rag, first)
    print(machine(), rag.drafter, flush=True)
    print(f"fitted on {len(first)} answers, of which {share_right(first):.1%} are right: {dict(fitted.weights)}")
    sure = stated(fitted, second)
    ranked = [right for _, (_, right) in sorted(zip(sure, second, strict=True), key=lambda pair: -pair[0])]
    error = expected_calibration_error([right for _, right in second], sure, BINS)
    chance, most = calibration_error_by_chance(sure, BINS)
    confident = ranked[: len(ranked) // 2]
    print(
        f"second half: {len(second)} answers, {share_right(second):.1%} right, "
        f"expected calibration error {error:.3f} ({BINS} bins; by chance {chance:.3f}, 95 % up to {most:.3f}), "
        f"right among the more confident half {sum(confident) / len(confident):.1%}"
    )
    total, unsure = len(questions) - half, stated(fitted, bare)
    print("min_confidence  abstains without the gold passage  right answers lost, of all questions")
    for floor in FLOORS:
        abstained = total - sum(confidence >= floor for confidence in unsure)
        lost = sum(right and confidence < floor for confidence, (_, right) in zip(sure, second, strict=True))
        print(f"{floor:14}  {abstained / total:33.1%}  {lost / total:36.1%}")
    if args.save is not None:
        calibrate(rag, [*first, *second]).save(args.save)


def without_gold(question: Question) -> Question:
    kept = tuple(passage for i, passage in enumerate(question.passages) if i not in question.gold)
    return replace(question, id=f"{question.id}-without", answers=(), passages=kept, gold=())


def share_right(examples: Examples) -> float:
    return sum(right for _, right in examples) / len(examples)


def stated(calibration: Calibration, examples: Examples) -> list[float]:
    """The confidence of every answer; 0 where the calibration says nothing."""
    return [calibration.probability(found) or 0.0 for found, _ in examples]


if __name__ == "__main__":
    main()
