"""Standard RAG: one model reads all passages in one prompt and answers (Lewis et al., arXiv 2005.11401)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from specrag.baselines._settings import checked_model, texts_for
from specrag.baselines._writing import Writer
from specrag.baselines.base import answer_of
from specrag.models.base import LanguageModel
from specrag.schema import AnswerReady, DraftDone, Event, Verdict, VerdictReady
from specrag.speculative._asked import Asked
from specrag.speculative._clock import Clock
from specrag.speculative.drafting import Assignment
from specrag.speculative.entries import Streaming
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import draft_score


@dataclass(frozen=True, kw_only=True)
class StandardRAG(Streaming):
    """One model reads all passages in one prompt, and answers.

    This is the paper's baseline of the same name (Wang et al., arXiv 2407.08223, section 4.2), after Lewis et al.
    (arXiv 2005.11401). It is asked with the prompt that ``SpeculativeRAG`` uses where the verifier answers itself
    (``escalate="standard"``). Nothing is trained here: any instruction-tuned model serves. The answer has one verdict,
    whose ``log_score`` is log P(answer | question, passages).

    Args:
        model: Reads and answers.
        prompts: ``standard`` and ``answer_header`` are used. By default those that the model was trained with, else
            ``Prompts()``.
        max_answer_tokens: The limit of the answer, in tokens.

    Raises:
        InvalidInputError: A setting out of range or of the wrong type.

    Example:
        >>> StandardRAG(model=bundled("smollm2")).answer("who discovered radium", passages).text  # doctest: +SKIP
    """

    model: LanguageModel
    prompts: Prompts | None = None
    max_answer_tokens: int = 24

    def __post_init__(self) -> None:
        checked_model(self.model, self.prompts, self.max_answer_tokens)

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return texts_for(self.model, self.prompts)

    async def astream(self, question: str, passages: Iterable[Any]) -> AsyncGenerator[Event, None]:
        asked = Asked.of(question, passages, Clock(None))
        if not asked.kept:
            yield AnswerReady(asked.without_passages())
            return
        kept = tuple(asked.kept)
        with asked.clock.measure("draft"):
            draft = await Writer(self.model, self.texts, self.max_answer_tokens).draft(
                asked.question, Assignment(0, kept, tuple(asked.passages[at] for at in kept))
            )
        yield DraftDone(draft)
        score = draft_score(draft)
        verdict = Verdict(draft, log_draft=score, log_score=score)
        yield VerdictReady(verdict)
        yield AnswerReady(answer_of(asked, [verdict], drafter_usage=draft.usage, notes=draft.notes))
