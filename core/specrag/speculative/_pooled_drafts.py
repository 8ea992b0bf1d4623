"""Drafts of several drafters: readers first, then language models where they are needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from specrag.errors import described
from specrag.models.base import Reader
from specrag.schema import Draft, DraftFailure, Passage, ReadingDone, StageBegan, SubsetsChosen
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.reading import SpanDrafter
from specrag.speculative.routing import Routing
from specrag.speculative.work import Work, working_on

Announced = StageBegan | ReadingDone | SubsetsChosen
Drafted = Draft | DraftFailure | Announced


@dataclass(frozen=True)
class PooledDrafts:
    """The drafts of one question.

    Args:
        question: Q.
        passages: By their position in the caller's list.
        readers: They read all passages at once.
        writers: Language models; each drafts every subset.
        drafts: How many drafts of each reader, at most; and how many subsets.
        routing: When the writers are asked where there are readers; ``None``: always.
        perspectives: Makes the subsets; called only when the writers are asked.
    """

    question: str
    passages: dict[int, Passage]
    readers: Sequence[Reader]
    writers: Sequence[Drafter]
    drafts: int
    routing: Routing | None
    perspectives: Callable[[], Awaitable[SubsetsChosen]]

    async def arrivals(self) -> AsyncGenerator[Drafted, None]:
        """Drafts and failures as they are made, what begins, and the subsets when they are chosen."""
        copied: list[Draft] = []
        after = self.drafts * len(self.writers)  # written drafts have the first indexes
        skipped = bool(self.writers) and self.routing is not None and self.routing.skips(self.question)
        readers = () if skipped else self.readers
        for number, reader in enumerate(readers):
            first = after + number * self.drafts
            yield StageBegan("read", first, reader.name)
            try:
                with working_on(Work("read", first)):
                    made = await SpanDrafter(reader, self.drafts).read(self.question, self.passages, first_index=first)
            except Exception as error:  # a failing reader costs its drafts, whatever it raises
                yield DraftFailure(first, (), f"{reader.name}: {described(error)}")
                continue
            yield ReadingDone(first, reader.name, len(made), made[0].log_no_answer if made else None)
            for draft in made:
                yield draft
            copied += made
        asked = not readers or self.routing is None or self.routing.asks(self.question, copied)
        if not self.writers or not asked:
            yield SubsetsChosen((), "none")
            return
        if self.readers:
            yield StageBegan("perspectives")
        chosen = await self.perspectives()
        yield SubsetsChosen(chosen.subsets * len(self.writers), chosen.embedding_source)
        async with aclosing(self._written(chosen.subsets)) as written:
            async for arrival in written:
                yield arrival

    async def _written(self, subsets: Sequence[tuple[int, ...]]) -> AsyncGenerator[Draft | DraftFailure, None]:
        """What the writers make, side by side."""
        queue: asyncio.Queue[Draft | DraftFailure | BaseException | None] = asyncio.Queue()

        async def run(writer: Drafter, first: int) -> None:
            assignments = [
                Assignment(first + j, subset, tuple(self.passages[i] for i in subset))
                for j, subset in enumerate(subsets)
            ]
            try:
                async for draft in writer.drafts(self.question, assignments):
                    queue.put_nowait(draft)
            except BaseException as error:
                queue.put_nowait(error)
                raise
            finally:
                queue.put_nowait(None)

        tasks = [asyncio.create_task(run(w, n * len(subsets))) for n, w in enumerate(self.writers)]
        running = len(tasks)
        try:
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
