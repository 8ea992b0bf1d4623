"""Listwise verification: all drafts in one prompt, and the probability of each draft's label at one position.

Pointwise scores ask of each draft alone whether it reads well and whether its rationale supports it. Five drafts that
answer five slightly different questions all get "Yes". Side by side, a verifier can tell which one answers this
question. It costs one prefill and needs the likely tokens of one generated token only, so servers and chat APIs that
list those can verify too.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specrag.errors import InvalidInputError, LogProbsUnavailableError
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.schema import Draft, DraftFailure, Usage, Verdict
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import Scoring, Verification, with_own_scores
from specrag.text import normalize_answer

#: Labels are single tokens of every tokenizer that we know of.
LABELS = string.ascii_uppercase
# Likely tokens asked for, where a backend can list so many: the labels in all their spellings are among them.
_MOST_TOKENS = 200
# Tokens that a chat template adds, about.
_MARGIN = 64


@dataclass(frozen=True)
class ListwiseVerifier:
    """Compares drafts with a language model, all of them in one prompt.

    Drafts with the same answer stand there once. The last label is "none of these". Models prefer some positions, so
    the drafts are shown in two opposite orders, and the mean of the log-probabilities counts; the second order is
    asked for only where the first leaves less than ``scoring.second_order_below`` between the two best drafts (in
    nats).

    Args:
        lm: The model that compares. It must list the likely tokens of a generated token.
        prompts: What it reads (``listwise``, ``none_of_these``).
        scoring: Which scores count, and their weights.
    """

    lm: LanguageModel
    prompts: Prompts = Prompts()
    scoring: Scoring = Scoring(mode="listwise")

    #: All drafts are compared with each other, so verification waits for the last one.
    waits_for_all = True

    @property
    def batched(self) -> bool:
        """One call serves all drafts."""
        return True

    def needed_for(self, draft: Draft) -> bool:
        """Whether a score that counts for ``draft`` comes from this verifier."""
        return not draft.abstained and "listwise" in self.scoring.counted

    def verdict(self, draft: Draft) -> Verdict:
        """``draft`` with the scores that its drafter gives."""
        return with_own_scores(draft, self.scoring.normalization)

    async def verify(self, question: str, drafts: Sequence[Draft]) -> Verification:
        """A verdict per draft, in order; drafts with the same answer get the same score.

        There are labels for 25 answers. Of more, those with the best scores of their own are compared, and the others
        cannot be chosen: their score is minus infinity.

        Raises:
            LogProbsUnavailableError: The model does not list likely tokens.
            ModelError: It failed.
        """
        groups: dict[str, list[Draft]] = {}
        for draft in drafts:
            groups.setdefault(normalize_answer(draft.text) or draft.text, []).append(draft)
        shown = [max(group, key=lambda d: _own(self.verdict(d))) for group in groups.values()]
        shown.sort(key=lambda d: -_own(self.verdict(d)))
        notes: list[str] = []
        if len(shown) > len(LABELS) - 1:
            notes.append(
                f"{len(shown)} different drafts: the {len(LABELS) - 1} with the best scores of their own are compared"
            )
            shown = shown[: len(LABELS) - 1]
        shown, cut = self._fitting(question, shown)
        if cut:
            notes.append(f"evidence cut to fit the verifier's window of {self.lm.context_window} tokens")
        logs, none, usage = await self._compared(question, shown)
        by_answer = {normalize_answer(d.text) or d.text: value for d, value in zip(shown, logs, strict=True)}
        outcomes: list[Verdict | DraftFailure] = []
        for draft in drafts:
            value = by_answer.get(normalize_answer(draft.text) or draft.text, -math.inf)
            outcomes.append(replace(self.verdict(draft), log_listwise=value, log_none=none))
        return Verification(tuple(outcomes), usage, tuple(notes))

    async def _compared(self, question: str, shown: Sequence[Draft]) -> tuple[list[float], float, Usage]:
        """The log-probability of each draft and of none, mean over the orders that were asked for."""
        logs, none, usage = await self._asked(question, shown)
        ordered = sorted(logs, reverse=True)
        bound = self.scoring.second_order_below
        if len(shown) < 2 or (bound is not None and ordered[0] - ordered[1] >= bound):
            return logs, none, usage
        again, none_again, more = await self._asked(question, shown[::-1])
        mean = [(a + b) / 2 for a, b in zip(logs, again[::-1], strict=True)]
        return mean, (none + none_again) / 2, usage + more

    async def _asked(self, question: str, shown: Sequence[Draft]) -> tuple[list[float], float, Usage]:
        """One prompt: the labels' log-probabilities, renormalised over the labels."""
        request = GenerationRequest(
            (Turn.of("user", self.prompts.listwise_text(question, shown)),), (Stage(max_tokens=1),)
        )
        count = min(_MOST_TOKENS, self.lm.capabilities.most_top_log_probs)
        (completion,) = await self.lm.agenerate([request], top_log_probs=count)
        tops = completion.parts[0].top_log_probs
        if not tops:
            raise LogProbsUnavailableError(
                f"{self.lm.name} does not list likely tokens, which listwise verification reads: "
                "use Scoring(mode='pointwise'), or a model that lists them"
            )
        values = [label_log_prob(tops[0], label) for label in LABELS[: len(shown) + 1]]
        total = _log_total(values)
        return [v - total for v in values[:-1]], values[-1] - total, completion.usage

    def _fitting(self, question: str, shown: Sequence[Draft]) -> tuple[list[Draft], bool]:
        """The drafts with their evidence cut where the prompt exceeds the model's window, and whether it was."""
        window, kept = self.lm.context_window, list(shown)
        if window is None:
            return kept, False

        def size(drafts: Sequence[Draft]) -> int:
            return self.lm.count_tokens(self.prompts.listwise_text(question, drafts)) + 1 + _MARGIN

        if len(self.prompts.listwise_text(question, kept).encode()) + _MARGIN <= window or size(kept) <= window:
            return kept, False
        bare = [replace(draft, rationale="") for draft in kept]
        if (left := window - size(bare)) < 0:
            raise InvalidInputError(
                f"the question and {len(kept)} answers exceed the verifier's window of {window} tokens: "
                "ask for fewer or shorter drafts"
            )
        per_draft = left // len(kept)
        for i, draft in enumerate(kept):
            words = draft.rationale.split()
            while words and self.lm.count_tokens(" ".join(words)) + 4 > per_draft:
                words = words[: len(words) * 3 // 4]
            kept[i] = replace(draft, rationale=" ".join(words))
        return kept, True


def label_log_prob(top: object, label: str) -> float:
    """Log of the summed probability of a label's spellings ("A", " A", "a") in {token text: log-probability}.

    Where none of them is listed, the lowest listed log-probability stands in, which is an upper bound.
    """
    listed = dict(top) if isinstance(top, dict) else {}
    values = [v for token, v in listed.items() if str(token).strip(" \u2581\u0120().:").upper() == label]
    return _log_total(values) if values else float(min(listed.values()))


def _log_total(values: Sequence[float]) -> float:
    high = max(values)
    return high if math.isinf(high) else high + math.log(sum(math.exp(value - high) for value in values))


def _own(verdict: Verdict) -> float:
    return -math.inf if verdict.log_draft is None else verdict.log_draft
