"""What a run says: a figure with its interval for each system, and which differences are more than noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from specrag._files import write_text
from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import (
    abstention_rate,
    draft_coverage,
    percentiles,
    selective_accuracy,
    selective_area,
    verifier_efficiency,
)
from specrag.evaluation.runs import AnswerRow, Run
from specrag.evaluation.statistics import Comparison, compare, wilson_interval

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True)
class SystemSummary:
    """The figures of one system over the questions that it was asked. ``None``: not to be measured here.

    Attributes:
        system: Its name.
        questions: How many it was asked.
        errors: How many of them failed; they count as wrong.
        accuracy: The share of right answers.
        interval: The 95 % Wilson interval of ``accuracy``. Differences have a paired interval: see ``comparisons``.
        metrics: The means of the further measures ("exact_match", "f1", ...).
        abstained: The share that was not answered.
        selective_accuracy: The share of right answers among those given.
        selective_area: The mean accuracy over all coverages, by confidence, or by the score of the chosen draft where
            there is no confidence.
        draft_coverage: The share of questions with a right draft: what a perfect choice would reach.
        verifier_efficiency: The share of these that the choice gets right.
        seconds: "p50" and "p95" of an answer's time.
        stages: The same of each stage, over the questions that have it, with the mean over all ("mean").
        tokens: By role, the mean of the tokens read ("prompt") and written ("completion") per question.
        rapid: Means of what a system over a long context reports ("acceptance", "tokens_per_second", ...).
    """

    system: str
    questions: int
    errors: int
    accuracy: float
    interval: tuple[float, float]
    metrics: Mapping[str, float]
    abstained: float
    selective_accuracy: float | None
    selective_area: float | None
    draft_coverage: float | None
    verifier_efficiency: float | None
    seconds: Mapping[str, float]
    stages: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, Mapping[str, float]]
    rapid: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    Attributes:
        systems: In the order of the run.
        comparisons: Each pair of systems, on the questions that both were asked.
    """

    systems: tuple[SystemSummary, ...]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        systems = [asdict(system) for system in self.systems]
        pairs = [asdict(pair) | {"noise": pair.noise, "text": str(pair)} for pair in self.comparisons]
        return json.dumps({"systems": systems, "comparisons": pairs}, ensure_ascii=False, indent=2) + "\n"

    def save(self, folder: Path) -> Path:
        """Write ``summary.json`` into the folder of the run."""
        write_text(folder / SUMMARY_FILE, self.to_json())
        return folder / SUMMARY_FILE


def summarize(run: Run, *, samples: int = 10_000) -> Summary:
    """The figures of ``run``, which may be unfinished.

    Args:
        run: With at least one answer.
        samples: Resampled data sets of the bootstrap in the comparisons.

    Raises:
        InvalidInputError: The run has no answer yet.
    """
    rows = {name: run.of_system(name) for name in run.info.systems}
    rows = {name: answered for name, answered in rows.items() if answered}
    if not rows:
        raise InvalidInputError(f"the run in {run.folder} has no answer yet")
    order = [question.id for question in run.questions]
    systems = tuple(_figures(name, [answered[i] for i in order if i in answered]) for name, answered in rows.items())
    comparisons = []
    for first, second in combinations(rows, 2):
        shared = [i for i in order if i in rows[first] and i in rows[second]]
        if shared:
            one, other = ([float(rows[name][i].right) for i in shared] for name in (first, second))
            comparisons.append(compare(one, other, (first, second), samples=samples))
    return Summary(systems, tuple(comparisons))


def _figures(name: str, rows: Sequence[AnswerRow]) -> SystemSummary:
    right = [row.right for row in rows]
    answered = [not row.abstained and row.error is None for row in rows]
    drafts = _drafts_right(rows)
    sure = _confidence(rows)
    return SystemSummary(
        system=name,
        questions=len(rows),
        errors=sum(row.error is not None for row in rows),
        accuracy=float(np.mean(right)),
        interval=wilson_interval(sum(right), len(right)),
        metrics=_means([row.metrics for row in rows]),
        abstained=abstention_rate([row.abstained for row in rows]),
        selective_accuracy=selective_accuracy(right, answered),
        selective_area=None if sure is None else selective_area(right, sure),
        draft_coverage=None if drafts is None else draft_coverage(drafts),
        verifier_efficiency=None if drafts is None else verifier_efficiency(right, drafts),
        seconds=dict(percentiles([row.seconds for row in rows])),
        stages=_stages(rows),
        tokens=_tokens(rows),
        rapid=_means([_numbers(row.rapid) for row in rows if row.rapid is not None]),
    )


def _drafts_right(rows: Sequence[AnswerRow]) -> list[list[bool]] | None:
    """Whether each draft of each question is right; ``None`` where no row says so."""
    known = [(row.answer or {}).get("drafts", []) for row in rows]
    if not any("right" in draft for drafts in known for draft in drafts):
        return None
    return [[bool(draft.get("right")) for draft in drafts] for drafts in known]


def _confidence(rows: Sequence[AnswerRow]) -> list[float] | None:
    """How sure the system is of each answer: its confidence, or the chosen draft's score. ``None``: it never says."""
    given = [row for row in rows if not row.abstained and row.error is None]
    for measure in (lambda row: row.confidence, _score):
        values = {row.id: value for row in given if (value := measure(row)) is not None}
        if values and len(values) == len(given):
            return [values.get(row.id, -math.inf) for row in rows]
    return None


def _score(row: AnswerRow) -> float | None:
    answer = row.answer or {}
    if answer.get("escalated") or not answer.get("drafts"):
        return None
    return answer["drafts"][0].get("score")


def _stages(rows: Sequence[AnswerRow]) -> dict[str, Mapping[str, float]]:
    names = dict.fromkeys(name for row in rows for name in row.timings)
    found = {name: [row.timings[name] for row in rows if name in row.timings] for name in names}
    return {name: {**percentiles(values), "mean": sum(values) / len(rows)} for name, values in found.items()}


def _tokens(rows: Sequence[AnswerRow]) -> dict[str, Mapping[str, float]]:
    roles = dict.fromkeys(role for row in rows for role in row.usage)
    used = {role: [row.usage[role] for row in rows if role in row.usage] for role in roles}
    return {
        role: {
            "prompt": sum(one.prompt_tokens for one in values) / len(rows),
            "completion": sum(one.completion_tokens for one in values) / len(rows),
        }
        for role, values in used.items()
    }


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name, over the mappings that have it."""
    names = dict.fromkeys(name for one in values for name in one)
    found = {name: [one[name] for one in values if name in one] for name in names}
    return {name: float(np.mean(numbers)) for name, numbers in found.items()}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
