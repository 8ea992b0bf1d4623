"""One step of decoding with transformers' forward pass and with ours, over the same weights, cache and attention.

    python benchmarks/decoder.py [--length 1024]

SmolLM2 in float32 with packed weights, and RAPID's attention on both sides. Shown are milliseconds, medians of steps
that take turns: one token, and six tokens of one sequence (a verification).
"""

from __future__ import annotations

import argparse
import time

import torch
from _timing import machine, median

from specrag.models import bundled
from specrag.rapid.cached_model import CachedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    print(machine())
    model = CachedModel(bundled("smollm2"), args.length + 64, 49152)
    if not model.light:
        raise SystemExit("our forward pass does not serve this machine")
    generator = torch.Generator().manual_seed(0)
    model.prefill(torch.randint(1000, 40000, (args.length,), generator=generator).tolist())
    for tokens in (1, 6):
        ids = torch.randint(1000, 40000, (tokens,), generator=generator).tolist()
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(args.repeats):
            for light, taken in times.items():
                model.light = light
                start = time.perf_counter()
                model.feed(ids)
                taken.append(1e3 * (time.perf_counter() - start))
                model.rollback_to(args.length)
        stock, ours = median(times[False]), median(times[True])
        print(
            f"{tokens} tokens after {args.length}: transformers {stock:.1f} ms, ours {ours:.1f} ms "
            f"({stock / ours:.2f}x)"
        )


if __name__ == "__main__":
    main()
