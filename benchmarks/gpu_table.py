"""What `benchmarks/gpu.sh` measured, as Markdown: `python benchmarks/gpu_table.py FOLDER MODELS.txt`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

from _timing import machine


def read(file: Path) -> dict | None:
    return json.loads(file.read_text()) if file.exists() else None


def rapid(results: list[dict], base: str = "generate") -> list[str]:
    """Tokens per second of each row at each length, and the ratio to the row ``base``."""
    results = sorted(results, key=lambda result: result["length"])
    lines = [
        f"| RAPID, tokens/s (times {base}) | " + " | ".join(f"{result['length']:,}" for result in results) + " |",
        "| --- |" + " ---: |" * len(results),
    ]
    for row in dict.fromkeys(name for result in results for name in result["speeds"]):
        cells = []
        for result in results:
            own, theirs = result["speeds"].get(row), result["speeds"].get(base)
            ratio = f" ({median([a / b for a, b in zip(own, theirs, strict=True)]):.2f})" if own and theirs else ""
            cells.append(f"{median(own):.1f}{ratio}" if own else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]


def stages(results: dict[str, dict]) -> list[str]:
    names = next(iter(results.values()))["seconds"]
    lines = [f"| median / p95, ms | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for name, result in results.items():
        cells = [" / ".join(f"{1e3 * value:.0f}" for value in shown.values()) for shown in result["seconds"].values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    folder, models = Path(sys.argv[1]), Path(sys.argv[2])
    lines = [f"Measured on: {machine()}", "", "Weights: " + "; ".join(models.read_text().splitlines()) + ".", ""]
    if (found := read(folder / "rapid.json")) and found["results"]:
        lines += rapid(found["results"])
    if (found := read(folder / "graphs.json")) and found["results"]:
        lines += ["With steps that are recorded as CUDA graphs:", "", *rapid(found["results"], "plain, no graphs")]
    if (found := read(folder / "stages.json")) and found["results"]:
        lines += stages(found["results"])
    if found := read(folder / "training.json"):
        lines += [
            f"Training: {found['seconds']:.3f} s per step of {found['batch']} examples, "
            f"{found['tokens_per_second']:,.0f} tokens per second.",
            "",
        ]
    status = (folder / "status.txt").read_text().splitlines()
    print("\n".join([*lines, *(f"- {line}" for line in status)]))


if __name__ == "__main__":
    main()
