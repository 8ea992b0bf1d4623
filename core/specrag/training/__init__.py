"""Training a specialist drafter: from questions with passages to a small LM that drafts (paper, section 3.2).

``examples`` makes the instruction-tuning data and ``rationales`` the evidence in it.
``synthesis`` adds what a stronger LM writes: rationales and questions.
``verdicts`` adds what the drafter itself writes, from which it learns to judge its own drafts.
``trainer`` trains the model, ``quality`` evaluates it, ``averaging`` takes the mean of several adapters.
``reader`` trains a span reader: ``reader_examples`` makes its data, ``reader_quality`` evaluates it.
Training needs the extra ``train``; using its result does not.
"""

from specrag._extras import require

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "train", "training")

from specrag.training.averaging import average_adapters
from specrag.training.examples import Example, Mixture, make_examples
from specrag.training.quality import DraftingQuality, evaluate_drafter
from specrag.training.rationales import extractive_rationale
from specrag.training.reader import ReaderSettings, train_reader
from specrag.training.reader_examples import ReaderExample, ReaderMixture, make_reader_examples
from specrag.training.reader_quality import ReaderQuality, evaluate_reader
from specrag.training.settings import TrainingSettings
from specrag.training.synthesis import synthesize_questions, synthesize_rationales
from specrag.training.trainer import train
from specrag.training.verdicts import judged_drafts

__all__ = [
    "DraftingQuality",
    "Example",
    "Mixture",
    "ReaderExample",
    "ReaderMixture",
    "ReaderQuality",
    "ReaderSettings",
    "TrainingSettings",
    "average_adapters",
    "evaluate_drafter",
    "evaluate_reader",
    "extractive_rationale",
    "judged_drafts",
    "make_examples",
    "make_reader_examples",
    "synthesize_questions",
    "synthesize_rationales",
    "train",
    "train_reader",
]
