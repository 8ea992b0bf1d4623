"""RAPID against plain decoding: tokens per second, acceptance, answers, and what one step costs.

    python benchmarks/rapid_decoding.py [--lengths 4096 8192 16384] [--prompts 3] [--tokens 128] [--json FILE]

One run, same float32 weights everywhere (an int8 drafter is a row of its own): transformers' `generate`, our plain decoding, RAPID self-speculation with each transfer, suffix match and hybrid.
Every row continues the same prefilled document; decoding alone is timed, and the rows take turns prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from _long_context import long_documents, stretched_smollm2
from _timing import machine, median
from transformers import DynamicCache

from specrag.evaluation.metrics import contains_answer
from specrag.models import bundled
from specrag.rapid import LongContext, RapidGenerator
from specrag.rapid.session import QUERY

ROWS = {
    "plain (ours)": {"candidates": 0},
    "none": {"transfer": "none", "candidates": 10},
    "rapid": {"transfer": "rapid", "candidates": 10},
    "augmented": {"transfer": "augmented", "candidates": 10},
    "none, auto": {"transfer": "none"},
    "rapid, auto": {"transfer": "rapid"},
    "none, int8 drafter": {"transfer": "none", "candidates": 10, "int8": True},
    "rapid, int8 drafter": {"transfer": "rapid", "candidates": 10, "int8": True},
    "match": {"proposer": "match", "transfer": "none"},
    "hybrid": {"proposer": "hybrid", "transfer": "none"},
}
STOCK = {"transformers generate": {}}


def stock_cache(session: LongContext, config) -> DynamicCache:
    """transformers' own cache with the same keys and values: no second prefill."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(session._target.cache.layers):
        keys, values = layer.key_buffer[:, :, : session.tokens], layer.value_buffer[:, :, : session.tokens]
        cache.update(keys.clone(), values.clone(), i)
    return cache


def step_costs(lm, session: LongContext, cache: DynamicCache, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of one forward pass over 1 and 11 tokens, ours and stock, taking turns."""
    times: dict[str, list[float]] = {f"{side} {n}": [] for side in ("stock", "ours") for n in (1, 11)}
    session._target.rollback_to(session.tokens)
    for _ in range(repeats):
        for n in (1, 11):
            ids = list(range(100, 100 + n))
            with torch.inference_mode():
                start = time.perf_counter()
                lm.model(torch.tensor([ids]), past_key_values=cache)
                times[f"stock {n}"].append(time.perf_counter() - start)
            cache.crop(-n)
            start = time.perf_counter()
            session._target.feed(ids)
            times[f"ours {n}"].append(time.perf_counter() - start)
            session._target.rollback_to(session.tokens)
    return {name: 1e3 * median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--quote", action="store_true", help="ask for quotations")
    parser.add_argument("--rows", nargs="+", choices=[*STOCK, *ROWS], default=[*STOCK, *ROWS])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    embedder, results = bundled("minilm"), []
    print(machine())
    for length in args.lengths:
        lm = stretched_smollm2(max(length, 8192))
        small = stretched_smollm2(max(length, 8192), quantization="int8")
        speeds: dict[str, list[float]] = {row: [] for row in args.rows}
        notes: dict[str, list[tuple]] = {row: [] for row in args.rows}
        costs = []
        for i, (question, text) in enumerate(long_documents(lm, length, args.prompts)):
            asked = question.question
            if args.quote:
                asked = f"Quote the passage that answers this, word for word: {asked}"
            base = RapidGenerator(lm, embedder=embedder, temperature=0.0)
            start = time.perf_counter()
            session = LongContext(text, base)
            print(f"{length}: {session.tokens} tokens read in {time.perf_counter() - start:.1f} s", flush=True)
            session.retrieve(asked)
            cache = stock_cache(session, lm.model.config)
            costs.append(step_costs(lm, session, cache))
            tail = lm.encoder.encode_text(session.tail.replace(QUERY, asked))
            ids = torch.tensor([[*session._head, *session._context, *tail]])
            names = args.rows[i % len(args.rows) :] + args.rows[: i % len(args.rows)]
            for name in names:
                if name in STOCK:
                    marks = []

                    class Clock:
                        def put(self, value, marks=marks):
                            marks.append((time.perf_counter(), value.numel()))

                        def end(self):
                            pass

                    options = {"streamer": Clock()}
                    start = time.perf_counter()
                    with torch.inference_mode():
                        made = lm.model.generate(
                            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
                            max_new_tokens=args.tokens, pad_token_id=0, eos_token_id=[], **options,
                        )  # fmt: skip
                    seconds = time.perf_counter() - (marks[1][0] if len(marks) > 1 else start)
                    cache.crop(-(cache.get_seq_length() - session.tokens))
                    reply = lm.tokenizer.decode(made[0, ids.shape[1] :])
                    speeds[name].append(args.tokens / seconds)
                    notes[name].append((0.0, 0.0, contains_answer(reply, question.answers)))
                    continue
                settings = dict(ROWS[name])
                drafter = small if settings.pop("int8", False) else None
                session.rapid = RapidGenerator(lm, drafter, embedder=embedder, temperature=0.0, **settings)
                session.rapid.target.__dict__["end_tokens"] = frozenset()  # every row writes all its tokens
                out = session.ask(asked, max_new_tokens=args.tokens)
                s = out.stats
                speeds[name].append(s.tokens / s.decode_seconds)
                outside = 1 - s.forward_seconds / s.decode_seconds
                notes[name].append((s.acceptance, outside, contains_answer(out.text, question.answers)))
                del session.rapid.target.__dict__["end_tokens"]
            del session, cache
        cost = {key: median([c[key] for c in costs]) for key in costs[0]}
        print(f"  step ms: {', '.join(f'{key} {value:.0f}' for key, value in cost.items())}")
        reference = speeds.get("transformers generate")
        for name in args.rows:
            ratio = median([a / b for a, b in zip(speeds[name], reference, strict=True)]) if reference else float("nan")
            accepted = median([n[0] for n in notes[name]])
            outside = median([n[1] for n in notes[name]])
            right = sum(n[2] for n in notes[name])
            print(f"  {name:28s}{median(speeds[name]):7.2f} tokens/s  {ratio:5.2f} x generate  accepted {accepted:.2f}  "
                  f"outside forwards {100 * outside:4.1f} %  right {right}/{args.prompts}", flush=True)  # fmt: skip
        results.append({"length": length, "speeds": speeds, "notes": notes, "step_ms": cost})
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
