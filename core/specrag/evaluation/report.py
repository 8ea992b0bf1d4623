"""A run's figures on the terminal (rich) and as plots (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag._extras import require
from specrag._files import replacing
from specrag.evaluation.summary import Summary, SystemSummary

if TYPE_CHECKING:
    from rich.table import Table

PLOTS = {"accuracy.png": "accuracy against latency", "stages.png": "seconds of each stage"}
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


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


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
