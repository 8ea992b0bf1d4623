"""Who writes the candidates of self-reflective RAG and judges them: reflection tokens, or graded prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from specrag.baselines._writing import Writer
from specrag.baselines._yes_no import yes_probabilities
from specrag.baselines.evaluators import RELEVANCE, filled
from specrag.baselines.reflection_tokens import SUPPORT, UTILITY, ReflectionModel, normalised
from specrag.errors import InvalidInputError
from specrag.models.base import GeneratedText, GenerationRequest, LanguageModel, Stage, Turn
from specrag.schema import Draft, DraftFailure, Passage, Usage
from specrag.speculative.drafting import Assignment, total
from specrag.speculative.prompts import Prompts
from specrag.text import passage_text


@dataclass(frozen=True)
class Critique:
    """What is judged of one candidate.

    Attributes:
        relevance: s_rel, in [0, 1].
        support: s_sup, in [0, 1].
        utility: s_use, in [-1, 1].
        text: The mean log-probability of the text's tokens, in nats; ``None`` where the model gives none.
    """

    relevance: float
    support: float
    utility: float
    text: float | None

    def to_row(self) -> dict[str, Any]:
        """As ``SpeculativeAnswer.critiques`` shows it, under the paper's names."""
        return {"ISREL": self.relevance, "ISSUP": self.support, "ISUSE": self.utility, "text": self.text}


@dataclass(frozen=True, kw_only=True)
class ReflectionPrompts:
    """What a model without reflection tokens is asked. Each is answered with yes or no, but the last.

    Attributes:
        retrieve: Does the question need passages ({question})?
        relevant: ISREL ({question}, {text}).
        supported: ISSUP ({question}, {text}, {answer}).
        useful: ISUSE ({question}, {answer}).
        without_passages: Asks for the answer, where no passages are needed ({question}).

    Raises:
        InvalidInputError: A placeholder is missing.
    """

    retrieve: str = (
        "Question: {question}\n\nWould a look into an encyclopedia help to answer the question? Reply with Yes or No "
        "only."
    )
    relevant: str = RELEVANCE
    supported: str = (
        "Text:\n{text}\n\nQuestion: {question}\nAnswer: {answer}\n\nDoes the text support this answer? Reply with Yes "
        "or No only."
    )
    useful: str = (
        "Question: {question}\nAnswer: {answer}\n\nIs this a useful answer to the question? Reply with Yes or No only."
    )
    without_passages: str = "Answer the question in a few words.\n\nQuestion: {question}"

    def __post_init__(self) -> None:
        needed = {"relevant": ("question", "text"), "supported": ("question", "text", "answer")}
        needed["useful"] = ("question", "answer")
        for field in fields(self):
            text = getattr(self, field.name)
            lacking = [n for n in needed.get(field.name, ("question",)) if f"{{{n}}}" not in str(text)]
            if not isinstance(text, str) or lacking:
                raise InvalidInputError(f"ReflectionPrompts.{field.name} lacks {{{'}, {'.join(lacking)}}}")


class Critic(Protocol):
    """What ``SelfReflectiveRAG`` needs of a model."""

    async def needs_passages(self, question: str) -> tuple[float, Usage]:
        """The probability that passages are needed, and the tokens that it took."""

    async def write(self, question: str, assignments: Sequence[Assignment]) -> list[Draft | DraftFailure]:
        """A candidate or failure per assignment, in order. One without passages is answered without."""

    async def judge(self, question: str, drafts: Sequence[Draft]) -> tuple[list[Critique], Usage]:
        """A critique per candidate, in order, and the tokens that they took."""


