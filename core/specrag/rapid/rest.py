"""Candidates from a datastore of texts, without a model (REST; He et al., arXiv 2311.08252)."""

from __future__ import annotations

from collections.abc import Sequence

from specrag.errors import InvalidInputError
from specrag.rapid.datastore import END, LONGEST, Datastore, Occurrences
from specrag.rapid.draft_length import Source
from specrag.rapid.draft_tree import DraftTree, merged
from specrag.rapid.drawing import Drawing
from specrag.rapid.proposers import Proposer

# Each entry: the least length of a match in tokens, and its source with the acceptance that is assumed at first.
_SOURCES = (
    (8, Source("datastore, 8 tokens and more", 0.7, drafts=False)),
    (4, Source("datastore, 4 to 7 tokens", 0.5, drafts=False)),
    (1, Source("datastore, up to 3 tokens", 0.4, drafts=False)),
)


class RestProposer(Proposer):
    """Proposes what follows the longest suffix of the text in a datastore, as a tree.

    Args:
        store: A datastore that was built with the target's tokenizer.
        prompt: The tokens before the answer; the last ``LONGEST`` of them count.
        vocabulary: Tokens below this id may be proposed.
        width: A tree has at most ``width`` times γ candidates.
        least: The shortest suffix that counts, in tokens.
    """

    from_model = False

    def __init__(
        self, store: Datastore, prompt: Sequence[int], vocabulary: int, *, width: int = 4, least: int = 2
    ) -> None:
        self.store, self.vocabulary, self.width, self.least = store, vocabulary, width, least
        self._prompt = list(prompt[-LONGEST:])
        self._found: tuple[int, Occurrences] | None = None  # tokens generated before, and what was found after them

    def source(self, generated: Sequence[int], *, bonus: bool = False) -> Source | None:
        length = self.find(generated).length
        return next((source for least, source in _SOURCES if length >= least), None)

    def find(self, generated: Sequence[int]) -> Occurrences:
        """Where the datastore holds the latest tokens. ``generated`` may only grow from call to call."""
        if self._found is None or self._found[0] != len(generated):
            latest = [*self._prompt, *generated[-LONGEST:]][-LONGEST:]
            self._found = len(generated), self.store.find(latest, self.least)
        return self._found[1]

    def propose(
        self, generated: Sequence[int], count: int, drawing: Drawing, *, bonus: bool = False
    ) -> DraftTree | None:
        found = self.find(generated)
        if not found.length:
            return None
        rows = self.store.continuations(found, count)
        wrong = rows[(rows < END) | (rows >= self.vocabulary)]
        if wrong.size:
            raise InvalidInputError(
                f"the datastore at {self.store.folder} is damaged: it holds token {wrong[0]}, "
                f"the vocabulary has {self.vocabulary}. Build it again"
            )
        tokens, parents = merged(rows.tolist(), count * self.width)
        return DraftTree(tuple(tokens), tuple(parents)) if tokens else None
