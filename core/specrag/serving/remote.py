"""Models that run in the replicas of deployments, as the pipelines see them: a ``LanguageModel``, a ``Reader``, RAPID.

A handle is Ray Serve's ``DeploymentHandle``; nothing here imports Ray. Each call goes to one replica, which Ray Serve
chooses. A call whose replica dies is made again: the models' answers depend on the request alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrag import _blocking
from specrag.errors import ModelError, SpecRAGError, described
from specrag.models._servers import all_or_none
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
from specrag.rapid.conversation import split_context
from specrag.serving.asked import Asked
from specrag.serving.keys import Owner
from specrag.serving.rapid import RapidReplies
from specrag.serving.replies import Finished, Text, Told
from specrag.serving.workers import Call, Facts

#: Seconds before a call is made again, each time its replica has died.
PAUSES = (0.1, 0.5, 2.0, 5.0)


@dataclass(frozen=True)
class Calls:
    """Calls of one deployment.

    Args:
        handle: Of the deployment.
        lost: The errors that say that a replica has died, or that it cannot be reached.
    """

    handle: Any
    lost: tuple[type[BaseException], ...]

    async def ask(self, method: str, *args: Any) -> Any:
        """What ``method`` returns. When the caller is cancelled, so is the call.

        Raises:
            SpecRAGError: What the model raised.
            ModelError: It failed in another way, or its replicas died each time.
        """
        for pause in (*PAUSES, None):
            response = getattr(self.handle, method).remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                await self.wait_or_raise(error, pause)
        raise AssertionError  # the last error was raised

    async def wait_or_raise(self, error: Exception, pause: float | None) -> None:
        """Wait ``pause`` seconds where a replica was lost. Without a pause, or after another error, raise.

        Raises:
            SpecRAGError, ModelError: See ``ask``.
        """
        cause = _cause(error)
        if not self.is_loss(error):
            raise cause if isinstance(cause, SpecRAGError) else ModelError(described(cause)) from None
        if pause is None:
            raise ModelError(f"the replica was lost ({type(cause).__name__})") from None
        await asyncio.sleep(pause)

    def is_loss(self, error: Exception) -> bool:
        """Whether ``error`` says that a replica was lost."""
        return isinstance(error, self.lost) or isinstance(_cause(error), self.lost)


def _cause(error: Exception) -> BaseException:
    """What a replica raised: Ray wraps it."""
    return getattr(error, "cause", None) or error


def remote_model(handle: Any, lost: tuple[type[BaseException], ...]) -> LanguageModel | Reader:
    """The model of a deployment of ``ModelWorker``. It waits until a replica runs.

    Raises:
        ModelError: No replica answers.
    """
    calls = Calls(handle, lost)
    facts: Facts = _blocking.run(calls.ask("facts"))
    return RemoteReader(calls, facts) if facts.reader else RemoteLM(calls, facts)


class RemoteLM(LanguageModel):
    """A language model in the replicas of a deployment.

    Each request is a call of its own, so that the replicas share the drafts of a question. A replica puts what comes at
    the same time into one batch.

    Args:
        calls: Of the deployment.
        facts: What a replica says of the model.
    """

    def __init__(self, calls: Calls, facts: Facts) -> None:
        self._calls, self._facts = calls, facts
        self.name, self.folder = facts.name, facts.folder

    def __repr__(self) -> str:
        return f"RemoteLM({self.name!r})"

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._facts.capabilities, batched=False)

    @property
    def context_window(self) -> int | None:
        return self._facts.context_window

    def count_tokens(self, text: str) -> int:
        encoder = self._facts.encoder
        return len(encoder.encode_text(text)) if encoder is not None else super().count_tokens(text)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        return _blocking.run(self.agenerate(requests, sampling, top_log_probs=top_log_probs))

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        return _blocking.run(self.ascore(requests))

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        calls = [Call(request, _of_row(sampling, at), top_log_probs) for at, request in enumerate(requests)]
        return await all_or_none([self._calls.ask("generate", call) for call in calls], max(1, len(calls)))

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        return await all_or_none([self._calls.ask("score", turns) for turns in requests], max(1, len(requests)))


def _of_row(sampling: Sampling, row: int) -> Sampling:
    """The sampling of one row of a batch, for a request of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + row)


class RemoteReader(Reader):
    """A span reader in the replicas of a deployment. Arguments as of ``RemoteLM``."""

    def __init__(self, calls: Calls, facts: Facts) -> None:
        self._calls, self.name = calls, facts.name

    def __repr__(self) -> str:
        return f"RemoteReader({self.name!r})"

    def read(self, question: str, texts: Sequence[str], *, spans_per_passage: int = 8) -> Reading:
        return _blocking.run(self.aread(question, texts, spans_per_passage=spans_per_passage))

    def score(self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]) -> list[float | None]:
        return _blocking.run(self.ascore(question, texts, spans))

    async def aread(self, question: str, texts: Sequence[str], *, spans_per_passage: int = 8) -> Reading:
        made: Reading = await self._calls.ask("read", question, list(texts), spans_per_passage)
        return made

    async def ascore(
        self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]
    ) -> list[float | None]:
        made: list[float | None] = await self._calls.ask("score_spans", question, list(texts), list(spans))
        return made


class RemoteRapid(RapidReplies):
    """RAPID in the replicas of a deployment. A request goes to the replica that has read its document, where one has.

    Ray Serve finds that replica: the key of the document is the "model" of its model multiplexing.

    Args:
        calls: Of the deployment.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def reply(self, asked: Asked, documents: Sequence[str], most: int) -> AsyncIterator[Told | Text | Finished]:
        """See ``RapidReplies.reply``. A replica that dies after the first piece ends the reply.

        Raises:
            SpecRAGError: See ``RapidChat.stream``.
            ModelError: The replica died in the middle of the reply, or all of them did.
        """
        key = session_key(asked, documents)
        handle = self._calls.handle.options(stream=True, multiplexed_model_id=key)
        for pause in (*PAUSES, None):
            items, begun = handle.reply.remote(key, asked, list(documents), most), False
            try:
                async for item in items:
                    begun = True
                    yield item
                return
            except Exception as error:
                await self._calls.wait_or_raise(error, None if begun else pause)
            finally:
                items.cancel()

    async def forget(self, owner: Owner) -> None:
        """See ``RapidReplies.forget``. A replica that was lost keeps nothing.

        Raises:
            SpecRAGError: What a replica raised.
            ModelError: A replica failed in another way.
        """
        replies = self._calls.handle.broadcast("forget", owner)
        for told in await replies.results_async(return_exceptions=True):
            if isinstance(told, Exception) and not self._calls.is_loss(told):
                await self._calls.wait_or_raise(told, None)


def session_key(asked: Asked, documents: Sequence[str]) -> str:
    """Which session a request needs: that of its owner, and of its documents or of the beginning of its conversation.

    It begins with the owner's name and "/". Of the texts it holds a digest alone.
    """
    begins: list[str] = list(documents)
    for message in asked.messages if not documents else ():
        if message.role == "user":
            begins.append(split_context(message.content)[0] or message.content)
            break
        begins.append(message.content)
    return f"{asked.owner.name}/{hashlib.sha256(json.dumps(begins).encode()).hexdigest()}"
