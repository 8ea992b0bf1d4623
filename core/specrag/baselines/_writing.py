"""Answers that a model writes from given passages without a rationale, several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from specrag.errors import InvalidInputError, ModelError, described
from specrag.models.base import Completion, GenerationRequest, LanguageModel
from specrag.schema import Draft, DraftFailure
from specrag.speculative._fitting import fitted
from specrag.speculative.drafting import Assignment, total
from specrag.speculative.escalation import standard_reply, standard_request
from specrag.speculative.prompts import Prompts


@dataclass(frozen=True)
class Writer:
    """Asks a model for answers with the prompt of standard RAG.

    Args:
        lm: The model.
        prompts: ``standard``, ``answer_header`` and ``abstention`` are used.
        max_tokens: Of an answer.
    """

    lm: LanguageModel
    prompts: Prompts
    max_tokens: int

    async def drafts(self, question: str, assignments: Sequence[Assignment]) -> list[Draft | DraftFailure]:
        """One draft or failure per assignment, in order. An error of the model costs its draft alone.

        Raises:
            InvalidInputError: The question does not fit the model's window.
        """
        await self.lm.prepare()
        asked = [self._asked(question, assignment) for assignment in assignments]
        start = time.perf_counter()
        completions: Sequence[Completion | BaseException]
        try:
            completions = await self.lm.agenerate([request for request, _ in asked])
        except InvalidInputError:
            raise
        except Exception as error:  # find the draft that fails, and keep the others
            if len(asked) == 1:
                return [DraftFailure(assignments[0].index, assignments[0].subset, described(error))]
            alone = (self.lm.agenerate([request]) for request, _ in asked)
            replies = await asyncio.gather(*alone, return_exceptions=True)
            completions = [reply if isinstance(reply, BaseException) else reply[0] for reply in replies]
        seconds = time.perf_counter() - start
        return [
            self._draft(assignment, completion, notes, seconds)
            for assignment, completion, (_, notes) in zip(assignments, completions, asked, strict=True)
        ]

    def _asked(self, question: str, assignment: Assignment) -> tuple[GenerationRequest, tuple[str, ...]]:
        shown, cut = fitted(
            self.lm,
            assignment.passages,
            lambda passages: standard_request(self.prompts, question, passages, self.max_tokens),
            "model",
        )
        notes = (f"passages cut to fit the window of {self.lm.context_window} tokens of {self.lm.name}",) if cut else ()
        return standard_request(self.prompts, question, shown, self.max_tokens), notes

    def _draft(
        self, assignment: Assignment, completion: Completion | BaseException, notes: tuple[str, ...], seconds: float
    ) -> Draft | DraftFailure:
        if isinstance(completion, BaseException):
            if not isinstance(completion, Exception):
                raise completion
            return DraftFailure(assignment.index, assignment.subset, described(completion))
        try:
            reply = standard_reply(self.lm, completion, self.prompts)
        except ModelError as error:
            return DraftFailure(assignment.index, assignment.subset, str(error))
        return Draft(
            index=assignment.index,
            subset=assignment.subset,
            passages=assignment.passages,
            text=reply.text,
            rationale="",
            abstained=self.prompts.is_abstention(reply.text),
            log_answer=total(reply.log_probs),
            answer_tokens=reply.tokens,
            usage=completion.usage,
            seconds=seconds,
            notes=(*notes, *completion.notes),
            drafter=self.lm.name,
        )

    async def draft(self, question: str, assignment: Assignment) -> Draft:
        """The draft of one assignment.

        Raises:
            InvalidInputError: The question does not fit the model's window.
            ModelError: The model failed, or wrote nothing.
        """
        (made,) = await self.drafts(question, [assignment])
        if isinstance(made, DraftFailure):
            raise ModelError(made.error)
        return made
