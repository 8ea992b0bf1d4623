"""Greedy output without transfer against transformers' own, token by token.

    python benchmarks/rapid_exactness.py [--prompts 20] [--tokens 48]

Prompts of 1k to 8k tokens with the bundled SmolLM2. They are compared up to the first position at which the target's
two largest logits differ by less than 1e-3: float32 sums in another order may swap those.
"""

from __future__ import annotations

import argparse

import torch
from _long_context import long_documents, stock_model, stretched_model
from transformers import DynamicCache

from specrag.models import Sampling, bundled
from specrag.rapid import LongContext, RapidGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    lm, stock = stretched_model(8192), stock_model(8192)
    rapid = RapidGenerator(
        lm, embedder=bundled("minilm"), transfer="none", proposer="rag", sampling=Sampling(), candidates=5
    )
    equal = ties = accepted = 0
    for i in range(args.prompts):
        length = 1024 + (7168 - 1024) * i // max(1, args.prompts - 1)
        question, text = long_documents(lm, length, i + 1)[i]
        session = LongContext(text, rapid)
        out = session.ask(question.question, max_tokens=args.tokens)
        accepted += out.stats.accepted
        ours = lm.encoder.encode_text(out.text)
        ids = [*session.prompt.ids, *session.question_tokens(question.question)]
        cache, theirs, tie = DynamicCache(config=stock.config), [], None
        with torch.inference_mode():
            for at in range(0, len(ids), 512):
                chunk = torch.tensor([ids[at : at + 512]])
                logits = stock(chunk, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            while len(theirs) < args.tokens:
                top = logits.topk(2).values
                if tie is None and float(top[0] - top[1]) < 1e-3:
                    tie = len(theirs)
                token = int(logits.argmax())
                theirs.append(token)
                if token in lm.end_tokens:
                    break
                logits = stock(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        upto = len(theirs) if tie is None else tie
        same = lm.tokenizer.decode(theirs[:upto], skip_special_tokens=True)
        good = out.text == same if tie is None else out.text.startswith(same)
        equal += good
        ties += tie is not None
        print(f"{i + 1:3d} {len(ids)} tokens, {len(theirs)} generated: {'equal' if good else 'DIFFERENT'}"
              f"{'' if tie is None else f', a tie at {tie}'}", flush=True)  # fmt: skip
        del session, cache, ours
    print(f"{equal} of {args.prompts} equal, {ties} ended by a tie, {accepted} candidates accepted")


if __name__ == "__main__":
    main()
