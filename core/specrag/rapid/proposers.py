"""Where candidate tokens come from: models on a shorter context, matches in a text, or both.

One protocol: ``propose`` is told what was generated so far and returns candidates with the distribution that each
was drawn from. A proposer keeps its own cache in step by itself: it compares what it fed with what was accepted.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specrag.engine import forward
from specrag.engine.attention import attend, check_supported, packed_attention
from specrag.engine.kv_cache import rollback_cache
from specrag.engine.sampling import to_probabilities
from specrag.errors import InvalidInputError
from specrag.models.transformers import TransformersLM
from specrag.rapid.draft_length import MODEL, Source

# Tokens of one prefill pass: its activations and mask are what memory holds beside weights and cache.
PREFILL_CHUNK = 512
# Tokens that a drafter reads with its first candidate (the last one and what followed an accepted run); more are read before.
_LAG = 4

Progress = Callable[[int, int], None]


class CachedModel:
    """A model and the cache of one conversation: feed tokens, read logits, roll back.

    Args:
        lm: The model. Its lock is held during each forward pass, so that others may share it.
        capacity: Tokens to make room for.
        vocabulary: Logits beyond so many entries are cut off (padding of the vocabulary).
    """

    def __init__(self, lm: TransformersLM, capacity: int, vocabulary: int) -> None:
        check_supported(lm.model.config)
        self.lm, self.vocabulary = lm, vocabulary
        self.cache = rollback_cache(lm.model.config, capacity)
        self.light = forward.supports(lm.model)  # whether steps of a few tokens take our own forward pass
        self.skipped = 0  # tokens before the next one that the cache leaves out
        self.forward_seconds = 0.0

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.length

    def feed(self, tokens: Sequence[int] | Tensor) -> Tensor:  # [tokens, vocabulary], the model's dtype
        """The logits after each of ``tokens``, which the cache then holds."""
        ids = torch.as_tensor(tokens, device=self.lm.device)[None]
        return self._forward(ids, ids.shape[1])[:, : self.vocabulary]

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Tensor | None:  # [vocabulary]
        """Feed many tokens in chunks of bounded memory; the logits after the last (``None`` without tokens).

        When a chunk fails, the cache is what it was before the call.
        """
        start, logits = self.length, None
        try:
            for at in range(0, len(tokens), PREFILL_CHUNK):
                chunk = tokens[at : at + PREFILL_CHUNK]
                logits = self._forward(torch.tensor([list(chunk)], device=self.lm.device), 1)
                if progress is not None:
                    progress(at + len(chunk), len(tokens))
        except BaseException:
            for layer in self.cache.layers:  # layers may differ: the failure came in the middle of a pass
                layer.rollback(max(0, layer.length - start))
            raise
        return None if logits is None else logits[-1, : self.vocabulary]

    def keep(self, other: CachedModel, positions: Sequence[int], end: int) -> None:
        """Begin with what ``other`` holds at ``positions``, as it holds it; what is fed next stands at position ``end``.

        ``other`` is the same model, or a copy with weights of less precision.
        """
        kept = torch.tensor(positions)
        for own, its in zip(self.cache.layers, other.cache.layers, strict=True):
            kept = kept.to(its.key_buffer.device)
            own.update(*(b[:, :, kept].to(self.lm.device, self.lm.dtype) for b in (its.key_buffer, its.value_buffer)))
        self.skipped = end - len(positions)

    def rollback_to(self, length: int) -> None:
        """Forget everything behind the first ``length`` tokens."""
        self.cache.rollback_to(length)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        model: nn.Module = self.lm.model
        with self.lm.lock, torch.inference_mode(), packed_attention(model):
            start = time.perf_counter()
            first = self.length + self.skipped
            at = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
            if self.light and self.length and ids.shape[1] <= forward.MAX_TOKENS:
                logits = forward.decoder_forward(model, ids, at, self.cache, attend)[0, -keep:]
            else:
                logits = model(
                    input_ids=ids, position_ids=at, past_key_values=self.cache, use_cache=True, logits_to_keep=keep
                ).logits[0]
            if logits.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            self.forward_seconds += time.perf_counter() - start
        return logits


@dataclass(frozen=True)
class Drawing:
    """How candidates are drawn: the same settings as the target's, and a generator on the drafter's device."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def distribution(self, logits: Tensor) -> Tensor:  # [..., vocabulary] -> the same, float32
        """What ``logits`` sample from; at temperature 0 the distribution at temperature 1."""
        return to_probabilities(logits, self.temperature, self.top_k, self.top_p)

    def draw(self, probabilities: Tensor) -> Tensor:  # [vocabulary] -> []
        """One token; the likeliest at temperature 0."""
        if self.temperature == 0:
            return probabilities.argmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[0]


