"""Products of a few rows with all of SmolLM2's weights: torch's own linear layers (MKL) against oneDNN's.

    python benchmarks/linear.py [--dtype bfloat16]

oneDNN runs over the weights as they are ("ours") and in its blocked layout ("packed"). Shown are milliseconds for all
211 matrices, as one forward pass multiplies them: medians of passes that take turns.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _long_context import stock_model
from _timing import machine, median
from torch import nn

from specrag.engine.onednn import OneDNNLinear, PackedLinear, available


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 5, 11, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(machine())
    if not available():
        raise SystemExit("this torch or this machine has no oneDNN product: linear layers stay as they are")
    layers = [module for module in stock_model(8192).to(dtype).modules() if type(module) is nn.Linear]
    weights = sum(layer.weight.nbytes for layer in layers)
    plain = [copy.copy(layer) for layer in layers]
    for layer in plain:
        layer.__class__ = OneDNNLinear
    sides = {"torch": layers, "ours": plain, "packed": [PackedLinear(layer) for layer in layers]}
    for rows in args.rows:
        inputs = {size: torch.randn(rows, size).to(dtype) for size in {layer.in_features for layer in layers}}
        times: dict[str, list[float]] = {side: [] for side in sides}
        with torch.inference_mode():
            for _ in range(args.repeats):
                for side, taken in times.items():
                    start = time.perf_counter()
                    for layer in sides[side]:
                        layer(inputs[layer.in_features])
                    taken.append(time.perf_counter() - start)
        found = {side: median(taken) for side, taken in times.items()}
        shown = ", ".join(f"{side} {1e3 * t:6.1f} ms ({weights / t / 1e9:4.1f} GB/s)" for side, t in found.items())
        print(
            f"{rows:4d} rows: {shown}; {found['torch'] / found['ours']:.2f}x, {found['torch'] / found['packed']:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
