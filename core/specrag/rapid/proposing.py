"""Which proposer answers a question about a context, as the settings say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specrag.errors import InvalidInputError
from specrag.models.embedders import Embedder
from specrag.models.transformers import TransformersLM
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.chunks import Retrieved
from specrag.rapid.datastore import Datastore
from specrag.rapid.draft_length import Estimates
from specrag.rapid.prompt import PromptTokens
from specrag.rapid.proposers import (
    SINKS,
    HybridProposer,
    ModelProposer,
    Proposer,
    SuffixMatchProposer,
    sinks_and_window,
)
from specrag.rapid.rest import RestProposer
from specrag.rapid.settings import RapidSettings
from specrag.rapid.triforce import TriForceProposer

# Room for an answer in the drafter's cache, before the cache has to grow.
_SPARE_TOKENS = 256
# Self-speculation is left out when retrieval shows more than this share of the context: the drafter saves nothing.
_MOST_OF_THE_CONTEXT = 0.75
# The shortest match that is preferred to a drafter: a model knows more than a match of two tokens tells.
_HYBRID_MATCH = 3


class RapidModels(Protocol):
    """The models and the settings of RAPID: what sessions need of a ``RapidGenerator``."""

    target: TransformersLM
    drafter: TransformersLM
    vocabulary: int
    settings: RapidSettings
    estimates: Estimates
    datastore: Datastore | None

    @property
    def embedder(self) -> Embedder:
        """What retrieval embeds with."""

    def budget(self, context_tokens: int) -> int:
        """Tokens of retrieved context for a context of ``context_tokens``."""


class DrafterCaches:
    """What drafters have read for earlier questions, one cache per drafter, for the next question to begin with.

    What the old and the new prompt begin with alike is not read again. Only caches are kept that a drafter read
    itself: what is copied from the target costs no reading.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[CachedModel, list[int]]] = {}

    def for_prompt(self, lm: TransformersLM, tokens: list[int], vocabulary: int) -> CachedModel:
        """The drafter, rolled back to what its cache shares with ``tokens``; never the last of them."""
        model, before = self._kept.get(id(lm), (None, []))
        if model is None or model.lm is not lm:
            model, before = CachedModel(lm, len(tokens) + _SPARE_TOKENS, vocabulary), []
        shared, most = 0, min(len(before) - 1, len(tokens) - 1, model.length)
        while shared < most and before[shared] == tokens[shared]:
            shared += 1
        model.rollback_to(shared)
        self._kept[id(lm)] = model, tokens
        return model


def proposer_for(
    rapid: RapidModels,
    prompt: PromptTokens,
    tail: Sequence[int],
    target: CachedModel,
    retrieve: Callable[[], Retrieved],
    notes: list[str],
    drafters: DrafterCaches | None = None,
) -> tuple[Proposer | None, float]:
    """What proposes candidates for a question; ``None`` where the target decodes alone.

    Args:
        rapid: Models and settings.
        prompt: The context.
        tail: The question's tokens, which follow it.
        target: With both in its cache.
        retrieve: Called where the settings need retrieval.
        notes: What a user should know is added.
        drafters: Where drafters that read keep their caches from question to question; ``None``: nowhere.

    Returns:
        The proposer, and the confidence of the retrieval (1 without any).
    """
    settings, context, confidence = rapid.settings, prompt.context, 1.0
    hybrid = settings.proposer.startswith("hybrid")
    if settings.candidates == 0:
        return None, confidence
    if settings.proposer == "match":
        return _match(rapid, prompt, tail), confidence
    if settings.proposer == "rest":
        assert rapid.datastore is not None  # the generator has opened it
        last = [*prompt.ids, *tail]
        return RestProposer(rapid.datastore, last, rapid.vocabulary, width=settings.width), confidence
    if settings.proposer == "triforce" and context and _covered(context, settings):
        notes.append(f"the window of {settings.window} tokens covers the context: the target decodes alone")
        return None, confidence
    shown: Sequence[int]
    if settings.proposer == "naive":
        shown = range(len(context))
    elif settings.proposer == "window":
        shown = sinks_and_window(len(context), window=settings.window)
    else:
        retrieved = retrieve() if context else Retrieved([], confidence)
        shown, confidence = retrieved.positions, retrieved.confidence
        itself = rapid.drafter is rapid.target or settings.proposer == "triforce"
        if settings.candidates == "auto" and itself and len(shown) >= _MOST_OF_THE_CONTEXT * len(context):
            instead = "candidates are copied, and no model drafts" if hybrid else "the target decodes alone"
            notes.append(f"the retrieved context is most of the context: {instead}")
            return _match(rapid, prompt, tail) if hybrid else None, confidence
    drafting = _Drafting(rapid, prompt, tail, target, drafters)
    if settings.proposer == "triforce":
        window = sinks_and_window(len(context), window=settings.window)
        middle = drafting.on_the_targets_keys(rapid.target, shown)
        return TriForceProposer(middle, drafting.small(window)), confidence
    model = drafting.model(shown)
    if hybrid:
        return HybridProposer(_match(rapid, prompt, tail, least=_HYBRID_MATCH), model), confidence
    return model, confidence


