"""How relevant a text is to a question: the retrieval evaluator of corrective RAG (Yan et al., arXiv 2401.15884).

The paper fine-tunes a T5-large for it (section 4.2). Here it is whatever is at hand: a language model that is asked
"yes or no", an embedder, or a sequence-classification model for natural language inference.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specrag._abandoned import in_thread
from specrag._extras import require
from specrag.baselines._yes_no import check_yes_no, yes_probabilities
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel
from specrag.models.embedders import Embedder
from specrag.schema import Usage

#: What a language model is asked of a text. The text stands between two lines, so that it cannot end the prompt.
RELEVANCE = (
    "Text:\n{text}\n\nQuestion: {question}\n\nDoes the text hold the answer to the question? Reply with Yes or No only."
)


class PassageEvaluator(ABC):
    """Grades texts. A subclass implements ``agrade``.

    Attributes:
        name: Which model grades.
        scale: The lowest and the highest grade that it gives. A threshold outside would never or always be passed.
        thresholds: The lower and the upper threshold of ``CorrectiveRAG`` on that scale, where the caller gives none.
    """

    name: str = "evaluator"
    scale: tuple[float, float] = (-math.inf, math.inf)
    thresholds: tuple[float, float] = (0.2, 0.6)

    @abstractmethod
    async def agrade(self, question: str, texts: Sequence[str]) -> tuple[list[float], Usage]:
        """A grade per text, in order, higher for a text that is more relevant; and the tokens that it took.

        Raises:
            ModelError: The model failed.
        """


class LMEvaluator(PassageEvaluator):
    """A language model's P(yes) that a text holds the answer, in [0, 1].

    ``thresholds`` (0.2, 0.6) are not measured: models differ in how sure they are, so choose them on questions of your
    own.

    Args:
        lm: The model. It must list likely tokens.
        prompt: What it is asked, with ``{text}`` and ``{question}``.

    Raises:
        InvalidInputError: The model gives no log-probabilities, or the prompt lacks a placeholder.
    """

    scale = (0.0, 1.0)

    def __init__(self, lm: LanguageModel, prompt: str = RELEVANCE) -> None:
        check_yes_no(lm, "evaluator")
        if "{text}" not in prompt or "{question}" not in prompt:
            raise InvalidInputError("the evaluator's prompt needs {text} and {question}")
        self.lm, self.prompt, self.name = lm, prompt, lm.name

    async def agrade(self, question: str, texts: Sequence[str]) -> tuple[list[float], Usage]:
        return await yes_probabilities(self.lm, [filled(self.prompt, text=text, question=question) for text in texts])


class SimilarityEvaluator(PassageEvaluator):
    """The cosine of an embedder's vectors of question and text, in [-1, 1].

    Similarity is not relevance: a text about the same thing that does not answer is similar too. It is the cheapest
    evaluator.

    ``thresholds`` are chosen for the bundled MiniLM, on 150 questions of NQ dev: the best of ten passages is below 0.47
    for 5 % of the questions with a passage that answers, and above 0.64 for 10 % of those without one
    (``benchmarks/corrective_thresholds.py``). Other embedders have other similarities.
    """

    scale = (-1.0, 1.0)
    thresholds = (0.47, 0.64)

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.name = embedder, embedder.name

    async def agrade(self, question: str, texts: Sequence[str]) -> tuple[list[float], Usage]:
        if not texts:
            return [], Usage()
        vectors = await self.embedder.aembed([question, *texts])  # [1 + texts, dim]
        return [float(value) for value in vectors[1:] @ vectors[0]], Usage()


class NLIEvaluator(PassageEvaluator):
    """The probability that a text entails what the question asks for, in [0, 1].

    ``thresholds`` (0.2, 0.6) are those of ``LMEvaluator``, and not measured either.

    Args:
        model: A folder or hub id that ``AutoModelForSequenceClassification`` loads, or a loaded model (then
            ``tokenizer`` is needed). A model with one output (a reranker) gives the sigmoid of it.
        tokenizer: By default the model's own.
        hypothesis: The second text of the pair, with ``{question}``.
        label: The class that counts; by default the one whose name is "entailment".
        batch_size: Pairs per forward pass.

    Raises:
        MissingExtraError: The extra ``local`` is not installed.
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
        InvalidInputError: No class has that name.
    """

    scale = (0.0, 1.0)

    def __init__(
        self,
        model: str | Path | Any,
        tokenizer: Any = None,
        *,
        hypothesis: str = "This answers the question: {question}",
        label: str = "entailment",
        batch_size: int = 16,
    ) -> None:
        require("torch", "local", "NLIEvaluator")
        from specrag.baselines._nli import PairClassifier

        if "{question}" not in hypothesis:
            raise InvalidInputError("the hypothesis needs {question}")
        self._classifier = PairClassifier(model, tokenizer, label, batch_size)
        self.name, self.hypothesis = self._classifier.name, hypothesis

    async def agrade(self, question: str, texts: Sequence[str]) -> tuple[list[float], Usage]:
        if not texts:
            return [], Usage()
        second = filled(self.hypothesis, question=question)
        values, tokens = await in_thread(self._classifier.probabilities, [(text, second) for text in texts])
        return values, Usage(prompt_tokens=tokens)


def as_evaluator(given: Any, otherwise: LanguageModel) -> PassageEvaluator:
    """The evaluator that a caller means: one as it is, a language model or embedder as one; ``None``: ``otherwise``.

    Raises:
        InvalidInputError: It is none of these.
    """
    if isinstance(given, PassageEvaluator):
        return given
    if given is None or isinstance(given, LanguageModel):
        return LMEvaluator(otherwise if given is None else given)
    if isinstance(given, Embedder):
        return SimilarityEvaluator(given)
    raise InvalidInputError(
        "evaluator must be a PassageEvaluator (LMEvaluator, SimilarityEvaluator, NLIEvaluator), a specrag "
        f"LanguageModel or an Embedder; got {kind_of(given)}"
    )


def filled(template: str, **values: str) -> str:
    """``template`` with its placeholders replaced; braces in the values mean nothing."""
    pieces: list[str] = []
    rest = template
    while rest:
        found = [(at, name) for name in values if (at := rest.find(f"{{{name}}}")) >= 0]
        if not found:
            break
        at, name = min(found)
        pieces += [rest[:at], values[name]]
        rest = rest[at + len(name) + 2 :]
    return "".join([*pieces, rest])