@dataclass(frozen=True)
class Proposal:
    """Candidates and where they came from.

    ``probabilities`` has a row a candidate, and one more when the caller asked for the bonus position.
    ``from_model[i]``: whether candidate i was drawn from a model's distribution; only then does the target learn.
    ``catch_up_seconds``: what a model took to read what was generated without it, which is not the cost of drafting.
    """

    tokens: Tensor  # [γ]
    probabilities: Tensor  # [γ or γ + 1, vocabulary]
    from_model: tuple[bool, ...]
    catch_up_seconds: float = 0.0


class Proposer(ABC):
    """Proposes what comes next. One proposer serves one generation at a time."""

    #: Whether its candidates come from a distribution that a model believes in.
    from_model = True

    @property
    def startup_tokens(self) -> int:
        """Tokens that a model must read before its first candidate."""
        return 0

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        """Where candidates to follow ``generated`` would come from; ``None`` when there is nothing to propose."""
        return MODEL

    def prepare(self) -> None:  # noqa: B027 - most have nothing to read
        """Read them; ``propose`` proposes nothing of that model before."""

    @abstractmethod
    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        """Up to ``count`` candidates to follow ``generated``; ``None`` when there is nothing to propose.

        ``bonus`` asks for the distribution behind the last candidate too.
        """

    @property
    def forward_seconds(self) -> float:
        """Seconds inside forward passes so far."""
        return 0.0


class ModelProposer(Proposer):
    """A model on a prompt of its own: retrieved passages (RAPID's RAG drafter), or the whole context (naive).

    Args:
        model: With an empty cache, or one that holds ``prompt`` already.
        prompt: What the drafter reads, when told to (``prepare``).
    """

    def __init__(self, model: CachedModel, prompt: Sequence[int]) -> None:
        if not prompt:
            raise InvalidInputError("the drafter's prompt is empty")
        self.model, self.prompt = model, list(prompt)
        # The last token of the prompt is fed with the first proposal, for the logits behind it.
        self._base = len(self.prompt) - 1
        self._held: list[int] = []  # what the cache holds behind the base: tokens, then candidates of the last round
        self._certain = 0  # how many of those were accepted already when they were fed

    @property
    def forward_seconds(self) -> float:
        return self.model.forward_seconds

    @property
    def startup_tokens(self) -> int:
        return max(0, self._base - self.model.length)

    def prepare(self) -> None:
        if self.model.length < self._base:
            self.model.prefill(self.prompt[self.model.length : self._base])

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        if self.startup_tokens:
            return None
        sequence = [self.prompt[-1], *generated]
        agreed = min(self._certain, len(sequence) - 1)
        while agreed < min(len(self._held), len(sequence) - 1) and self._held[agreed] == sequence[agreed]:
            agreed += 1
        self.model.rollback_to(self._base + agreed)
        start = time.perf_counter()
        if late := len(sequence) - agreed > _LAG:
            self.model.feed(sequence[agreed:-1])
            agreed = len(sequence) - 1
        caught_up = time.perf_counter() - start if late else 0.0
        logits = self.model.feed(sequence[agreed:])[-1]
        tokens, rows = [], []
        for i in range(count):
            q = drawing.distribution(logits)
            token = drawing.draw(q)
            tokens.append(token)
            rows.append(q)
            if i + 1 < count or bonus:
                logits = self.model.feed(token[None])[-1]
        if bonus:
            rows.append(drawing.distribution(logits))
        candidates = torch.stack(tokens)
        self._certain = len(sequence)
        self._held = [*sequence, *candidates[: count if bonus else count - 1].tolist()]
        return Proposal(candidates, torch.stack(rows), (True,) * count, caught_up)


