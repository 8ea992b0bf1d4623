"""Baselines that are ``SpeculativeRAG`` with settings of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import Reader
from specrag.speculative._roles import Model
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.speculative.verification import Scoring


def drafter_alone(drafter: Model, **settings: Any) -> SpeculativeRAG:
    """The drafter's best draft by its own score; nobody verifies.

    It is the ablation of Wang et al. (arXiv 2407.08223, section 4.5, Table 3) that leaves ρ_draft alone: what
    verification adds is the difference to it.

    Args:
        drafter: A language model or a reader.
        settings: Those of ``SpeculativeRAG``; ``scoring`` keeps all but its scores.
    """
    if settings.get("verifier") is not None:
        raise InvalidInputError("drafter_alone has no verifier: leave it out, or use SpeculativeRAG")
    scoring = settings.pop("scoring", None) or Scoring()
    return SpeculativeRAG(drafter=drafter, scoring=replace(scoring, scores=("draft",), mode="pointwise"), **settings)


def extractive_pair(drafter: Reader, verifier: Reader, **settings: Any) -> SpeculativeRAG:
    """A smaller question-answering encoder drafts spans, and a larger one verifies them.

    The drafter's n best spans are distinct: those that say the same are one draft, whose probability is their sum. (A
    list of the n best start and end positions repeats one span with other ends several times, so that the verifier has
    nothing to choose from.) The verifier scores each by start + end, normalised over all passages (Devlin et al., arXiv
    1810.04805, section 4.2). The score of a draft is the sum of both readers' log-probabilities.

    Args:
        drafter: Finds the spans.
        verifier: Scores them.
        settings: Those of ``SpeculativeRAG``: ``drafts`` is n.

    Example:
        >>> pair = extractive_pair(bundled("minilm-reader"), bundled("mpnet-reader"))  # doctest: +SKIP
        >>> pair.answer("who discovered radium", passages).text  # doctest: +SKIP
    """
    for name, model in (("drafter", drafter), ("verifier", verifier)):
        if not isinstance(model, Reader):
            raise InvalidInputError(f"{name} must be a SpanReader, got {kind_of(model)}")
    return SpeculativeRAG(drafter=drafter, verifier=verifier, **settings)
