"""Verifying five drafts in one packed pass, against one sequence with as many tokens and against one at a time.

    python benchmarks/verification.py [--model PATH] [--repeats 15]

Logits are computed at the scored positions on all sides. The three take turns; medians and ratios.
"""

from __future__ import annotations

import argparse

import torch
from _timing import Forwards, machine, median

from specrag.models import TransformersLM, bundled
from specrag.schema import Draft
from specrag.speculative.verification import Verifier

LENGTHS = (12, 20, 30, 45, 60)  # words of the rationale: the longest is five times the shortest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    lm = TransformersLM(args.model) if args.model else bundled("smollm2")
    words = [
        "the",
        "shops",
        "of",
        "the",
        "company",
        "were",
        "first",
        "opened",
        "in",
        "that",
        "country",
        "during",
        "the",
        "spring",
        "of",
        "the",
        "year",
    ]
    drafts = [
        Draft(i, (i,), (), f"answer number {i}", " ".join(words[(i + j) % len(words)] for j in range(n)))
        for i, n in enumerate(LENGTHS)
    ]
    verifier = Verifier(lm)
    conversations = [verifier.conversation("when did it open", draft) for draft in drafts]
    watch = Forwards().attach(lm.model)
    lm.score(conversations)
    watch.take()
    lm.score(conversations)
    seconds, tokens = watch.take()
    total, scored = tokens[0], sum(len(v) for s in lm.score(conversations) for v in s.log_probs.values())
    watch.take()
    ids = torch.randint(100, 5000, (1, total), generator=torch.Generator().manual_seed(0))
    kept = torch.linspace(0, total - 1, scored).long()
    times: dict[str, list[float]] = {"packed": [], "one sequence": [], "one at a time": []}
    for _ in range(args.repeats):
        lm.score(conversations)
        times["packed"].append(sum(watch.take()[0]))
        with torch.inference_mode():
            lm.model(input_ids=ids, use_cache=False, logits_to_keep=kept)
        times["one sequence"].append(sum(watch.take()[0]))
        for conversation in conversations:
            lm.score([conversation])
        times["one at a time"].append(sum(watch.take()[0]))
    print(machine())
    print(f"{len(drafts)} drafts, {len(seconds)} forward pass, {total} tokens in it, {scored} scored")
    for name, values in times.items():
        ratio = median([a / b for a, b in zip(values, times["one sequence"], strict=True)])
        print(f"  {name:14s}{1e3 * median(values):9.1f} ms   {ratio:.3f} of one sequence")
    # Show: at most 1.15 of one sequence with the same number of tokens.


if __name__ == "__main__":
    main()
