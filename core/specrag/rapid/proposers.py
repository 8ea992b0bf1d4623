"""Where candidate tokens come from: models on a shorter context, matches in a text, or both.

``propose`` is told what was generated so far. It returns candidates, each with the distribution that it was drawn
from. A proposer keeps its own cache in step by itself: it compares what it fed with what was accepted.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specrag.errors import InvalidInputError
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.draft_length import MODEL, Source
from specrag.rapid.draft_tree import DraftTree, draw_branches
from specrag.rapid.drawing import Drawing

#: The first tokens of a context, which a drafter with a window keeps: much attention falls on them (StreamingLLM).
SINKS = 4

# A drafter reads up to this many new tokens together with its first candidate. With more, it reads all but the last
# beforehand.
_LAG = 4


@dataclass(frozen=True)
class Proposal:
    """Candidates and where they came from.

    Attributes:
        tokens: The candidates.
        probabilities: What each was drawn from, and one more row when the caller asked for the bonus position.
        from_model: Per candidate, whether it was drawn from a model's distribution. Only then does the target learn.
        catch_up_seconds: Time in which a model read what was generated without it. It is no cost of drafting.
    """

    tokens: Tensor  # [γ]
    probabilities: Tensor  # [γ or γ + 1, vocabulary]
    from_model: tuple[bool, ...]
    catch_up_seconds: float = 0.0

    @property
    def depth(self) -> int:
        """γ."""
        return len(self.tokens)


class Proposer(ABC):
    """Proposes what comes next. One proposer serves one generation."""

    #: Whether a model stands behind its candidates.
    from_model = True

    @property
    def startup_tokens(self) -> int:
        """Tokens that a model must read before its first candidate."""
        return 0

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        """Where candidates to follow ``generated`` would come from; ``None`` when there is nothing to propose."""
        return MODEL

    def prepare(self) -> None:  # noqa: B027
        """Read what ``startup_tokens`` counts. Before that the model proposes nothing."""

    def widen(self, width: int) -> None:  # noqa: B027
        """Draft trees of this width from now on, where a model drafts trees. 1 is no tree."""

    @abstractmethod
    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | DraftTree | None:
        """Up to ``count`` candidates to follow ``generated``; ``None`` when there is nothing to propose.

        Of a tree, no path is longer than ``count``. ``bonus`` asks for the distribution after the last candidate too;
        then it is no tree.
        """

    @property
    def forward_seconds(self) -> float:
        """Seconds inside forward passes so far."""
        return 0.0


class ModelProposer(Proposer):
    """A model with its own prompt: the retrieved chunks (RAPID's RAG drafter), or the whole context (naive).

    Args:
        model: With an empty cache, or with one that holds ``prompt`` already, all but its last token.
        prompt: What the drafter reads, when it is told to (``prepare``).
        width: With 2 or more it proposes trees: one path, and for each of its candidates ``width`` - 1 alternatives
            from the same distribution. Nothing is drafted after those, so a tree costs no more than its path.
    """

    def __init__(self, model: CachedModel, prompt: Sequence[int], width: int = 1) -> None:
        if not prompt:
            raise InvalidInputError("the drafter's prompt is empty")
        self.model, self.prompt, self.width = model, list(prompt), width
        # The last token of the prompt is fed with the first proposal, for the logits after it.
        self._base = len(self.prompt) - 1
        self._held: list[int] = []  # what the cache holds after the base: tokens, then candidates of the last round

    @property
    def forward_seconds(self) -> float:
        return self.model.forward_seconds

    @property
    def startup_tokens(self) -> int:
        return max(0, self._base - self.model.length)

    def widen(self, width: int) -> None:
        self.width = width

    def prepare(self) -> None:
        if self.model.length < self._base:
            self.model.prefill(self.prompt[self.model.length : self._base])

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | DraftTree | None:
        if self.width == 1 or bonus:
            return self.propose_path(generated, count, drawing, bonus=bonus)
        if self.startup_tokens:
            return None
        logits, caught_up = self.read(generated)
        return self._tree(logits[-1], count, drawing, caught_up)

    def propose_path(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | None:
        """``propose`` without a tree."""
        if self.startup_tokens:
            return None
        read, caught_up = self.read(generated)
        logits = read[-1]
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
        self._held += candidates[: count if bonus else count - 1].tolist()
        return Proposal(candidates, torch.stack(rows), (True,) * count, caught_up)

    def _tree(self, logits: Tensor, count: int, drawing: Drawing, caught_up: float) -> DraftTree:
        """A path of ``count`` candidates, and beside each of them its siblings."""
        path: list[int] = []
        beside: list[tuple[int, int]] = []  # siblings: token and parent
        rows, more = [], []
        for i in range(count):
            tokens, drawn_from = draw_branches(drawing.distribution(logits), self.width, drawing)
            path.append(tokens[0])
            rows.append(drawn_from[:1])
            beside += [(token, i - 1) for token in tokens[1:]]
            more.append(drawn_from[1:])
            if i + 1 < count:
                logits = self.model.feed(tokens[:1])[-1]
        self._held += path[:-1]
        return DraftTree(
            (*path, *(token for token, _ in beside)),
            (*range(-1, count - 1), *(parent for _, parent in beside)),
            torch.cat(rows + more),
            caught_up,
        )

    def read(self, generated: Sequence[int], candidates: Sequence[int] = ()) -> tuple[Tensor, float]:
        """Bring the cache to ``generated`` and then ``candidates``. The prompt was read before.

        Returns:
            The logits after ``generated`` and after each candidate, [candidates + 1, vocabulary], and the seconds that
            it took to read what was generated without this model.
        """
        known = [self.prompt[-1], *generated]
        most = min(len(self._held), len(known) - 1)
        agreed = next((i for i in range(most) if self._held[i] != known[i]), most)
        self.model.rollback_to(self._base + agreed)
        caught_up = 0.0
        if len(known) - agreed > _LAG:
            start = time.perf_counter()
            self.model.feed(known[agreed:-1])
            agreed = len(known) - 1
            caught_up = time.perf_counter() - start
        self._held = [*known, *candidates]
        return self.model.feed(self._held[agreed:])[-len(candidates) - 1 :], caught_up


def sinks_and_window(length: int, sinks: int = SINKS, window: int = 512) -> list[int]:
    """The positions that a streaming drafter sees of a context: the first and the last (StreamingLLM, MagicDec)."""
    if sinks < 0 or window < 1:
        raise InvalidInputError(f"sinks must be at least 0 and window at least 1, got {sinks} and {window}")
    return list(range(length)) if length <= sinks + window else [*range(sinks), *range(length - window, length)]


# The longer a match, the likelier is its next token: of SmolLM2's own text it was right in 0.4 of the cases after a
# match of 2 tokens, in 0.9 and more after 8 and more (benchmarks/suffix_match.py). Each entry: the least length, and
# the source with the acceptance to begin with.
_MATCHES = (
    (8, Source("match of 8 and more", 0.9, drafts=False)),
    (4, Source("match of 4 to 7", 0.7, drafts=False)),
    (3, Source("match of 3", 0.6, drafts=False)),
    (1, Source("match of 1 or 2", 0.4, drafts=False)),
)


class SuffixMatchProposer(Proposer):
    """Copies what followed the longest match of the latest tokens, without a model (REST, prompt lookup).

    It searches a text and what was generated.

    Args:
        text: The tokens to copy from: the prompt, or a datastore.
        vocabulary: Entries of the distributions.
        least: The shortest match that counts, in tokens.
        longest: Longer matches are not told apart.

    Raises:
        InvalidInputError: ``least`` is not from 1 to ``longest``.
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
        """Where the longest match of the latest tokens ends, and its length; length 0 when there is none.

        Of equally long matches the latest counts. ``generated`` may only grow from call to call. Positions count from
        the beginning of the text, and go on in what was generated.
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
    """A match where there is one, else the model."""

    def __init__(self, match: SuffixMatchProposer, model: ModelProposer) -> None:
        self._match, self.model = match, model

    @property
    def startup_tokens(self) -> int:
        return self.model.startup_tokens

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        return (None if bonus else self._match.source(generated)) or MODEL

    def prepare(self) -> None:
        self.model.prepare()

    def widen(self, width: int) -> None:
        self.model.widen(width)

    @property
    def forward_seconds(self) -> float:
        return self.model.forward_seconds

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> Proposal | DraftTree | None:
        found = None if bonus else self._match.propose(generated, count, drawing)
        return found or self.model.propose(generated, count, drawing, bonus=bonus)
