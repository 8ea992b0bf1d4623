"""What a replica of a model does on Ray Serve: it answers one caller at a time, or several in one batch.

Nothing here imports Ray. ``on_ray`` makes deployments of these classes; ``remote`` has the callers' side.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from specrag.errors import ModelError
from specrag.models.base import (
    Capabilities,
    Completion,
    GenerationRequest,
    LanguageModel,
    Reader,
    Reading,
    Sampling,
    Score,
    Turn,
)
from specrag.models.tokenization import ConversationEncoder
from specrag.rapid import RapidChat, RapidGenerator
from specrag.serving.asked import Asked
from specrag.serving.keys import Owner
from specrag.serving.rapid import reply
from specrag.serving.replies import Finished, Text, Told

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What a caller must know of a model that runs elsewhere.

    Attributes:
        name: The model's.
        folder: Where its weights are, on the machine of the replica.
        reader: Whether it is a ``Reader``; then the rest is not set.
        capabilities, context_window: The language model's.
        encoder: Counts tokens as the model does; ``None`` where it has no tokenizer of its own.
    """

    name: str
    folder: Path | None = None
    reader: bool = False
    capabilities: Capabilities = Capabilities()
    context_window: int | None = None
    encoder: ConversationEncoder | None = None


@dataclass(frozen=True)
class Call:
    """One request to a language model.

    Args:
        request: What to write.
        sampling: How tokens are drawn.
        top_log_probs: See ``LanguageModel.generate``.
    """

    request: GenerationRequest
    sampling: Sampling
    top_log_probs: int


class ModelWorker:
    """A drafter or a verifier in the process of a replica.

    Args:
        load: Makes the model. It is called once.
    """

    def __init__(self, load: Callable[[], LanguageModel | Reader]) -> None:
        self._model = load()

    async def facts(self) -> Facts:
        """What a caller must know of the model."""
        model = self._model
        if isinstance(model, Reader):
            return Facts(model.name, reader=True)
        await model.prepare()
        encoder = getattr(model, "encoder", None)
        return Facts(
            model.name,
            model.folder,
            capabilities=model.capabilities,
            context_window=model.context_window,
            encoder=encoder if isinstance(encoder, ConversationEncoder) else None,
        )

    async def read(self, question: str, texts: Sequence[str], spans_per_passage: int) -> Reading:
        """See ``Reader.read``."""
        return await self._reader.aread(question, texts, spans_per_passage=spans_per_passage)

    async def score_spans(
        self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]
    ) -> list[float | None]:
        """See ``Reader.score``."""
        return await self._reader.ascore(question, texts, spans)

    async def generate(self, call: Call) -> Completion:
        """See ``LanguageModel.generate``."""
        return _made(await self._generate(call))

    async def score(self, turns: Sequence[Turn]) -> Score:
        """See ``LanguageModel.score``."""
        return _made(await self._score(turns))

    async def _generate(self, call: Call) -> Completion | Exception:
        return (await self.generate_together([call]))[0]

    async def _score(self, turns: Sequence[Turn]) -> Score | Exception:
        return (await self.score_together([turns]))[0]

    async def generate_together(self, calls: Sequence[Call]) -> list[Completion | Exception]:
        """A completion or an error for each call, in order. Calls that are drawn alike share a pass of the model."""
        groups: dict[Any, list[int]] = {}
        for at, call in enumerate(calls):
            # A row's place in a batch changes what its seed draws.
            seeded = call.sampling.seed is not None and not call.sampling.greedy
            groups.setdefault((call.sampling, call.top_log_probs, at if seeded else None), []).append(at)
        made: dict[int, Completion | Exception] = {}
        for (sampling, top, _), members in groups.items():
            done = await self._generated([calls[at].request for at in members], sampling, top)
            made |= zip(members, done, strict=True)
        return [made[at] for at in range(len(calls))]

    async def _generated(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, top: int
    ) -> list[Completion | Exception]:
        try:
            return [*await self._writer.agenerate(requests, sampling, top_log_probs=top)]
        except Exception as error:  # find the one that fails, and keep the others
            if len(requests) == 1:
                return [error]
            return [(await self._generated([request], sampling, top))[0] for request in requests]

    async def score_together(self, conversations: Sequence[Sequence[Turn]]) -> list[Score | Exception]:
        """A score or an error for each conversation, in order."""
        try:
            return [*await self._writer.ascore(conversations)]
        except Exception as error:
            if len(conversations) == 1:
                return [error]
            return [(await self.score_together([turns]))[0] for turns in conversations]

    @property
    def _reader(self) -> Reader:
        if not isinstance(self._model, Reader):
            raise ModelError(f"{self._model.name} is a language model: it reads no spans")
        return self._model

    @property
    def _writer(self) -> LanguageModel:
        if not isinstance(self._model, LanguageModel):
            raise ModelError(f"{self._model.name} is a reader: it writes nothing")
        return self._model


def _made(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class RapidWorker:
    """RAPID's models in the process of a replica, and the sessions that it holds.

    Args:
        load: Makes the models and their settings. It is called once.
        session_bytes: The memory that one session may take.
    """

    def __init__(self, load: Callable[[], RapidGenerator], session_bytes: int) -> None:
        self._rapid, self._bytes = load(), session_bytes
        # Who keeps them is Ray Serve, which forgets those that were not used for longest.
        self._held: weakref.WeakValueDictionary[str, RapidChat] = weakref.WeakValueDictionary()

    async def session(self, key: str) -> RapidChat:
        """The session under ``key`` (``remote.session_key``); a new one, where Ray Serve keeps none."""
        made = self._held[key] = RapidChat(self._rapid, 1, self._bytes)
        return made

    async def reply(
        self, key: str, asked: Asked, documents: Sequence[str], most: int
    ) -> AsyncIterator[Told | Text | Finished]:
        """``RapidReplies.reply``, in the session under ``key``."""
        chat = await self.session(key)
        async with aclosing(reply(chat, asked, documents, most)) as items:  # type: ignore[type-var]
            async for item in items:
                yield item

    async def held(self) -> list[str]:
        """The keys of the sessions that this replica keeps."""
        return sorted(self._held)

    async def forget(self, owner: Owner) -> None:
        """Forget what was read for ``owner``."""
        for key, chat in list(self._held.items()):
            if key.rpartition("/")[0] == owner.name:  # what follows the last "/" is a digest
                chat.clear()
