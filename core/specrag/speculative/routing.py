"""Routing: which questions a reader answers alone, and which need a language model.

A reader copies a span. It cannot say yes or no, explain, or compare two things that stand in two passages. Where a
pipeline has a reader and a language model, the model is asked only when the question's form or the reader's own doubt
says so, which saves most of the time. The bounds were chosen on dev questions (docs/results.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError
from specrag.schema import Draft

_VERBS = "is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|shall|should|may|might|must"
# "Is it ...", "did they ..."; not "will smith was born when", which asks for a span.
_YES_OR_NO = re.compile(rf"^\W*(?:{_VERBS})(?:n't|nt)?\s(?!.*\b(?:who|what|when|where|which|how)\b)", re.IGNORECASE)
_EXPLANATION = re.compile(
    r"^\W*(?:why|how come|explain|describe|summari[sz]e|compare|discuss|list)\b"
    r"|^\W*how (?:do|does|did|can|could|to|is|are|was|were|has|have|would|should)\b",
    re.IGNORECASE,
)
_COMPARISON = re.compile(
    r"\b(?:older|younger|bigger|larger|longer|taller|earlier|later|first|more|same|both)\b.*\bor\b|\bboth\b",
    re.IGNORECASE,
)


def needs_language_model(question: str) -> bool:
    """Whether the form of ``question`` asks for what no span says: yes or no, an explanation, a comparison."""
    return any(pattern.search(question) for pattern in (_YES_OR_NO, _EXPLANATION, _COMPARISON))


def asks_yes_or_no(question: str) -> bool:
    """Whether ``question`` wants yes or no. "Is it the fox or the hen" does not: it names its answers."""
    return bool(_YES_OR_NO.search(question)) and not re.search(r"\bor\b(?! not\b)", question, re.IGNORECASE)


@dataclass(frozen=True)
class Routing:
    """When the language models of a pipeline with readers are asked.

    Args:
        forms: Ask them where ``needs_language_model`` says that no span can answer. Where the question wants yes or no
            (``asks_yes_or_no``), ask them alone: a span would only win over the right draft.
        no_answer_above: Ask them where the reader gives "no span answers" more than this probability. ``None``: its
            doubt does not matter.

    Raises:
        InvalidInputError: A probability outside [0, 1].
    """

    forms: bool = True
    no_answer_above: float | None = 0.5

    def __post_init__(self) -> None:
        check_numbers(no_answer_above=self.no_answer_above)
        if self.no_answer_above is not None and not 0 <= self.no_answer_above <= 1:
            raise InvalidInputError(f"no_answer_above must lie in [0, 1], got {self.no_answer_above}")

    def skips(self, question: str) -> bool:
        """Whether the readers of a pipeline with language models are not asked at all."""
        return self.forms and asks_yes_or_no(question)

    def asks(self, question: str, copied: Sequence[Draft]) -> bool:
        """Whether the language models are asked, after the readers copied these drafts."""
        if not copied or (self.forms and needs_language_model(question)):
            return True
        doubts = [draft.log_no_answer for draft in copied if draft.log_no_answer is not None]
        return self.no_answer_above is not None and bool(doubts) and math.exp(min(doubts)) > self.no_answer_above
