"""Verification of spans by a reader, or by nobody: the extractive pair of question-answering encoders.

A small reader drafts spans, a larger one says how likely each span is. Both read all passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specrag.models.base import Reader
from specrag.schema import Draft, Passage, Verdict
from specrag.speculative.reading import log_sum
from specrag.speculative.verification import Scoring, Verification, with_own_scores
from specrag.text import passage_text, whole_words


@dataclass(frozen=True)
class SpanVerifier:
    """Scores drafts with a reader: log P of the places where the draft's answer stands, summed over them.

    An answer that was written, not copied, is looked for in the passages as whole words. Where it does not stand there,
    the draft has no such score.

    Args:
        reader: Scores the spans.
        passages: All passages of the question: the reader normalises over them.
        scoring: Which scores count, and their weights.
    """

    reader: Reader
    passages: tuple[Passage, ...]
    scoring: Scoring = Scoring()

    waits_for_all = False
    batched = True

    def needed_for(self, draft: Draft) -> bool:
        """Whether a score that counts for ``draft`` comes from this verifier."""
        return not draft.abstained and "span" in self.scoring.counted

    def verdict(self, draft: Draft) -> Verdict:
        """``draft`` with the scores that its drafter gives."""
        return with_own_scores(draft, self.scoring.normalization)

    async def verify(self, question: str, drafts: Sequence[Draft]) -> Verification:
        """A verdict per draft, in order, from one pass over the passages."""
        texts = [passage_text(passage) for passage in self.passages]
        asked = [(i, place) for i, draft in enumerate(drafts) for place in self._places(draft, texts)]
        scored = await self.reader.ascore(question, texts, [place for _, place in asked]) if asked else []
        found: dict[int, list[float]] = {}
        for (i, _), value in zip(asked, scored, strict=True):
            if value is not None:
                found.setdefault(i, []).append(value)
        return Verification(
            tuple(
                replace(self.verdict(draft), log_span=log_sum(found[i]) if i in found else None)
                for i, draft in enumerate(drafts)
            )
        )

    def _places(self, draft: Draft, texts: Sequence[str]) -> list[tuple[int, int, int]]:
        number = {id(passage): i for i, passage in enumerate(self.passages)}
        own = [number[id(passage)] for passage in draft.passages if id(passage) in number]
        if draft.places:
            return [(own[which], start, end) for which, start, end in draft.places]
        pattern = whole_words(draft.text)
        return [(i, *match.span()) for i in own for match in pattern.finditer(texts[i])] if pattern else []


@dataclass(frozen=True)
class NoVerifier:
    """Where nobody verifies: a draft has the scores that its drafter gives."""

    scoring: Scoring = Scoring(scores=("draft",))

    waits_for_all = False
    batched = True

    def needed_for(self, draft: Draft) -> bool:
        """Never."""
        return False

    def verdict(self, draft: Draft) -> Verdict:
        """``draft`` with the scores that its drafter gives."""
        return with_own_scores(draft, self.scoring.normalization)

    async def verify(self, question: str, drafts: Sequence[Draft]) -> Verification:
        """The verdicts, without any model."""
        return Verification(tuple(map(self.verdict, drafts)))
