"""Long documents made of passages, with the evidence at a given depth, as in the tests of long contexts.

Evidence: the passages that answer (``Question.gold``). Filler: passages of a corpus that hold none of the answers.
A depth is the share of the filler's tokens that stand before the evidence: 0 is the beginning of the document, 1 its
end ("Lost in the Middle", Liu et al., arXiv 2307.03172).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from specrag.errors import InvalidInputError
from specrag.evaluation.metrics import contains_answer
from specrag.evaluation.records import Question
from specrag.schema import Passage
from specrag.text import passage_text, spelled

#: The lengths that the papers use, in tokens.
LENGTHS = (4096, 8192, 16384, 32768)
_SEPARATOR = "\n\n"

CountTokens = Callable[[str], int]


def holds_answer(passage: Passage, answers: Sequence[str]) -> bool:
    """Whether a passage holds one of the answers as whole words; "yes", "no", "true" and "false" do not count."""
    return contains_answer(passage_text(passage), spelled(answers))


class LongDocuments:
    """Makes long documents from one corpus; the passages are counted once.

    Args:
        corpus: Passages to fill the documents with. Repetitions are dropped.
        count_tokens: The number of tokens of a text, as the model that will read it counts them.
        tokens: The longest document, in tokens.
        seed: Chooses the filler and its order, and the depths that are left to chance. The same question, corpus and
            seed give the same document.
        repeat: A corpus too small for a document is used again; without it, that is an error.

    Raises:
        InvalidInputError: The corpus is empty, or ``tokens`` is less than 1.
    """

    def __init__(
        self,
        corpus: Sequence[Passage],
        count_tokens: CountTokens,
        tokens: int,
        *,
        seed: int = 0,
        repeat: bool = False,
    ) -> None:
        if tokens < 1:
            raise InvalidInputError(f"tokens must be at least 1, got {tokens}")
        self._corpus = list({passage_text(passage): passage for passage in corpus if passage.text.strip()}.values())
        if not self._corpus:
            raise InvalidInputError("the corpus holds no passage to fill documents with")
        self._count, self.tokens, self._seed, self._repeat = count_tokens, tokens, seed, repeat
        self._sizes: dict[str, int] = {}
        self._gap = count_tokens(_SEPARATOR)

    def make(self, question: Question, depth: float | None = None) -> Question:
        """The question with a document of its own.

        Args:
            question: Its gold passages, in their order, are the evidence; they stand together. A dialogue may have
                none: then its document holds other texts alone.
            depth: Where they stand, from 0 to 1. None: a random depth.

        Returns:
            The question with ``context``, the document; ``passages``, its paragraphs in order; ``gold``, the evidence
            among them; and in ``metadata`` the ``depth`` and the number of ``tokens``.

        Raises:
            InvalidInputError: The question has no gold passage, the depth is not in [0, 1], the evidence alone is too
                long, or the corpus is too small.
        """
        return self.share([question], None if depth is None else [depth])[0]

    def share(self, questions: Sequence[Question], depths: Sequence[float] | None = None) -> list[Question]:
        """The questions with one document for all of them, as for a session of several questions.

        Args:
            questions: The evidence of each stands together; the filler holds no answer to any of them.
            depths: One per question. None: random.

        Returns:
            As ``make``, one per question.

        Raises:
            InvalidInputError: As ``make``; or the numbers of questions and depths differ.
        """
        evidence = [_evidence(question) for question in questions]
        random = np.random.default_rng([self._seed, zlib.crc32("\n".join(q.id for q in questions).encode())])
        places = random.random(len(questions)).tolist() if depths is None else list(depths)
        if not questions or len(places) != len(questions) or any(not 0 <= depth <= 1 for depth in places):
            raise InvalidInputError(f"expected a depth in [0, 1] for each of {len(questions)} questions, got {depths}")
        filler = self._filler(questions, evidence, random)
        parts = self._placed(evidence, filler, places)
        context, tokens = self._fitted(parts)
        passages = tuple(part.passage for part in parts)
        return [
            replace(
                question,
                passages=passages,
                gold=tuple(i for i, part in enumerate(parts) if part.owner == owner),
                context=context,
                metadata={**question.metadata, "depth": places[owner], "tokens": tokens},
            )
            for owner, question in enumerate(questions)
        ]

    def _filler(
        self, questions: Sequence[Question], evidence: list[tuple[Passage, ...]], random: np.random.Generator
    ) -> list[Passage]:
        """Passages in random order that fill what the evidence leaves of the document."""
        left = self.tokens - sum(self._size(passage) for passage in itertools.chain.from_iterable(evidence))
        if left < 0:
            raise self._too_long(self.tokens - left)
        answers = [answer for question in questions for answer in _known(question)]
        own = {passage_text(passage) for passage in itertools.chain.from_iterable(evidence)}
        order = random.permutation(len(self._corpus)).tolist()
        rounds = itertools.repeat(order) if self._repeat else [order]
        chosen: list[Passage] = []
        for turn in rounds:
            before = len(chosen)
            for at in turn:
                passage = self._corpus[at]
                if passage_text(passage) in own or holds_answer(passage, answers):
                    continue
                left -= self._size(passage)
                if left < 0:
                    return chosen
                chosen.append(passage)
            if len(chosen) == before:
                break
        raise InvalidInputError(
            f"evidence and passages without the answers fill {self.tokens - left} of {self.tokens} tokens: give more "
            "passages, make shorter documents, or set repeat=True"
        )

    def _placed(self, evidence: list[tuple[Passage, ...]], filler: list[Passage], depths: list[float]) -> list[_Part]:
        """Filler and evidence in the document's order. ``owner``: the question whose evidence a part is."""
        before = np.concatenate([[0], np.cumsum([self._size(passage) for passage in filler])])
        at = [int(np.argmin(np.abs(before - depth * before[-1]))) for depth in depths]
        parts: list[_Part] = []
        for i in range(len(filler) + 1):
            for owner in sorted((o for o, place in enumerate(at) if place == i), key=lambda o: depths[o]):
                parts += [_Part(passage, owner) for passage in evidence[owner]]
            parts += [_Part(passage, None) for passage in filler[i : i + 1]]
        return parts

    def _fitted(self, parts: list[_Part]) -> tuple[str, int]:
        """The document and its number of tokens. Joined texts may have more tokens than their sum: then filler goes."""
        while True:
            context = _SEPARATOR.join(passage_text(part.passage) for part in parts)
            tokens = self._count(context)
            excess = tokens - self.tokens
            while excess > 0:
                last = max((i for i, part in enumerate(parts) if part.owner is None), default=None)
                if last is None:
                    raise self._too_long(tokens)
                excess -= self._size(parts.pop(last).passage)
            if tokens <= self.tokens:
                return context, tokens

    def _size(self, passage: Passage) -> int:
        text = passage_text(passage)
        if text not in self._sizes:
            self._sizes[text] = self._count(text) + self._gap
        return self._sizes[text]

    def _too_long(self, tokens: int) -> InvalidInputError:
        return InvalidInputError(f"the evidence alone takes {tokens} tokens; the document may have {self.tokens}")


@dataclass(frozen=True)
class _Part:
    passage: Passage
    owner: int | None


def _known(question: Question) -> Iterator[str]:
    """What gives the answer away: the answers; of a dialogue, those of its turns, and the replies."""
    yield from question.answers
    for turn in question.turns:
        yield from (*turn.answers, turn.reply)


def _evidence(question: Question) -> tuple[Passage, ...]:
    if not question.gold and not question.turns:  # what is asked in a dialogue may need no document
        raise InvalidInputError(f"question {question.id!r} has no gold passage to put into a long document")
    return tuple(question.passages[at] for at in question.gold)


def spread(count: int) -> list[float]:
    """``count`` depths, evenly spread inside the document: 1/2 for one, 1/3 and 2/3 for two."""
    return [(i + 1) / (count + 1) for i in range(count)]
