"""How well a drafter drafts: on examples that can be answered, and on examples that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specrag.errors import ModelError
from specrag.evaluation.metrics import contains_answer, separation, wilson_interval
from specrag.models.base import LanguageModel
from specrag.schema import Draft
from specrag.speculative.drafting import Assignment, Drafter
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
        verdicts: Drafts that the drafter judged.
        separation: How well its verdicts tell right drafts from wrong ones (``metrics.separation``); ``None`` where
            there are none, or all are right or all wrong.
    """

    answerable: int
    right: float
    wrongly_abstained: float
    unanswerable: int
    rightly_abstained: float
    right_interval: tuple[float, float]
    verdicts: int = 0
    separation: float | None = None


def evaluate_drafter(lm: LanguageModel, examples: Sequence[Example], prompts: Prompts = Prompts()) -> DraftingQuality:
    """Draft every example greedily, as the pipeline does, and count.

    A draft is right when its answer contains one of the example's right answers. An empty draft is wrong.
    """
    drafter = Drafter(lm, prompts)
    right = lost = kept = 0
    with_answer = sum(example.answerable for example in examples)
    judged: list[tuple[bool, float]] = []
    for at in range(0, len(examples), 8):
        group = examples[at : at + 8]
        for example, draft in zip(group, _drafts(drafter, group), strict=True):
            if draft is None:
                continue
            holds = example.answerable and contains_answer(draft.text, example.right or [example.answer])
            right += holds and not draft.abstained
            lost += draft.abstained and example.answerable
            kept += draft.abstained and not example.answerable
            if draft.log_verdict is not None:
                judged.append((holds, draft.log_verdict))
    without = len(examples) - with_answer
    return DraftingQuality(
        answerable=with_answer,
        right=right / max(with_answer, 1),
        wrongly_abstained=lost / max(with_answer, 1),
        unanswerable=without,
        rightly_abstained=kept / max(without, 1),
        right_interval=wilson_interval(right, with_answer),
        verdicts=len(judged),
        separation=separation([truth for truth, _ in judged], [sure for _, sure in judged]) if judged else None,
    )


def _drafts(drafter: Drafter, examples: Sequence[Example]) -> list[Draft | None]:
    """The draft of each example; ``None`` where the model wrote no answer."""
    assignments = [Assignment(i, tuple(range(len(e.passages))), e.passages) for i, e in enumerate(examples)]
    requests = [drafter.request(e.question, e.passages) for e in examples]
    completions = drafter.lm.generate(requests, top_log_probs=drafter.top_log_probs)
    made: list[Draft | None] = []
    for completion, assignment in zip(completions, assignments, strict=True):
        try:
            made.append(drafter.read(completion, assignment))
        except ModelError:
            made.append(None)
    return made
