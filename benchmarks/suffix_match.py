"""What suffix matches of each length are worth: how many of their candidates a model's own text would have accepted.

    python benchmarks/suffix_match.py [--length 8192] [--prompts 8] [--tokens 128] [--model FOLDER]

A model answers questions and requests for quotations over one document, by plain greedy decoding. Then
``SuffixMatchProposer`` proposes eight candidates at a time for that text; the next match begins after what was
accepted. No speed is measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from _long_context import long_document, stretched_model
from rapid_decoding import prompt

from specrag.models import Sampling, bundled
from specrag.rapid import LongContext, RapidGenerator
from specrag.rapid.drawing import Drawing
from specrag.rapid.proposers import SuffixMatchProposer

CANDIDATES = 8


def plain(session: LongContext, tail: list[int], count: int) -> list[int]:
    """``count`` tokens of greedy decoding after the document and ``tail``."""
    target = session.model
    target.rollback_to(session.tokens)
    logits, made = target.prefill(tail), []
    while len(made) < count:
        made.append(int(logits.argmax()))
        logits = target.feed(made[-1:])[0]
    return made


def matches(text: list[int], made: list[int], vocabulary: int) -> dict[str, list[int]]:
    """Tokens accepted, of every match, by its source; tokens of every step under "steps"."""
    proposer = SuffixMatchProposer(text, vocabulary)
    found, at = defaultdict(list), 1
    while at < len(made):
        source = proposer.source(made[:at])
        accepted = 0
        if source is not None:
            candidates = proposer.propose(made[:at], CANDIDATES, Drawing()).tokens.tolist()
            while accepted < len(candidates) and [candidates[accepted]] == made[at + accepted : at + accepted + 1]:
                accepted += 1
            found[source.name].append(accepted)
        found["steps"].append(accepted + 1)
        at += accepted + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    lm = stretched_model(max(args.length, 8192), args.model)
    questions, document = long_document(lm, args.length, args.prompts)
    session = LongContext(document, RapidGenerator(lm, embedder=bundled("minilm"), sampling=Sampling()))
    for kind in ("questions", "quotations"):
        found: dict[str, list[int]] = defaultdict(list)
        tokens = 0
        for question in questions:
            asked = prompt(question, kind == "quotations")
            tail = session.question_tokens(asked)
            made = plain(session, tail, args.tokens)
            text = [*session.prompt.ids, *tail]
            for name, accepted in matches(text, made, session.rapid.vocabulary).items():
                found[name] += accepted
            tokens += len(made) - 1
        steps = len(found.pop("steps"))
        print(f"{kind}: {tokens} tokens in {steps} steps")
        for name, accepted in sorted(found.items()):
            right = sum(n > 0 for n in accepted) / len(accepted)
            print(f"  {name:20s} {len(accepted):4d} times, the next token right {right:4.0%}, "
                  f"accepted of {CANDIDATES} {sum(accepted) / len(accepted):.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