def sinks_and_window(length: int, sinks: int = 4, window: int = 512) -> list[int]:
    """The positions that a streaming drafter sees of a context: the first and the last (StreamingLLM, MagicDec)."""
    if sinks < 0 or window < 1:
        raise InvalidInputError(f"sinks must be at least 0 and window at least 1, got {sinks} and {window}")
    return list(range(length)) if length <= sinks + window else [*range(sinks), *range(length - window, length)]


# What a match tells grows with its length: of SmolLM2's own text, the token behind a match of 2 was right in 0.4 of the cases,
# behind one of 8 and more in 0.9 and more (benchmarks/suffix_match.py). Each kind: from that length on, and where belief begins.
_MATCHES = (
    (8, Source("match of 8 and more", 0.9, drafts=False)),
    (4, Source("match of 4 to 7", 0.7, drafts=False)),
    (3, Source("match of 3", 0.6, drafts=False)),
    (1, Source("match of 1 or 2", 0.4, drafts=False)),
)


class SuffixMatchProposer(Proposer):
    """Copies what followed the longest match of the latest tokens, in a text or in what was generated: no model, no cost
    (REST, prompt lookup).

    Args:
        text: The tokens to copy from: the prompt, or a datastore.
        vocabulary: Entries of the distributions.
        least: The shortest match that counts, in tokens.
        longest: Where matching stops to look further back.
    """

    from_model = False

    def __init__(self, text: Sequence[int], vocabulary: int, *, least: int = 2, longest: int = 16) -> None:
        if not 1 <= least <= longest:
            raise InvalidInputError(f"least must be from 1 to longest, got {least} and {longest}")
        self.vocabulary, self.least, self.longest = vocabulary, least, longest
        self._known: list[int] = []  # the text, then what was generated
        self._ends: dict[tuple[int, ...], list[int]] = {}  # where runs of ``least`` tokens end; something follows each
        self._add(text)
        self._before = len(self._known)
        self._found = self._search()

    def match(self, generated: Sequence[int]) -> tuple[int, int]:
        """Where the longest match of the latest tokens ends, and its length, 0 when there is none; the latest of equally long ones.

        ``generated`` only grows from call to call. Positions count from the beginning of the text, on into what was generated.
        """
        if new := generated[len(self._known) - self._before :]:
            self._add(new)
            self._found = self._search()
        return self._found

    def _search(self) -> tuple[int, int]:
        known, now = self._known, len(self._known)
        best, best_length = 0, 0
        for end in reversed(self._ends.get(tuple(known[-self.least :]), ())):
            length = self.least
            limit = min(self.longest, end)
            while length < limit and known[end - length - 1] == known[now - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = end, length
                if length == self.longest:
                    break
        return best, best_length

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        _, length = self.match(generated)
        return next((source for least, source in _MATCHES if length >= least), None)

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        end, length = self.match(generated)
        if not length:
            return None
        tokens = torch.tensor(self._known[end : end + count])
        return Proposal(tokens, nn.functional.one_hot(tokens, self.vocabulary).float(), (False,) * len(tokens))

    def _add(self, tokens: Sequence[int]) -> None:
        known, least = self._known, self.least
        for token in tokens:
            if len(known) >= least:
                self._ends.setdefault(tuple(known[-least:]), []).append(len(known))
            known.append(token)


class HybridProposer(Proposer):
    """The match first, the model when there is none."""

    def __init__(self, match: SuffixMatchProposer, model: ModelProposer) -> None:
        self._match, self._model = match, model

    @property
    def startup_tokens(self) -> int:
        return self._model.startup_tokens

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        return (None if bonus else self._match.source(generated)) or MODEL

    def prepare(self) -> None:
        self._model.prepare()

    @property
    def forward_seconds(self) -> float:
        return self._model.forward_seconds

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        found = None if bonus else self._match.propose(generated, count, drawing)
        return found or self._model.propose(generated, count, drawing, bonus=bonus)
