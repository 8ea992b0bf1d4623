"""The page of a run: every system's figures, and every question with what each system answered and how.

``write_page`` writes it into the run's folder. It is one file that loads nothing from anywhere; see ``specrag._page``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specrag import _page
from specrag._files import write_text
from specrag._page.examples import passage, row
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, Run
from specrag.evaluation.summary import Summary, SystemSummary, summarize
from specrag.text import normalize_answer

PAGE_FILE = "page.html"


def write_page(folder: str | Path, summary: Summary | None = None) -> Path:
    """Write the page of the run in ``folder``, whole or unfinished, beside its rows. Returns the file.

    Args:
        folder: Where the run lies.
        summary: What ``summarize`` made of this run; made anew when it is not given.

    Raises:
        NotFoundError: No run is there.
        InvalidInputError: A file of the run is damaged.
        SpecRAGError: The page cannot be written. An older one stays.
    """
    run = Run.load(folder)
    file = run.folder / PAGE_FILE
    write_text(file, run_page(run, summary))
    return file


def run_page(run: Run, summary: Summary | None = None) -> str:
    """The text of the page of ``run``; the arguments are as in ``write_page``."""
    if summary is None and run.answers:
        summary = summarize(run)
    systems = _systems(run)
    by_system = {name: run.of_system(name) for name in systems}
    examples = [
        _example(question, [rows[question.id] for rows in by_system.values() if question.id in rows])
        for question in run.questions
    ]
    data = {"systems": systems, "scores": _page.SCORES, "examples": examples}
    source = str(run.info.data.get("source") or run.folder.name)
    return _page.write(
        data,
        title=Path(source).stem or source,
        kicker="specrag: evaluation",
        facts=list(_facts(run, by_system)),
        summary=None if summary is None else _table(summary),
    )


def _systems(run: Run) -> list[str]:
    """The names of the systems, in the order of the run; one that only the rows know comes last."""
    return list(dict.fromkeys([*run.info.systems, *(answer.system for answer in run.answers)]))


# --- the head -------------------------------------------------------------------------------------------


def _facts(run: Run, by_system: Mapping[str, Mapping[str, AnswerRow]]) -> Iterator[tuple[str, str]]:
    yield "data", str(run.info.data.get("source") or "not stated")
    yield "questions", f"{len(run.questions):,}"
    yield "systems", str(len(by_system))
    for name, value in run.info.settings.items():
        yield name.replace("_", " "), str(value)
    if run.info.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in run.info.versions.items())
    missing = sum(len(run.questions) - len(rows) for rows in by_system.values())
    if missing:
        yield "unfinished", f"{missing:,} of {len(run.questions) * len(by_system):,} answers are not there yet"


def _table(summary: Summary) -> _page.Table:
    """A line per system with what is known of it, and the comparisons of each two."""
    roles = dict.fromkeys(role for one in summary.systems for role in one.tokens)
    measured = dict.fromkeys(name for one in summary.systems for name in one.metrics)
    decoded = dict.fromkeys(name for one in summary.systems for name in one.rapid)
    cells: dict[str, Callable[[SystemSummary], str]] = {
        "system": lambda one: one.system,
        "right": lambda one: _share(one.accuracy),
        "95% interval": lambda one: " to ".join(map(_share, one.interval)),
        "questions": lambda one: f"{one.questions:,}",
        "failed": lambda one: f"{one.errors:,}" if one.errors else "–",
        "abstained": lambda one: _share(one.abstained),
        "seconds p50": lambda one: f"{one.seconds['p50']:,.2f}",
        "seconds p95": lambda one: f"{one.seconds['p95']:,.2f}",
        **{name.replace("_", " "): _getter("metrics", name, "{:.3f}") for name in measured},
        "right of answered": lambda one: _share(one.selective_accuracy),
        "draft coverage": lambda one: _share(one.draft_coverage),
        "verifier efficiency": lambda one: _share(one.verifier_efficiency),
        **{name.replace("_", " "): _getter("rapid", name, "{:.3g}") for name in decoded},
        **{f"{role} tokens": _tokens(role) for role in roles},
    }
    columns = {head: [cell(one) for one in summary.systems] for head, cell in cells.items()}
    columns = {head: texts for head, texts in columns.items() if set(texts) != {"–"}}
    return _page.Table(
        list(columns), list(zip(*columns.values(), strict=True)), notes=[str(pair) for pair in summary.comparisons]
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _getter(part: str, name: str, form: str) -> Callable[[SystemSummary], str]:
    def cell(one: SystemSummary) -> str:
        known = getattr(one, part)
        return form.format(known[name]) if name in known else "–"

    return cell


def _tokens(role: str) -> Callable[[SystemSummary], str]:
    """Tokens read and written per question."""

    def cell(one: SystemSummary) -> str:
        used = one.tokens.get(role)
        return "–" if used is None else f"{used['prompt']:,.0f} + {used['completion']:,.0f}"

    return cell


# --- the examples ---------------------------------------------------------------------------------------


def _example(question: Question, answers: Sequence[AnswerRow]) -> dict[str, Any]:
    gold = list(question.answers) or [question.choices[at] for at in question.correct]
    rows = [_row(answer) for answer in answers]
    rights = {answer.right for answer in answers}
    made: dict[str, Any] = {
        "id": question.id,
        "question": question.question,
        "gold": gold,
        "unanswerable": question.unanswerable,
        "passages": [
            passage(
                at,
                {"title": given.title, "text": given.text, "score": given.score},
                gold=at in question.gold,
            )
            for at, given in enumerate(question.passages)
        ],
        "flags": (["disagree"] if len(rights) == 2 else []) + (["nobody"] if rights == {False} else []),
        "rows": rows,
    }
    if question.choices:
        made["choices"] = list(question.choices)
    if question.turns:
        made["turns"] = [[turn.question, turn.reply] for turn in question.turns]
    if question.context:
        made["document"] = len(question.context)
    return made


def _row(answer: AnswerRow) -> dict[str, Any]:
    if answer.error is not None:
        outcome = "failed"
    elif answer.abstained:
        outcome = "abstained_rightly" if answer.right else "abstained"
    else:
        outcome = "right" if answer.right else "wrong"
    shown = row(answer.to_row(), outcome)
    shown["flags"] = list(_flags(outcome, shown["drafts"]))
    return shown


def _flags(outcome: str, drafts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is worth a look: the filters of the page by their names in `table.js`.

    "rescued": more drafts have one wrong answer than any other answer, and a right one was chosen.
    "missed": an answer was given and is wrong, and a draft is right.
    "silent": the system abstained although there is an answer.
    """
    if outcome == "abstained":
        yield "silent"
    if outcome == "wrong" and any(draft["right"] for draft in drafts):
        yield "missed"
    votes: Counter[str] = Counter()
    rights = {}
    for draft in drafts:
        if draft["right"] is not None:
            said = normalize_answer(draft["answer"])
            votes[said] += 1 + len(draft["same"])
            rights[said] = draft["right"]
    ahead = votes.most_common(2)
    if outcome == "right" and ahead and not rights[ahead[0][0]] and (len(ahead) == 1 or ahead[0][1] > ahead[1][1]):
        yield "rescued"