def check_question(
    rapid: RapidModels, context: Sequence[int], tail: Sequence[int], *, any_length: bool = False
) -> None:
    """Check that the proposer can serve a question, before anything is read.

    Args:
        rapid: Models and settings.
        context: Its tokens.
        tail: The question's tokens.
        any_length: Whether a context that the window of ``"triforce"`` covers is allowed.

    Raises:
        InvalidInputError: The question is longer than the retrieval budget, or ``"triforce"`` has no window that is
            smaller than the context.
    """
    settings, budget = rapid.settings, rapid.budget(len(context))
    if len(tail) > budget and context and settings.proposer in ("rag", "hybrid"):
        raise InvalidInputError(f"the question has {len(tail)} tokens, the retrieval budget is {budget}: raise it")
    if settings.proposer == "triforce" and context and _covered(context, settings) and not any_length:
        raise InvalidInputError(
            f"proposer='triforce' needs a window smaller than the context: that has {len(context)} tokens, the "
            f"window {settings.window} after {SINKS} sinks. Give a smaller window=, or another proposer"
        )


def _covered(context: Sequence[int], settings: RapidSettings) -> bool:
    """Whether the sinks and the window of ``"triforce"`` are the whole context."""
    return len(context) <= SINKS + settings.window


def _match(rapid: RapidModels, prompt: PromptTokens, tail: Sequence[int], least: int = 2) -> SuffixMatchProposer:
    return SuffixMatchProposer([*prompt.ids, *tail], rapid.vocabulary, least=least)


@dataclass(frozen=True)
class _Drafting:
    """Makes drafters that see some positions of the context. See ``proposer_for``."""

    rapid: RapidModels
    prompt: PromptTokens
    tail: Sequence[int]
    target: CachedModel
    drafters: DrafterCaches | None

    def model(self, shown: Sequence[int]) -> ModelProposer:
        """The drafter of a proposer that has one."""
        proposer, width = self.rapid.settings.proposer, self.rapid.settings.width
        if proposer.endswith("sparse"):
            return self.on_the_targets_keys(self.rapid.drafter, shown, width)
        return self.small(shown, width) if proposer in ("window", "naive") else self.reader(shown, width)

    def small(self, shown: Sequence[int], width: int = 1) -> ModelProposer:
        """A drafter that sees the context in place: one that is the target itself has no need to read it."""
        if self.rapid.drafter is self.rapid.target:
            return self.on_the_targets_keys(self.rapid.drafter, shown, width)
        return self.reader(shown, width)

    def reader(self, shown: Sequence[int], width: int = 1) -> ModelProposer:
        """The drafter on a prompt of its own."""
        tokens, lm, vocabulary = self._tokens(shown), self.rapid.drafter, self.rapid.vocabulary
        if self.drafters is not None:
            return ModelProposer(self.drafters.for_prompt(lm, tokens, vocabulary), tokens, width)
        return ModelProposer(CachedModel(lm, len(tokens) + _SPARE_TOKENS, vocabulary), tokens, width)

    def on_the_targets_keys(self, lm: TransformersLM, shown: Sequence[int], width: int = 1) -> ModelProposer:
        """The target, or a copy of it, with the target's own keys and values: it reads nothing."""
        tokens = self._tokens(shown)
        model = CachedModel(lm, len(tokens) + _SPARE_TOKENS, self.rapid.vocabulary)
        end = self.target.length - 1  # the last token is fed with the first proposal
        before = len(self.prompt.head)
        kept = [*range(before), *(before + i for i in shown), *range(len(self.prompt.ids), end)]
        model.keep(self.target, kept, end)
        return ModelProposer(model, tokens, width)

    def _tokens(self, shown: Sequence[int]) -> list[int]:
        return [*self.prompt.head, *(self.prompt.context[i] for i in shown), *self.tail]
