"""Making a specialist drafter: from questions with passages to a small LM tuned to draft (paper, section 3.2).

``examples`` makes the instruction-tuning data, ``rationales`` the evidence in it, ``synthesis`` what a stronger LM adds to
it, ``trainer`` the model, ``averaging`` the mean of several.
Training needs the extra ``train``; using its result does not.
"""

from specrag._extras import require

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "train", "training")

from specrag.training.averaging import average_adapters
from specrag.training.examples import Example, Mixture, make_examples
from specrag.training.rationales import extractive_rationale
from specrag.training.synthesis import synthesize_questions, synthesize_rationales
from specrag.training.trainer import TrainingSettings, evaluate_drafter, train

__all__ = [
    "Example",
    "Mixture",
    "TrainingSettings",
    "average_adapters",
    "evaluate_drafter",
    "extractive_rationale",
    "make_examples",
    "synthesize_questions",
    "synthesize_rationales",
    "train",
]
