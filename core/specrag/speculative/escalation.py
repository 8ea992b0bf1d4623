"""Escalation: where the choice among drafts is in doubt, the verifier reads passages and answers itself.

It reads those of the best drafts (a few), or all of them, as standard RAG does. Most questions never come here, so the
average stays fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from specrag.errors import ModelError, described
from specrag.models.base import Completion, GeneratedText, GenerationRequest, LanguageModel, Stage, Turn
from specrag.schema import Passage, SpeculativeAnswer, Usage, Verdict
from specrag.speculative.drafting import split_reply
from specrag.speculative.prompts import Prompts
from specrag.speculative.routing import Routing, needs_language_model

Escalation = Literal["passages", "standard"]
#: With ``"passages"``, the verifier reads so many at most.
MOST_PASSAGES = 4


def in_doubt(answer: SpeculativeAnswer, below: float, routing: Routing | None) -> bool:
    """Whether the choice gives way.

    It does where nothing was found, where its confidence is lower than ``below``, and where ``routing`` looks at the
    forms of questions and no span can answer this one.
    """
    unsure = not answer.verdicts or answer.confidence is None or answer.confidence < below
    return unsure or (routing is not None and routing.forms and needs_language_model(answer.question))


async def escalated(
    answer: SpeculativeAnswer,
    escalation: Escalation,
    lm: LanguageModel,
    prompts: Prompts,
    kept: Sequence[int],
    passages: Sequence[Passage],
    max_tokens: int,
) -> SpeculativeAnswer:
    """``answer`` with the model's own in its place; as it was, with a note, where the model fails.

    Args:
        answer: The choice among drafts that gives way.
        escalation: Which passages ``lm`` reads.
        lm: The verifier.
        prompts: Every text that it sees.
        kept: Positions of the passages that were drafted from.
        passages: All passages, as the caller gave them.
        max_tokens: Of the answer.
    """
    read = passages_to_read(escalation, answer.verdicts, kept)
    shown = tuple(passages[at] for at in read)
    try:
        text, usage = await answer_from(lm, prompts, answer.question, shown, max_tokens)
    except Exception as error:  # the drafts are still there, whatever the model raises
        note = f"the verifier could not answer itself: {described(error)}"
        return replace(answer, notes=(*answer.notes, note))
    abstained = prompts.is_abstention(text)
    return replace(
        answer,
        text="" if abstained else text,
        rationale="",
        passages=() if abstained else shown,
        abstained=abstained,
        reason="the verifier says that the passages do not answer" if abstained else None,
        escalated=escalation,
        read=tuple(read),
        verifier_usage=answer.verifier_usage + usage,
    )


def passages_to_read(escalation: Escalation, ranked: Sequence[Verdict], kept: Sequence[int]) -> list[int]:
    """Positions of the passages that the verifier reads, in retrieval order."""
    if escalation == "standard":
        return list(kept)
    best = list(dict.fromkeys(at for verdict in ranked for at in verdict.draft.subset))
    return sorted((best or list(kept))[:MOST_PASSAGES])


async def answer_from(
    lm: LanguageModel, prompts: Prompts, question: str, passages: Sequence[Passage], max_tokens: int
) -> tuple[str, Usage]:
    """The model's own answer from ``passages``, without a rationale, and the tokens it took.

    Raises:
        ModelError: The model failed, or wrote nothing.
    """
    (completion,) = await lm.agenerate([standard_request(prompts, question, passages, max_tokens)])
    return standard_reply(lm, completion, prompts).text, completion.usage


def standard_request(
    prompts: Prompts, question: str, passages: Sequence[Passage], max_tokens: int
) -> GenerationRequest:
    """What a model is asked that answers from ``passages`` without a rationale, as in standard RAG."""
    turns = (Turn.of("user", prompts.standard_text(question, passages)),)
    return GenerationRequest(turns, (Stage(prompts.answer_header, max_tokens, ("\n",)),))


def standard_reply(lm: LanguageModel, completion: Completion, prompts: Prompts) -> GeneratedText:
    """The answer out of what ``lm`` wrote for a ``standard_request``, without white space around it.

    Raises:
        ModelError: It wrote nothing.
    """
    reply = completion.parts[-1]
    answer = reply if completion.staged else split_reply(reply, prompts)[1]
    if not answer.text.strip():
        raise ModelError(f"{lm.name} wrote no answer")
    return replace(answer, text=answer.text.strip(), token_ends=None)
