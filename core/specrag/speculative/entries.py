"""The entry points of every system over passages: blocking, awaited and streamed, all of them from ``astream``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any

from specrag import _blocking
from specrag.schema import AnswerReady, Event, SpeculativeAnswer


class Streaming:
    """The entry points of a system that has ``astream``."""

    def astream(self, question: str, passages: Iterable[Any]) -> AsyncGenerator[Event, None]:
        """What happens, as it happens: drafts, verdicts, and at last the answer. Raises as ``answer`` does."""
        raise NotImplementedError

    def stream(self, question: str, passages: Iterable[Any]) -> Iterator[Event]:
        """``astream`` for blocking code."""
        return _blocking.iterate(self.astream(question, passages))

    async def aanswer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """``answer``, awaited."""
        async for event in self.astream(question, passages):
            if isinstance(event, AnswerReady):
                return event.answer
        raise AssertionError("the stream ended without an answer")  # pragma: no cover

    def answer(self, question: str, passages: Iterable[Any]) -> SpeculativeAnswer:
        """The answer to ``question``. Also safe where an event loop runs (in a notebook).

        Args:
            question: What is asked.
            passages: The retrieved passages, best first. Each is a ``Passage``, a string, a mapping with ``text``, or a
                LangChain ``Document`` (see ``Passage.of``).

        Raises:
            InvalidInputError: The question is empty or too long for a model, or something is not a passage.
            DraftingError: Every draft failed.
            ModelError: The model that answers or verifies failed. With a deadline, a verifier that fails costs nothing:
                the drafts' own scores decide.
        """
        return _blocking.run(self.aanswer(question, passages))
