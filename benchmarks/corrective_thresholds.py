"""The thresholds of corrective RAG with an embedder as the evaluator: what they are chosen by, and how they hold.

    python benchmarks/corrective_thresholds.py [--embedder minilm] [--missed 0.05] [--trusted 0.1]

Data: NQ dev with ten passages per question (`data/`). "With": the ten passages, of which one answers. "Without": the
nine others, the nearest passages that hold no answer. "Elsewhere": the ten passages of another question.
The grade of a set is its best passage's, as in Yan et al. (arXiv 2401.15884, section 4.3).

Chosen on the first 150 questions: below ``lower`` is a share `--missed` of the sets with an answer, and above ``upper``
a share `--trusted` of the sets without one. The shares of the actions are printed for both halves.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
from drafter_quality import DATA

from specrag.baselines.corrective import action_for
from specrag.evaluation.data import Question, load_questions
from specrag.models import bundled
from specrag.text import passage_text

HALF = 150
ACTIONS = ("correct", "ambiguous", "incorrect")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default="minilm", help="a bundled embedder")
    parser.add_argument("--missed", type=float, default=0.05)
    parser.add_argument("--trusted", type=float, default=0.1)
    args = parser.parse_args()
    sets = best_grades(load_questions(DATA), args.embedder)
    lower = float(np.quantile(sets["with"][:HALF], args.missed))
    upper = float(np.quantile(sets["without"][:HALF], 1 - args.trusted))
    print(f"{args.embedder}: lower {lower:.3f}, upper {upper:.3f}, chosen on the first {HALF} questions")
    for pair in ((lower, upper), (round(lower, 1), round(upper, 1)), (0.3, 0.6)):
        print(f"\nthresholds {pair[0]:.2f} and {pair[1]:.2f}: share of each action")
        for name, grades in sets.items():
            for half, own in (("first", grades[:HALF]), ("other", grades[HALF:])):
                taken = Counter(action_for([grade], *pair) for grade in own)
                shares = ", ".join(f"{action} {taken[action] / len(own):.1%}" for action in ACTIONS)
                print(f"  {name:10} {half} {HALF}: {shares}  (median grade {np.median(own):.2f})")


def best_grades(questions: list[Question], embedder: str) -> dict[str, np.ndarray]:
    """The best grade of each question's sets of passages, by the kind of set."""
    model = bundled(embedder)
    asked = model.embed([question.question for question in questions])  # [questions, dim]
    made: dict[str, list[float]] = {"with": [], "without": [], "elsewhere": []}
    vectors = [model.embed([passage_text(passage) for passage in question.passages]) for question in questions]
    for at, question in enumerate(questions):
        grades = vectors[at] @ asked[at]
        made["with"].append(float(grades.max()))
        made["without"].append(float(np.delete(grades, question.gold).max()))
        made["elsewhere"].append(float((vectors[(at + HALF) % len(questions)] @ asked[at]).max()))
    return {name: np.array(values) for name, values in made.items()}


if __name__ == "__main__":
    main()
