"""Other ways to answer a question from passages, to put where ``SpeculativeRAG`` stands and to compare it with.

``StandardRAG`` reads all passages in one prompt. ``CorrectiveRAG`` grades the passages and keeps what is of use.
``SelfReflectiveRAG`` writes one candidate per passage and judges each. ``drafter_alone`` and ``extractive_pair`` are
``SpeculativeRAG`` with settings of their own. All have the same entry points and give the same result; ``System`` is
that protocol.
"""

from specrag.baselines.base import System
from specrag.baselines.corrective import CorrectiveRAG
from specrag.baselines.evaluators import LMEvaluator, NLIEvaluator, PassageEvaluator, SimilarityEvaluator
from specrag.baselines.pairs import drafter_alone, extractive_pair
from specrag.baselines.self_reflective import SelfReflectiveRAG
from specrag.baselines.standard import StandardRAG

__all__ = [
    "CorrectiveRAG",
    "LMEvaluator",
    "NLIEvaluator",
    "PassageEvaluator",
    "SelfReflectiveRAG",
    "SimilarityEvaluator",
    "StandardRAG",
    "System",
    "drafter_alone",
    "extractive_pair",
]
