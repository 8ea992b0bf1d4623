"""A drafter's own drafts, and whether they are right: what it learns its verdict from.

The verdict is one word behind a draft, written by the drafter itself: the probability of "Yes" there is P(True) of
Kadavath et al. (arXiv 2207.05221, section 3), asked while the passages are still in the cache. A drafter learns it from
drafts of its own, on questions that it was not trained on: on others it is right too often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError, ModelError
from specrag.evaluation.metrics import contains_answer
from specrag.models.base import LanguageModel
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import Prompts
from specrag.training.examples import Example
from specrag.training.replies import Progress, replies_of


def judged_drafts(
    examples: Sequence[Example],
    lm: LanguageModel,
    cache: str | Path,
    *,
    prompts: Prompts,
    imitated: float = 0.25,
    batch: int = 8,
    seed: int = 0,
    version: str = "",
    progress: Progress = lambda done, total: None,
) -> list[Example]:
    """``examples`` with what ``lm`` drafts in place of the draft that was to be written.

    A draft that answers gets a verdict: right when it contains a right answer and the passages answer at all. A draft
    that abstains gets none; it is kept where it is right and imitated. Empty drafts are left out.

    Args:
        examples: What is drafted from; their rationales are not used.
        lm: The drafter, greedy. It must continue headers that are written for it.
        cache: File of its drafts; a killed run goes on there.
        prompts: Those that it drafts with, and ``verdict_header``.
        imitated: Share of the right drafts that are learnt again as they are, so that training the verdict leaves the
            drafting as it is. In [0, 1].
        batch: Drafts per call of a batching LM.
        seed: Decides which drafts are imitated.
        version: Tells drafters of the same name apart in ``cache``.
        progress: Called with the number of drafts written and of those that were missing.

    Raises:
        InvalidInputError: ``prompts`` asks for no verdict, ``imitated`` is out of range, or all drafts that answer are
            right, or all wrong: nothing can be learnt from them.
        ModelError: The model failed, or wrote rationale and answer in one part; finished drafts are kept.
    """
    if prompts.verdict_header is None:
        raise InvalidInputError("prompts.verdict_header is None: name what comes before the verdict")
    check_numbers(imitated=imitated)
    if not 0 <= imitated <= 1:
        raise InvalidInputError(f"imitated must lie in [0, 1], got {imitated}")
    drafter = Drafter(lm, replace(prompts, verdict_header=None))
    requests = {str(i): drafter.request(example.question, example.passages) for i, example in enumerate(examples)}
    replies = replies_of(requests, lm, cache, batch, progress, version=version)
    random = np.random.default_rng(seed)
    judged = []
    for i, example in enumerate(examples):
        if len(replies[str(i)]) < 2:
            raise ModelError(f"{lm.name} does not continue a header that is written for it: it cannot be taught this")
        rationale, answer = replies[str(i)]
        if rationale and answer:
            judged.append(_judged(example, rationale, answer, prompts, imitated=random.random() < imitated))
    verdicts = [example.verdict for example in judged if example.verdict is not None]
    if not any(verdicts) or all(verdicts):
        raise InvalidInputError(
            f"a verdict is learnt from right drafts and wrong ones: of {len(verdicts)} drafts that answer, "
            f"{sum(verdicts)} are right. Give other questions, or train the drafter first"
        )
    return [example for example in judged if example.verdict is not None or example.imitated]


def _judged(example: Example, rationale: str, answer: str, prompts: Prompts, *, imitated: bool) -> Example:
    """``example`` with this draft and the verdict on it; ``imitated`` counts where the draft is right."""
    abstains = prompts.is_abstention(answer)
    right = example.answerable and contains_answer(answer, example.right or [example.answer])
    return replace(
        example,
        rationale=rationale,
        answer=answer,
        verdict=None if abstains else right,
        imitated=imitated and (not example.answerable if abstains else right),
    )
