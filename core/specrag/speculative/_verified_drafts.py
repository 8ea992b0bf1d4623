"""The middle of the pipeline: drafts arrive, and each is verified as soon as that pays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

from specrag.errors import described
from specrag.models._problems import heard_by
from specrag.schema import (
    Draft,
    DraftDone,
    DraftFailed,
    DraftFailure,
    EmbeddingSource,
    Event,
    ReadingDone,
    StageBegan,
    SubsetsChosen,
    Usage,
    Verdict,
    VerdictReady,
)
from specrag.speculative._clock import Clock
from specrag.speculative._pooled_drafts import Announced, Drafted
from specrag.speculative._waiting import Arrivals, first_of
from specrag.speculative.verification import DraftVerifier, Verification
from specrag.speculative.work import Work, current_work


class VerifiedDrafts:
    """The drafts of one question with their verdicts. ``events`` runs them; the attributes are complete after it.

    Args:
        question: Q.
        drafts: Drafts and failures as they are made, what begins, and the subsets when they are chosen.
        together: All drafts arrive at about the same time (they are one batch of one model).
        verifier: Scores them.
        clock: Stops the wait at its deadline.

    Attributes:
        verdicts: One per draft that was verified or needs no verification, in the order of arrival.
        failures: Drafts that were lost.
        errors: What the verifier raised.
        drafter_usage, verifier_usage: Tokens so far.
        notes: What was not done as asked, each once.
        timed_out: The deadline passed before every draft was verified or lost.
        unverified: Drafts that were made and not verified, because the deadline passed or the verifier failed.
        subsets, embedding_source: Of the drafts that language models write.
    """

    def __init__(
        self,
        question: str,
        drafts: AsyncIterator[Drafted],
        *,
        together: bool,
        verifier: DraftVerifier,
        clock: Clock,
    ) -> None:
        self.verdicts: list[Verdict] = []
        self.failures: list[DraftFailure] = []
        self.errors: list[Exception] = []
        self.drafter_usage, self.verifier_usage = Usage(), Usage()
        self.notes: list[str] = []
        self.timed_out = False
        self.unverified: list[Draft] = []
        self._problems: dict[Work | None, str] = {}  # the last one of work that is under way
        self._reading: str | None = None  # the reader that reads
        self._chosen = False  # the subsets
        self._arrived: set[int] = set()
        self.subsets: tuple[tuple[int, ...], ...] = ()
        self.embedding_source: EmbeddingSource = "none"
        self._written = 0  # drafts of the subsets that arrived or failed
        self._question, self._drafts, self._together = question, drafts, together
        self._verifier, self._clock = verifier, clock
        self._waiting: list[Draft] = []
        self._verifying: dict[asyncio.Task[Verification], list[Draft]] = {}

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, as it happens, until every draft is verified or lost or the deadline passes."""
        self._clock.begin("draft")
        with heard_by(self._hear):
            arrivals = Arrivals(self._drafts, lambda arrival: isinstance(arrival, Announced))
        try:
            while not arrivals.closed or self._waiting or self._verifying:
                in_time = await first_of({*arrivals.pending(), *self._verifying}, self._clock.left)
                for arrival in arrivals.take():
                    for event in self._take_draft(arrival):
                        yield event
                for task in [task for task in self._verifying if task.done()]:
                    for event in self._take_verdicts(task):
                        yield event
                if not in_time:
                    self.timed_out = True
                    for event in self._give_up():
                        yield event
                    return
                for batch in self._batches(all_arrived=arrivals.closed):
                    self._start_verifying(batch)
        finally:
            for task in self._verifying:
                task.cancel()
            await arrivals.close()

    def _hear(self, problem: str) -> None:
        self._problems[current_work.get()] = problem

    def _give_up(self) -> Iterator[Event]:
        """What is not done is kept as it is. It fails where something went wrong; what was only slow does not."""
        late = [*self._waiting, *(draft for batch in self._verifying.values() for draft in batch)]
        self.unverified += late
        for draft in late:
            problem = self._problems.get(Work("verify", draft.index))
            if problem is not None:
                reason = f"not verified by the deadline; the verifier's last problem: {problem}"
                yield self._lose(DraftFailure(draft.index, draft.subset, reason))
        for index, subset in enumerate(self.subsets):
            problem = self._problems.get(Work("draft", index), self._problems.get(None))
            if index not in self._arrived and problem is not None:
                reason = f"not drafted by the deadline; the drafter's last problem: {problem}"
                yield self._lose(DraftFailure(index, subset, reason))

    def interrupted(self) -> str:
        """What the deadline came before, in words that follow "the deadline passed"."""
        if self._chosen:
            unverified = len(self._waiting) + sum(map(len, self._verifying.values()))
            return f"with {len(self.subsets) - self._written + unverified} drafts open"
        if self._reading is not None:
            return f"while {self._reading} read the passages"
        problem = self._problems.get(None)
        because = f"; the embedder's last problem: {problem}" if problem else ""
        return f"before the drafts' passages were chosen: the passages were being embedded{because}"

    def _take_draft(self, arrival: Drafted) -> Iterator[Event]:
        if isinstance(arrival, StageBegan | ReadingDone):
            self._reading = arrival.model if isinstance(arrival, StageBegan) else None
            yield arrival
            return
        if isinstance(arrival, SubsetsChosen):
            self._chosen = True
            self.subsets, self.embedding_source = arrival.subsets, arrival.embedding_source
            yield arrival
            return
        self._clock.mark("draft")
        self._written += arrival.index < len(self.subsets)
        self._arrived.add(arrival.index)
        if isinstance(arrival, DraftFailure):
            yield self._lose(arrival)
            return
        self.drafter_usage += arrival.usage
        self._note(arrival.notes)
        if self._verifier.needed_for(arrival):
            self._waiting.append(arrival)
            yield DraftDone(arrival)
        else:
            yield DraftDone(arrival)
            yield self._keep(self._verifier.verdict(arrival))

    def _take_verdicts(self, task: asyncio.Task[Verification]) -> Iterator[Event]:
        drafts = self._verifying.pop(task)
        self._clock.mark("verify")
        if (error := task.exception()) is not None:
            if not isinstance(error, Exception):
                raise error
            self.errors.append(error)
            self.unverified += drafts
            reason = f"verifier: {described(error)}"
            for draft in drafts:
                yield self._lose(DraftFailure(draft.index, draft.subset, reason))
            return
        verification = task.result()
        self.verifier_usage += verification.usage
        self._note(verification.notes)
        for outcome in verification.outcomes:
            yield self._lose(outcome) if isinstance(outcome, DraftFailure) else self._keep(outcome)

    def _batches(self, *, all_arrived: bool) -> list[list[Draft]]:
        """What to verify now: each draft by itself on a server, all that wait in one pass in this process."""
        if not self._waiting:
            return []
        if not self._verifier.batched:
            return [[draft] for draft in self._waiting]
        together = self._together or self._verifier.waits_for_all
        if self._verifying or (together and not all_arrived):
            return []  # the other drafts are about to arrive, and one pass for all costs less than two
        return [list(self._waiting)]

    def _start_verifying(self, batch: Sequence[Draft]) -> None:
        self._clock.begin("verify")
        with heard_by(self._hear):
            task = asyncio.create_task(self._verifier.verify(self._question, batch))
        self._verifying[task] = list(batch)
        self._waiting = [draft for draft in self._waiting if draft not in batch]

    def by_their_own_scores(self) -> list[Verdict]:
        """Verdicts of the unverified drafts, with the scores that their drafters give."""
        return [self._verifier.verdict(draft) for draft in self.unverified]

    def _keep(self, verdict: Verdict) -> VerdictReady:
        self.verdicts.append(verdict)
        return VerdictReady(verdict)

    def _lose(self, failure: DraftFailure) -> DraftFailed:
        self.failures.append(failure)
        return DraftFailed(failure)

    def _note(self, notes: Sequence[str]) -> None:
        self.notes += [note for note in notes if note not in self.notes]
