"""Span drafts: answers that stand in the passages, found by a question-answering encoder.

One pass over all passages gives the likeliest spans. Spans that say the same are one draft. Its log-probability is that
any of them is the answer, its citations are the passages that hold one, and its rationale is the sentence around the
best one, after the passage's title. For answers that can be copied this is faster than generating and right more often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from specrag._fields import check_whole_numbers
from specrag.models.base import Reader, Reading, Span
from specrag.schema import Draft, Passage, Usage
from specrag.text import evidence, normalize_answer, passage_text

# Spans of each passage that are considered: most repeat a better one with other ends.
_SPANS_PER_PASSAGE = 8


@dataclass(frozen=True)
class SpanDrafter:
    """Makes drafts with a reader.

    Args:
        reader: Finds the spans.
        drafts: How many drafts, at most.
        per_perspective: How many of them may come from the passages of one perspective; ``None``: any number.

    Raises:
        InvalidInputError: A limit below 1.
    """

    reader: Reader
    drafts: int = 5
    per_perspective: int | None = None

    def __post_init__(self) -> None:
        check_whole_numbers(least=1, drafts=self.drafts)
        if self.per_perspective is not None:
            check_whole_numbers(least=1, per_perspective=self.per_perspective)

    async def read(
        self,
        question: str,
        passages: Mapping[int, Passage],
        *,
        first_index: int = 0,
        perspectives: Mapping[int, int] | None = None,
    ) -> list[Draft]:
        """The drafts from one pass over ``passages``, best first.

        Args:
            question: Q.
            passages: By their position in the caller's list.
            first_index: The index of the first draft; the others follow.
            perspectives: The cluster of each passage, by the same positions; needed for ``per_perspective`` alone.

        Raises:
            Exception: What the reader raises.
        """
        start = time.perf_counter()
        positions = list(passages)
        texts = [passage_text(passages[at]) for at in positions]
        reading = await self.reader.aread(question, texts, spans_per_passage=_SPANS_PER_PASSAGE)
        seconds = time.perf_counter() - start
        made: list[Draft] = []
        taken: dict[int, int] = {}
        for group in distinct_spans(reading, texts):
            if len(made) == self.drafts:
                break
            cluster = perspectives.get(positions[group[0].passage]) if perspectives is not None else None
            if self.per_perspective is not None and cluster is not None:
                if taken.get(cluster, 0) >= self.per_perspective:
                    continue
                taken[cluster] = taken.get(cluster, 0) + 1
            made.append(
                self._draft(first_index + len(made), group, positions, passages, reading.log_no_answer, seconds)
            )
        if made:
            made[0] = replace(made[0], usage=Usage(prompt_tokens=reading.tokens))  # one pass serves all
        return made

    def _draft(
        self,
        index: int,
        group: Sequence[Span],
        positions: Sequence[int],
        passages: Mapping[int, Passage],
        log_no_answer: float,
        seconds: float,
    ) -> Draft:
        cited = list(dict.fromkeys(span.passage for span in group))
        best = group[0]
        passage = passages[positions[best.passage]]
        return Draft(
            index=index,
            subset=tuple(positions[number] for number in cited),
            passages=tuple(passages[positions[number]] for number in cited),
            text=passage_text(passage)[best.start : best.end],
            rationale=span_evidence(passage, best.start, best.end),
            log_answer=log_sum(span.log_prob for span in group),
            drafter=self.reader.name,
            places=tuple((cited.index(span.passage), span.start, span.end) for span in group),
            log_no_answer=log_no_answer,
            seconds=seconds,
        )


def distinct_spans(reading: Reading, texts: Sequence[str]) -> list[list[Span]]:
    """The spans of ``reading`` in groups that say the same, best group first, in each the best span first.

    A span that overlaps a better one is the same finding with other ends. It makes no group of its own.
    """
    groups: dict[str, list[Span]] = {}
    seen: list[Span] = []
    for span in reading.spans:
        if any(s.passage == span.passage and s.start < span.end and span.start < s.end for s in seen):
            continue
        said = normalize_answer(texts[span.passage][span.start : span.end])
        if said:
            groups.setdefault(said, []).append(span)
            seen.append(span)
    return sorted(groups.values(), key=lambda group: -log_sum(span.log_prob for span in group))


def span_evidence(passage: Passage, start: int, end: int) -> str:
    """The sentence around a span of ``passage_text(passage)``; of the title: the passage's first sentence."""
    before = len(passage_text(passage)) - len(passage.text)
    start, end = max(0, start - before), max(1, end - before)
    return evidence(passage, start, end)


def log_sum(values: Iterable[float]) -> float:
    """The logarithm of the sum of probabilities, given their logarithms."""
    listed = list(values)
    high = max(listed)
    return (
        float(high) if math.isinf(high) else float(min(0.0, high + math.log(sum(math.exp(v - high) for v in listed))))
    )
