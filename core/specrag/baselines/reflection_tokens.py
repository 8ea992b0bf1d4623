"""The reflection tokens of Self-RAG, for models whose vocabulary has them (Asai et al., arXiv 2310.11511, Table 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specrag.errors import InvalidInputError, ModelError
from specrag.models.base import GenerationRequest, LanguageModel, Segment, Stage, Turn
from specrag.schema import Passage, Usage
from specrag.text import passage_text

RETRIEVAL, NO_RETRIEVAL = "[Retrieval]", "[No Retrieval]"
RELEVANT, IRRELEVANT = "[Relevant]", "[Irrelevant]"
#: Of ISSUP, with what each counts (appendix A.3): fully supported 1, partially 0.5.
SUPPORT: Mapping[str, float] = {
    "[Fully supported]": 1.0,
    "[Partially supported]": 0.5,
    "[No support / Contradictory]": 0.0,
}
#: Of ISUSE, with what each counts (appendix A.3).
UTILITY: Mapping[str, float] = {f"[Utility:{i}]": (i - 3) / 2 for i in range(1, 6)}
PARAGRAPH = ("<paragraph>", "</paragraph>")
ALL_TOKENS = (RETRIEVAL, NO_RETRIEVAL, RELEVANT, IRRELEVANT, *SUPPORT, *UTILITY, *PARAGRAPH)


def has_reflection_tokens(lm: LanguageModel) -> bool:
    """Whether each reflection token is one entry of the vocabulary of ``lm``, which runs in this process."""
    tokenizer = getattr(lm, "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        return False
    known = tokenizer.get_vocab()
    return all(token in known for token in ALL_TOKENS)


def check_reflection_tokens(lm: LanguageModel) -> None:
    """Check that ``lm`` has the reflection tokens.

    Raises:
        InvalidInputError: It has not; the message names the first that is missing.
    """
    if has_reflection_tokens(lm):
        return
    tokenizer = getattr(lm, "tokenizer", None)
    known = tokenizer.get_vocab() if tokenizer is not None and hasattr(tokenizer, "get_vocab") else {}
    missing = next(token for token in ALL_TOKENS if token not in known)
    raise InvalidInputError(
        f"{lm.name} has no reflection token {missing!r}: use a Self-RAG model in this process, or reflection='prompts'"
    )


@dataclass(frozen=True)
class Reflection:
    """What the model says of one candidate: the probabilities of the tokens of each group, as they come.

    Attributes:
        relevant: Of ``[Relevant]`` and ``[Irrelevant]``, after the passage.
        support: Of the three tokens of ISSUP, after the text.
        utility: Of the five of ISUSE, after the likeliest token of ISSUP.
        text: log P of each token of the text, in nats.
    """

    relevant: tuple[float, float]
    support: tuple[float, float, float]
    utility: tuple[float, float, float, float, float]
    text: tuple[float, ...]


@dataclass(frozen=True)
class ReflectionModel:
    """Asks a model that was trained with reflection tokens, in the format of Self-RAG's training.

    Args:
        lm: The model, in this process.
        max_tokens: Of an answer.
    """

    lm: LanguageModel
    max_tokens: int

    async def retrieval(self, question: str) -> tuple[float, Usage]:
        """P([Retrieval]) / (P([Retrieval]) + P([No Retrieval])), and the tokens read."""
        values, usage = await self._next(question, (), (RETRIEVAL, NO_RETRIEVAL))
        return normalised(values[0], values), usage

    def request(self, question: str, passage: Passage | None) -> GenerationRequest:
        """What the model is asked for a candidate: with ``passage``, or without any.

        The stop strings are the tokens that end a text. Where the tokenizer hides special tokens they end nothing, and
        what follows them is no text.
        """
        header = "".join(segment.text for segment in self._opening(passage))
        ends = (*SUPPORT, *UTILITY, "\n")
        return GenerationRequest((self._asked(question),), (Stage(header, self.max_tokens, ends),))

    async def reflect(self, question: str, candidates: Sequence[tuple[Passage, str]]) -> tuple[list[Reflection], Usage]:
        """What the model says of each (passage, text), in order. Two batches of scores."""
        first = [
            self._scored(question, passage, relevance, ("text", text), ("support", support))
            for passage, text in candidates
            for relevance, support in [(RELEVANT, token) for token in SUPPORT]
        ]
        irrelevant = [self._scored(question, passage, IRRELEVANT) for passage, _ in candidates]
        scores = await self.lm.ascore([*first, *irrelevant])
        usage = sum((score.usage for score in scores), Usage())
        supports = [
            [_only(scores[i * len(SUPPORT) + j].log_probs, "support") for j in range(len(SUPPORT))]
            for i in range(len(candidates))
        ]
        likeliest = [list(SUPPORT)[max(range(len(values)), key=values.__getitem__)] for values in supports]
        second = await self.lm.ascore(
            [
                self._scored(question, passage, RELEVANT, ("", text), (None, support), ("utility", token))
                for (passage, text), support in zip(candidates, likeliest, strict=True)
                for token in UTILITY
            ]
        )
        usage += sum((score.usage for score in second), Usage())
        made = []
        for i in range(len(candidates)):
            known = scores[i * len(SUPPORT)].log_probs
            used = [_only(second[i * len(UTILITY) + j].log_probs, "utility") for j in range(len(UTILITY))]
            pair = (_only(known, "relevance"), _only(scores[len(first) + i].log_probs, "relevance"))
            made.append(
                Reflection(
                    relevant=_exp(pair),  # type: ignore[arg-type]
                    support=_exp(supports[i]),  # type: ignore[arg-type]
                    utility=_exp(used),  # type: ignore[arg-type]
                    text=tuple(known.get("text", ())),
                )
            )
        return made, usage

    async def _next(self, question: str, before: Sequence[Segment], tokens: Sequence[str]) -> tuple[list[float], Usage]:
        """The probability of each of ``tokens`` after ``before``."""
        turns = [
            (self._asked(question), Turn("assistant", (*self._begun(), *before, Segment(token, "next", True))))
            for token in tokens
        ]
        scores = await self.lm.ascore(turns)
        usage = sum((score.usage for score in scores), Usage())
        return [math.exp(_only(score.log_probs, "next")) for score in scores], usage

    def _scored(
        self, question: str, passage: Passage, relevance: str, *parts: tuple[str | None, str]
    ) -> tuple[Turn, Turn]:
        """A conversation with the token ``relevance`` after ``passage``, and then ``parts``: (name, text).

        A name of ``""`` marks the text, which is not scored; every other part is a reflection token.
        """
        opening = self._opening(passage)[:-1]
        segments = [*opening, Segment(relevance, "relevance", True)]
        segments += [Segment(text, name or None, name not in ("", "text")) for name, text in parts]
        return self._asked(question), Turn("assistant", tuple(segments))

    def _opening(self, passage: Passage | None) -> list[Segment]:
        """How the reply begins, up to the first token of the text."""
        if passage is None:
            return [*self._begun(), Segment(NO_RETRIEVAL, control=True)]
        begin, end = PARAGRAPH
        return [
            *self._begun(),
            Segment(RETRIEVAL + begin, control=True),
            Segment(self._defused(passage_text(passage))),
            Segment(end, control=True),
            Segment(RELEVANT, control=True),
        ]

    def _defused(self, text: str) -> str:
        """``text`` in which no token of the model means anything: the beginning of a reply is fed as it is."""
        encoder = getattr(self.lm, "encoder", None)
        return str(encoder.sanitize(text)) if encoder is not None else text

    def _asked(self, question: str) -> Turn:
        return Turn.of("user", f"### Instruction:\n{question}" if self._plain else question)

    def _begun(self) -> list[Segment]:
        return [Segment("### Response:\n")] if self._plain else []

    @property
    def _plain(self) -> bool:
        """Whether the model has no chat template: then Self-RAG's own format serves."""
        return getattr(getattr(self.lm, "encoder", None), "template", None) is None


def normalised(value: float, values: Sequence[float]) -> float:
    """The share of ``value`` among ``values``; an equal share where all are 0."""
    total = sum(values)
    return value / total if total > 0 else 1 / len(values)


def _only(log_probs: Mapping[str, tuple[float, ...]], name: str) -> float:
    """The log-probability of a piece that is one token.

    Raises:
        ModelError: The tokenizer does not keep it as one.
    """
    found = log_probs.get(name, ())
    if len(found) != 1:
        raise ModelError(f"a reflection token became {len(found)} tokens: the tokenizer splits it")
    return found[0]


def _exp(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(math.exp, values))
