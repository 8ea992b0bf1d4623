"""RAPID over uploaded files: sessions per key, and replies piece by piece.

``RapidReplies`` is what the routes ask. ``RapidSessions`` replies in this process; on Ray, workers do (``remote``).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

from specrag._abandoned import in_thread, stop_if_abandoned
from specrag.rapid import RapidGenerator
from specrag.rapid.chat import RapidChat
from specrag.rapid.decoding import RapidStats
from specrag.serving.asked import Asked
from specrag.serving.keys import Owner
from specrag.serving.metrics import Metrics
from specrag.serving.replies import Finished, Reply, Text, Told


class RapidReplies(ABC):
    """Who replies to the questions about long documents."""

    @abstractmethod
    def reply(self, asked: Asked, documents: Sequence[str], most: int) -> Reply:
        """The reply, piece by piece.

        Args:
            documents: The texts of the files that the request names.
            most: Tokens, where the request names no number.

        Raises:
            SpecRAGError: See ``RapidChat.stream``.
        """

    @abstractmethod
    async def forget(self, owner: Owner) -> None:
        """Forget what was read for ``owner``: a file of theirs is deleted."""


@dataclass
class RapidSessions(RapidReplies):
    """The sessions of all keys. No key uses what was read for another one, even where the documents are equal.

    Args:
        rapid: Models and settings.
        most: Sessions that are kept, of all keys together.
        most_bytes: Memory of the sessions of one key.
    """

    rapid: RapidGenerator
    most: int
    most_bytes: int
    _chats: OrderedDict[Owner, RapidChat] = field(default_factory=OrderedDict, init=False)  # latest last

    def of(self, owner: Owner) -> RapidChat:
        """The sessions of ``owner``. Those of the keys that were not used for longest make room."""
        if owner not in self._chats:
            self._chats[owner] = RapidChat(self.rapid, self.most, self.most_bytes)
        self._chats.move_to_end(owner)
        kept = sum(len(chat.sessions) for chat in self._chats.values())
        for other, chat in list(self._chats.items())[:-1]:
            if kept < self.most:
                break
            kept -= len(chat.sessions)
            chat.clear()
            if not chat.sessions:
                del self._chats[other]
        return self._chats[owner]

    @property
    def kept(self) -> dict[str, int]:
        """How many sessions are kept for each key, by its name."""
        return {owner.name: len(chat.sessions) for owner, chat in self._chats.items()}

    async def forget(self, owner: Owner) -> None:
        if owner in self._chats:
            self._chats[owner].clear()

    async def reply(self, asked: Asked, documents: Sequence[str], most: int) -> AsyncIterator[Told | Text | Finished]:
        async with aclosing(reply(self.of(asked.owner), asked, documents, most)) as items:  # type: ignore[type-var]
            async for item in items:
                yield item


async def reply(
    chat: RapidChat, asked: Asked, documents: Sequence[str], most: int
) -> AsyncIterator[Told | Text | Finished]:
    """The reply of ``chat``. Arguments and errors are those of ``RapidReplies.reply``."""
    stats, began = RapidStats(), perf_counter()
    first: float | None = None
    options = {
        "documents": documents,
        "max_tokens": asked.max_tokens or most,
        "stop": asked.stop,
        "sampling": asked.sampling(chat.settings.sampling),
        "stats": stats,
    }
    async for piece in _pieces(chat, asked, options):
        first = first or perf_counter() - began
        if piece:
            yield Text(piece)
    seconds = {
        "first_text": first or perf_counter() - began,
        "question": stats.prefill_seconds,
        "draft": stats.draft_seconds,
        "verify": stats.verify_seconds,
        "total": perf_counter() - began,
    }
    finish: Literal["stop", "length"] = "length" if stats.finish == "length" else "stop"
    yield Finished(finish, stats.prompt_tokens, stats.tokens, _details(asked, stats, seconds))


async def measured(items: Reply, metrics: Metrics) -> AsyncIterator[Told | Text | Finished]:
    """``items``; at their end ``metrics`` are told."""
    async with aclosing(items) as given:  # type: ignore[type-var]
        async for item in given:
            if isinstance(item, Finished):
                _measure(metrics, item.details)
            yield item


async def _pieces(chat: RapidChat, asked: Asked, options: dict[str, Any]) -> AsyncIterator[str]:
    """What ``RapidChat.stream`` gives, from a thread that stops soon after nobody reads this any more."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def stopped() -> bool:
        stop_if_abandoned()
        return False

    def work() -> None:
        for piece in chat.stream(asked.messages, cancelled=stopped, **options):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    task = asyncio.create_task(in_thread(work))
    task.add_done_callback(lambda _: pieces.put_nowait(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await task
    finally:
        task.cancel()


def _measure(metrics: Metrics, details: Mapping[str, Any]) -> None:
    metrics.stages("rapid", details["timings"])
    metrics.candidates.labels("accepted").inc(details["accepted"])
    metrics.candidates.labels("rejected").inc(details["candidates"] - details["accepted"])
    if details["candidates"]:
        metrics.acceptance.observe(details["acceptance"])


def _details(asked: Asked, stats: RapidStats, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "model": "rapid",
        "file_ids": list(asked.file_ids),
        "abstained": False,
        "candidates": stats.candidates,
        "accepted": stats.accepted,
        "acceptance": stats.acceptance,
        "tokens_per_second": stats.tokens_per_second,
        "timings": seconds,
        "notes": list(stats.notes),
    }
