"""How an answer is made and shown: progress while it is made, then a panel, its sources and the table of drafts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from specrag._page import SCORES
from specrag.cli.console import out, show_notes, working

if TYPE_CHECKING:
    from specrag.schema import Passage, SpeculativeAnswer, Verdict
    from specrag.speculative.pipeline import SpeculativeRAG

# Characters of a passage in the list of sources: one line of a usual terminal, after the title.
EXCERPT = 110
# Written drafts always have the paper's scores in the table of drafts.
PAPERS = ("log_draft", "log_self_contain", "log_self_reflect", "log_score")


def follow(rag: SpeculativeRAG, question: str, passages: Sequence[Passage]) -> SpeculativeAnswer:
    """Answer the question while a line on stderr shows the stages."""
    from specrag.schema import AnswerReady, DraftDone, DraftFailed, ReadingDone, StageBegan, SubsetsChosen, VerdictReady

    drafted = verified = total = 0
    answer = None
    with working("retrieving perspectives") as update:
        for event in rag.stream(question, passages):
            if isinstance(event, StageBegan):
                update({"read": "reading", "escalate": f"{event.model} answers itself"}.get(event.stage, event.stage))
                continue
            if isinstance(event, SubsetsChosen):
                total += len(event.subsets)
            elif isinstance(event, ReadingDone):
                total += event.drafts
            elif isinstance(event, DraftDone | DraftFailed):
                drafted += 1
            elif isinstance(event, VerdictReady):
                verified += 1
            elif isinstance(event, AnswerReady):
                answer = event.answer
            update(f"drafted {drafted} of {total}, verified {verified}")
    assert answer is not None  # a stream ends with its answer or raises
    return answer


def show_json(answer: SpeculativeAnswer) -> None:
    """Print the whole result as JSON, for a program."""
    made = answer.to_dict()
    text = json.dumps(made, ensure_ascii=False, indent=2) + "\n"
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:  # JSON has its own way to write what the terminal lacks
        text = json.dumps(made, indent=2) + "\n"
    sys.stdout.write(text)


def show(answer: SpeculativeAnswer, *, explain: bool) -> None:
    """Print the answer, its passages and its timings; with ``explain`` all drafts and their scores too."""
    out.print(_panel(answer))
    for passage in answer.passages:
        name = passage.title or passage.id or "passage"
        more = "…" if len(passage.text) > EXCERPT else ""
        out.print(f"  [cyan]{escape(name)}[/] {escape(passage.text[:EXCERPT])}{more}")
    if explain:
        out.print(_table(answer))
    t = answer.timings
    out.print(
        f"[dim]embed {t.embed:.2f} s, cluster {t.cluster:.3f} s, draft {t.draft:.2f} s, verify {t.verify:.2f} s, "
        + (f"escalate {t.escalate:.2f} s, " if t.escalate else "")
        + f"total {t.total:.2f} s[/]"
    )
    show_notes(answer.notes)


def _panel(answer: SpeculativeAnswer) -> Panel:
    if answer.abstained:
        shown = f"[yellow]no answer:[/] {escape(answer.reason or '')}"
    else:
        shown = f"[bold]{escape(answer.text)}[/]"
        if answer.rationale:
            shown += f"\n[dim]{escape(answer.rationale)}[/]"
    if answer.escalated:
        shown += f"\n[dim]the verifier answered itself, from passages {_numbers(answer.read or ())}[/]"
    if answer.confidence is not None:
        of = "of the best draft" if answer.escalated or answer.abstained else "of this answer"
        shown += f"\n[dim]confidence {of}: {answer.confidence:.2f}[/]"
    return Panel(shown, title=escape(answer.question), title_align="left")


def _table(answer: SpeculativeAnswer) -> Table:
    """One row for each draft, the best first and in green when it is the answer; failed drafts last, in red."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("draft", "passages"):
        table.add_column(name, overflow="fold")
    scores = _scores_shown(answer.verdicts)
    for name in scores.values():
        table.add_column(name, justify="right", no_wrap=True)
    for rank, verdict in enumerate(answer.verdicts):
        table.add_row(*_row(verdict, scores, chosen=rank == 0 and not answer.abstained and not answer.escalated))
    for failure in answer.failures:
        table.add_row(f"[red]{escape(failure.error)}[/]", _numbers(failure.subset))
    return table


def _scores_shown(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """The columns of the table, as field of a verdict -> heading: the paper's, unless every draft was copied.

    Where drafters judge their own drafts, nobody makes the verifier's scores.
    """
    written = not verdicts or any(not verdict.draft.places for verdict in verdicts)
    written = written and all(verdict.log_verdict is None for verdict in verdicts)
    named = {name: head for name, head in SCORES.items() if any(getattr(v, name) is not None for v in verdicts)}
    return {name: head for name, head in SCORES.items() if name in named or (written and name in PAPERS)}


def _row(verdict: Verdict, scores: Mapping[str, str], *, chosen: bool) -> tuple[str, ...]:
    text = escape(verdict.draft.text)
    if verdict.draft.abstained:
        text = f"[dim]{text}[/]"
    if chosen:
        text = f"[green]{text}[/]"
    values = [getattr(verdict, name) for name in scores]
    return (text, _numbers(verdict.draft.subset), *("–" if value is None else f"{value:.2f}" for value in values))


def _numbers(subset: Sequence[int]) -> str:
    """The passages of a subset, counted from 1."""
    return ", ".join(str(index + 1) for index in subset)