@dataclass(frozen=True)
class PromptCritic:
    """Graded prompts, for any model that lists likely tokens."""

    lm: LanguageModel
    texts: Prompts
    prompts: ReflectionPrompts
    max_tokens: int

    async def needs_passages(self, question: str) -> tuple[float, Usage]:
        values, usage = await yes_probabilities(self.lm, [filled(self.prompts.retrieve, question=question)])
        return values[0], usage

    async def write(self, question: str, assignments: Sequence[Assignment]) -> list[Draft | DraftFailure]:
        if all(assignment.passages for assignment in assignments):
            return await Writer(self.lm, self.texts, self.max_tokens).drafts(question, assignments)
        turn = Turn.of("user", filled(self.prompts.without_passages, question=question))
        request = GenerationRequest((turn,), (Stage(self.texts.answer_header, self.max_tokens, ("\n",)),))
        return await _written(self.lm, [request], assignments, self.texts)

    async def judge(self, question: str, drafts: Sequence[Draft]) -> tuple[list[Critique], Usage]:
        asked = []
        for draft in drafts:
            text = "\n".join(map(passage_text, draft.passages)) or draft.text
            said = {"question": question, "text": text, "answer": draft.text}
            asked += [
                filled(self.prompts.relevant, question=question, text=text),
                filled(self.prompts.supported, **said),
                filled(self.prompts.useful, question=question, answer=draft.text),
            ]
        values, usage = await yes_probabilities(self.lm, asked)
        return [
            Critique(values[3 * i], values[3 * i + 1], 2 * values[3 * i + 2] - 1, _mean(draft))
            for i, draft in enumerate(drafts)
        ], usage


@dataclass(frozen=True)
class TokenCritic:
    """Reflection tokens, for a model that was trained with them."""

    model: ReflectionModel

    async def needs_passages(self, question: str) -> tuple[float, Usage]:
        return await self.model.retrieval(question)

    async def write(self, question: str, assignments: Sequence[Assignment]) -> list[Draft | DraftFailure]:
        requests = [
            self.model.request(question, assignment.passages[0] if assignment.passages else None)
            for assignment in assignments
        ]
        return await _written(self.model.lm, requests, assignments, Prompts())

    async def judge(self, question: str, drafts: Sequence[Draft]) -> tuple[list[Critique], Usage]:
        pairs = [(draft.passages[0] if draft.passages else Passage(""), draft.text) for draft in drafts]
        made, usage = await self.model.reflect(question, pairs)
        return [
            Critique(
                relevance=normalised(one.relevant[0], one.relevant),
                support=_weighted(one.support, list(SUPPORT.values())),
                utility=_weighted(one.utility, list(UTILITY.values())),
                text=sum(one.text) / len(one.text) if one.text else None,
            )
            for one in made
        ], usage


async def _written(
    lm: LanguageModel, requests: Sequence[GenerationRequest], assignments: Sequence[Assignment], prompts: Prompts
) -> list[Draft | DraftFailure]:
    """The drafts that ``lm`` writes for ``requests``, one per assignment."""
    start = time.perf_counter()
    completions = await lm.agenerate(requests)
    seconds = time.perf_counter() - start
    made: list[Draft | DraftFailure] = []
    for assignment, completion in zip(assignments, completions, strict=True):
        reply: GeneratedText = completion.parts[-1]
        text = reply.text.strip()
        if not text:
            made.append(DraftFailure(assignment.index, assignment.subset, f"{lm.name} wrote no answer"))
            continue
        made.append(
            Draft(
                index=assignment.index,
                subset=assignment.subset,
                passages=assignment.passages,
                text=text,
                rationale="",
                abstained=prompts.is_abstention(text),
                log_answer=total(reply.log_probs),
                answer_tokens=reply.tokens,
                usage=completion.usage,
                seconds=seconds,
                notes=completion.notes,
                drafter=lm.name,
            )
        )
    return made


def _mean(draft: Draft) -> float | None:
    return None if draft.log_answer is None else draft.log_answer / max(draft.answer_tokens, 1)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Σ w p / Σ p; the plain mean of the weights where all p are 0."""
    total_mass = sum(values)
    if total_mass <= 0:
        return sum(weights) / len(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total_mass
