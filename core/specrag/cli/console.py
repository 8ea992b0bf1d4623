"""The terminal: where results, progress and failures are printed."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from specrag.errors import SpecRAGError, said

# What of a training's log is shown, and under which words.
TRAINING_LOG = {
    "loss": "loss",
    "right": "held part right",
    "wrongly_abstained": "wrongly abstained",
    "rightly_abstained": "rightly abstained",
}

out = Console()
err = Console(stderr=True)


def print_what_can_be_printed() -> None:
    """Have both streams print a "?" for what the terminal's encoding (cp1252, ASCII) lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # there is none without a terminal, and tests have their own
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def working(doing: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr, when that is a terminal; yields a function that changes its text."""
    with err.status(doing) as status:
        yield status.update


@contextlib.contextmanager
def counting(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr; yields a function of (done, total)."""
    columns = (SpinnerColumn(), TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def training_shown() -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """Show a training's progress on stderr: a bar with the time left, and above it one line for each log entry.

    Yields a function of (step, steps, log entry), as ``specrag.training.train`` calls its ``progress``.
    """
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("training", total=None)

        def report(step: int, steps: int, logged: Mapping[str, Any]) -> None:
            bar.update(task, completed=step, total=steps)
            shown = {name: value for name, value in logged.items() if name in TRAINING_LOG and value is not None}
            if shown:
                text = ", ".join(f"{TRAINING_LOG[name]} {float(value):.3g}" for name, value in shown.items())
                bar.console.print(f"step {step} of {steps}: {text}", highlight=False)

        yield report


def show_notes(notes: Iterable[str]) -> None:
    """Print what was not done as asked to stderr, one line each."""
    for note in notes:
        err.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def failures_reported(code: int = 1) -> Iterator[None]:
    """Turn an error that specrag raises on purpose, or the operating system, into a line on stderr and an exit code."""
    try:
        yield
    except (SpecRAGError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # who read the output has gone: typer ends in silence
            raise
        err.print(f"[red]error:[/] {escape(_said(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(code) from error


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, SpecRAGError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return said(error)
