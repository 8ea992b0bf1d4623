"""How well a drafter drafts: on examples that can be answered, and on examples that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specrag.evaluation.metrics import contains_answer, wilson_interval
from specrag.models.base import LanguageModel
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import Prompts
from specrag.training.examples import Example


@dataclass(frozen=True)
class DraftingQuality:
    """How often a drafter is right and abstains.

    Attributes:
        answerable, unanswerable: Numbers of examples.
        right, wrongly_abstained: Shares of the answerable examples.
        rightly_abstained: Share of the unanswerable examples.
        right_interval: The 95 % Wilson interval of ``right``.
    """

    answerable: int
    right: float
    wrongly_abstained: float
    unanswerable: int
    rightly_abstained: float
    right_interval: tuple[float, float]


def evaluate_drafter(lm: LanguageModel, examples: Sequence[Example], prompts: Prompts = Prompts()) -> DraftingQuality:
    """Draft every example greedily, as the pipeline does, and count.

    A draft is right when its answer contains one of the example's right answers.
    """
    drafter = Drafter(lm, prompts)
    right = lost = kept = 0
    with_answer = sum(example.answerable for example in examples)
    for at in range(0, len(examples), 8):
        group = examples[at : at + 8]
        completions = lm.generate([drafter.request(e.question, e.passages) for e in group])
        for example, completion in zip(group, completions, strict=True):
            text = completion.parts[-1].text
            abstained = prompts.is_abstention(text)
            if example.answerable:
                right += not abstained and contains_answer(text, example.right or [example.answer])
                lost += abstained
            else:
                kept += abstained
    without = len(examples) - with_answer
    return DraftingQuality(
        answerable=with_answer,
        right=right / max(with_answer, 1),
        wrongly_abstained=lost / max(with_answer, 1),
        unanswerable=without,
        rightly_abstained=kept / max(without, 1),
        right_interval=wilson_interval(right, with_answer),
    )
