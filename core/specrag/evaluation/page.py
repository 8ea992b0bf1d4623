"""The page of a run: every system's figures, and every question with what each system answered and how.

``write_page`` writes it into the run's folder. It is one file that loads nothing from anywhere; see ``specrag._page``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specrag import _page
from specrag._files import write_text
from specrag._page.examples import passage, row
from specrag.evaluation.metrics import percentiles
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, Run
from specrag.evaluation.statistics import compare, wilson_interval
from specrag.text import normalize_answer

PAGE_FILE = "page.html"


def write_page(folder: str | Path) -> Path:
    """Write the page of the run in ``folder``, whole or unfinished, beside its rows. Returns the file.

    Raises:
        NotFoundError: No run is there.
        InvalidInputError: A file of the run is damaged.
        SpecRAGError: The page cannot be written. An older one stays.
    """
    run = Run.load(folder)
    file = run.folder / PAGE_FILE
    write_text(file, run_page(run))
    return file


def run_page(run: Run) -> str:
    """The text of the page of ``run``."""
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
        summary=_summary(run, by_system),
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


def _summary(run: Run, by_system: Mapping[str, Mapping[str, AnswerRow]]) -> _page.Summary:
    """A line per system: how often it is right, what it costs. Below: each system compared with the first one."""
    measured = sorted({name for answer in run.answers for name in answer.metrics})
    columns = ["system", "right", "95% interval", "of", *(name.replace("_", " ") for name in measured)]
    columns += ["abstained", "failed", "seconds p50", "seconds p95", "tokens read", "tokens written"]
    rows = [_line(name, list(answers.values()), measured) for name, answers in by_system.items()]
    return _page.Summary(columns, rows, notes=list(_comparisons(run, by_system)))


def _line(name: str, answers: Sequence[AnswerRow], measured: Sequence[str]) -> list[str]:
    count = len(answers)
    if not count:
        return [name, "–", "–", "0", *("–" for _ in measured), *("–" for _ in range(6))]
    right = sum(answer.right for answer in answers)
    low, high = wilson_interval(right, count)
    made = [answer for answer in answers if answer.error is None]
    times: Mapping[str, float] = percentiles([answer.seconds for answer in made]) if made else {}
    tokens = [
        sum(getattr(used, kind) for answer in made for used in answer.usage.values())
        for kind in ("prompt_tokens", "completion_tokens")
    ]
    return [
        name,
        f"{right / count:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{count:,}",
        *(_mean([answer.metrics.get(metric) for answer in answers]) for metric in measured),
        f"{sum(answer.abstained for answer in answers) / count:.1%}",
        f"{count - len(made):,}",
        *(f"{value:.2f}" if value < 100 else f"{value:,.0f}" for value in times.values()),
        *(() if times else ("–", "–")),
        *(f"{total / len(made):,.0f}" if made and total else "–" for total in tokens),
    ]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "–"


def _comparisons(run: Run, by_system: Mapping[str, Mapping[str, AnswerRow]]) -> Iterator[str]:
    """Each later system against the first, on the questions that both have answered."""
    first, *others = by_system or ("",)
    for name in others:
        both = [q.id for q in run.questions if q.id in by_system[first] and q.id in by_system[name]]
        if both:
            mine, theirs = ([float(by_system[system][q].right) for q in both] for system in (name, first))
            yield str(compare(mine, theirs, (name, first)))


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
