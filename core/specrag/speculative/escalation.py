"""Escalation: where the choice among drafts is in doubt, the verifier reads passages and answers itself.

It reads those of the best drafts (a few), or all of them, as standard RAG does. Most questions never come here, so the
average stays fast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from specrag.errors import ModelError
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.schema import Draft, Passage, Verdict
from specrag.speculative.drafting import total
from specrag.speculative.prompts import Prompts

Escalation = Literal["passages", "standard"]
#: With ``"passages"``, the verifier reads so many at most.
MOST_PASSAGES = 4


def passages_to_read(
    escalation: Escalation, ranked: Sequence[Verdict], kept: Sequence[int], passages: Sequence[Passage]
) -> list[int]:
    """Positions of the passages that the verifier reads, in retrieval order."""
    if escalation == "standard":
        return list(kept)
    best: list[int] = []
    for verdict in ranked:
        best += [at for at in verdict.draft.subset if at not in best]
    return sorted((best or list(kept))[:MOST_PASSAGES])


async def answer_from(
    lm: LanguageModel,
    prompts: Prompts,
    question: str,
    subset: Sequence[int],
    passages: Sequence[Passage],
    *,
    max_tokens: int,
    index: int,
) -> Draft:
    """The model's own answer from ``passages``, as a draft without a rationale.

    Raises:
        ModelError: It failed, or wrote nothing.
    """
    start = time.perf_counter()
    stage = Stage(prompts.answer_header, max_tokens, ("\n",))
    turns = (Turn.of("user", prompts.standard_text(question, passages)),)
    (completion,) = await lm.agenerate([GenerationRequest(turns, (stage,))])
    part = completion.parts[-1]
    if not part.text.strip():
        raise ModelError(f"{lm.name} wrote no answer")
    return Draft(
        index=index,
        subset=tuple(subset),
        passages=tuple(passages),
        text=part.text.strip(),
        rationale="",
        abstained=prompts.is_abstention(part.text),
        log_answer=total(part.log_probs),
        answer_tokens=part.tokens,
        usage=completion.usage,
        seconds=time.perf_counter() - start,
        drafter=lm.name,
    )
