"""A run's figures on the terminal (rich) and as plots (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from specrag._extras import require
from specrag._files import replacing
from specrag.evaluation.runs import AnswerRow
from specrag.evaluation.summary import Summary, SystemSummary

if TYPE_CHECKING:
    from rich.table import Table

    from specrag.evaluation.long_rows import LongFigures

PLOTS = {
    "accuracy.png": "accuracy against latency",
    "stages.png": "seconds of each stage",
    "length.png": "acceptance and speed against the length of the document",
}
# Colours that people who do not tell red from green tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def summary_tables(summary: Summary) -> tuple[Table, Table]:
    """One row per system: how often it is right; and how long it takes and what each model reads and writes."""
    from rich.markup import escape

    quality = _table("right", "95 %", "F1", "abstained", "of answered", "coverage", "choice")
    roles = list(dict.fromkeys(role for system in summary.systems for role in system.tokens))
    cost = _table("p50 s", "p95 s", *(f"{role} tokens" for role in roles))
    for one in summary.systems:
        low, high = one.interval
        failed = f" [red]({one.errors} failed)[/]" if one.errors else ""
        shares = (one.metrics.get("f1"), one.abstained, one.selective_accuracy, one.draft_coverage)
        quality.add_row(
            escape(one.system) + failed,
            _share(one.accuracy),
            f"{low * 100:.0f}–{high * 100:.0f}",
            *map(_share, (*shares, one.verifier_efficiency)),
        )
        tokens = (f"{sum(one.tokens[role].values()):,.0f}" if role in one.tokens else "–" for role in roles)
        cost.add_row(escape(one.system), f"{one.seconds['p50']:.2f}", f"{one.seconds['p95']:.2f}", *tokens)
    return quality, cost


def decoding_table(figures: Sequence[LongFigures]) -> Table:
    """One row per system over long documents: against the target alone, and how fast it decodes."""
    from rich.markup import escape

    table = _table("won, lost", "p", "accepted", "tokens/s", "drafter s", "rescued")
    for one in figures:
        both = "–" if one.both_fail is None else f"{one.rescued} of {one.both_fail}"
        reads = f"{one.drafter_seconds:.1f}" if one.drafter_seconds else "–"
        against = (f"+{one.won} -{one.lost}", f"{one.p:.2f}")
        table.add_row(escape(one.system), *against, _share(one.acceptance), f"{one.tokens_per_second:.1f}", reads, both)
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("system", overflow="fold", min_width=14)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f}"


def plot(summary: Summary, folder: Path) -> list[Path]:
    """Write the plots into ``folder``: accuracy against latency, and the stages of each system.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    require("matplotlib", "evaluation", "plots")
    return [
        _saved(_accuracy_against_latency(summary.systems), folder / "accuracy.png"),
        _saved(_stages(summary.systems), folder / "stages.png"),
    ]


def plot_lengths(rows: Sequence[AnswerRow], folder: Path) -> list[Path]:
    """Write ``length.png`` into ``folder``: acceptance and tokens per second of each system against the length.

    Documents within a power of two are one length. Nothing is written where all documents have one length.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    require("matplotlib", "evaluation", "plots")
    by_length: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        made = row.rapid or {}
        if row.error is None and made.get("document_tokens"):
            length = 2 ** round(math.log2(made["document_tokens"]))
            by_length.setdefault(row.system, {}).setdefault(length, []).append(made)
    ticks = sorted({length for found in by_length.values() for length in found})
    if len(ticks) < 2:
        return []
    figure, (accepted, speed) = _figure(9, 4.2, columns=2)
    for i, (name, found) in enumerate(by_length.items()):
        lengths = sorted(found)
        colour, style = _COLOURS[i % len(_COLOURS)], ("-", "--", ":")[i // len(_COLOURS) % 3]
        for axes, of, label in ((accepted, _acceptance, None), (speed, _speed, name)):
            points = [(length, value) for length in lengths if (value := of(found[length])) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), style, marker="o", color=colour, label=label)
    for axes, label in ((accepted, "accepted candidates, %"), (speed, "tokens per second (median)")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=[f"{length:,}" for length in ticks])
        axes.set_xlabel("tokens of the document")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return [_saved(figure, folder / "length.png")]


def _acceptance(made: Sequence[Mapping[str, Any]]) -> float | None:
    candidates = sum(one["candidates"] for one in made)
    return 100 * sum(one["accepted"] for one in made) / candidates if candidates else None


def _speed(made: Sequence[Mapping[str, Any]]) -> float | None:
    speeds = [one["tokens_per_second"] for one in made if one["tokens_per_second"]]
    return median(speeds) if speeds else None


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (several: a list), drawn without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    every = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every if columns > 1 else every[0]


def _accuracy_against_latency(systems: Sequence[SystemSummary]) -> Any:
    figure, axes = _figure(7, 4.5)
    for i, one in enumerate(systems):
        low, high = one.interval
        right, seconds = one.accuracy * 100, one.seconds["p50"]
        reach = [[max(0.0, right - low * 100)], [max(0.0, high * 100 - right)]]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.errorbar(seconds, right, yerr=reach, fmt="o", capsize=3, color=colour, label=one.system)
    axes.set_xlabel("seconds per question (median)")
    axes.set_ylabel("right answers, % (95 % interval)")
    if max(one.seconds["p50"] for one in systems) > 10 * max(min(one.seconds["p50"] for one in systems), 1e-6):
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def _stages(systems: Sequence[SystemSummary]) -> Any:
    figure, axes = _figure(7, 1.6 + 0.45 * len(systems))
    names = list(dict.fromkeys(name for one in systems for name in one.stages))
    labels = [one.system for one in systems]
    left = [0.0] * len(systems)
    for i, name in enumerate(names):
        values = [one.stages[name]["mean"] if name in one.stages else 0.0 for one in systems]
        axes.barh(labels, values, left=left, color=_COLOURS[i % len(_COLOURS)], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds per question (mean; stages may overlap)")
    if names:
        figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize="small")
    return figure


def _saved(figure: Any, file: Path) -> Path:
    with replacing(file) as part:
        figure.savefig(part, format="png")
    return file
