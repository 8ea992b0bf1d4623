"""What every system over passages has: its protocol, and how it makes an answer out of drafts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from specrag.errors import InvalidInputError, kind_of
from specrag.schema import DraftFailure, Event, Passage, SpeculativeAnswer, Usage, Verdict
from specrag.speculative._asked import Asked
from specrag.speculative.pipeline import SpeculativeRAG


@runtime_checkable
class System(Protocol):
    """Anything that answers a question from passages as ``SpeculativeRAG`` does, with the same result."""

    def answer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """The answer to ``question``; see ``SpeculativeRAG.answer``."""

    async def aanswer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """``answer``, awaited."""

    def stream(self, question: str, passages: Iterable[Any]) -> Iterator[Event]:
        """What happens, as it happens; the last event is the answer."""

    def astream(self, question: str, passages: Iterable[Any]) -> AsyncIterator[Event]:
        """``stream``, awaited."""


def ready_system(given: Any, others: Collection[str]) -> System:
    """``given`` as a system that an adapter asks in place of building one.

    Args:
        given: What the user gave.
        others: The names of further settings that the user gave, which a ready system has no use for.

    Raises:
        InvalidInputError: It is no system, or there are further settings.
    """
    if not isinstance(given, System):
        raise InvalidInputError(
            "system must have answer, aanswer, stream and astream, as SpeculativeRAG and the systems of "
            f"specrag.baselines have; got {kind_of(given)}"
        )
    if others:
        raise InvalidInputError(f"system is ready: give {', '.join(sorted(others))} where you make it")
    return given


def begins_without_perspectives(system: System) -> bool:
    """Whether the first stage of ``system`` is another than the choice of perspectives, for ``WorkTracker``."""
    return not isinstance(system, SpeculativeRAG) or bool(system.roles.readers)


def answer_of(
    asked: Asked,
    verdicts: Sequence[Verdict],
    *,
    reason: str | None = None,
    passages: Sequence[Passage] | None = None,
    read: Sequence[int] | None = None,
    drafter_usage: Usage = Usage(),
    verifier_usage: Usage = Usage(),
    notes: Iterable[str] = (),
    critiques: Sequence[Mapping[str, Any]] = (),
    failures: Sequence[DraftFailure] = (),
) -> SpeculativeAnswer:
    """The answer whose draft is the first of ``verdicts``, or an abstention.

    Args:
        asked: The question.
        verdicts: Best first.
        reason: Why the system abstains; by default it does where the first draft does, or where there is none.
        passages: The citations; by default those of the first draft.
        read: Their positions in the caller's list, where they are not the first draft's own.
        drafter_usage, verifier_usage: Tokens of who writes and of who judges.
        notes: What was not done as asked, besides what ``asked`` knows.
        critiques: What was judged.
        failures: Drafts that were lost.
    """
    best = verdicts[0].draft if verdicts else None
    if reason is None and (best is None or best.abstained):
        reason = "no draft was made" if best is None else "the model says that the passages do not answer"
    abstained = reason is not None
    answer = replace(
        asked.without_passages(),
        rationale=best.rationale if best else "",
        reason=reason,
        verdicts=tuple(verdicts),
        failures=tuple(failures),
        drafter_usage=drafter_usage,
        verifier_usage=verifier_usage,
        notes=tuple(dict.fromkeys((*asked.notes, *notes))),
        critiques=tuple(critiques),
    )
    if abstained or best is None:
        return answer
    cited = best.passages if passages is None else tuple(passages)
    return replace(answer, text=best.text, abstained=False, passages=cited, read=None if read is None else tuple(read))
