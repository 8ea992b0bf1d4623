"""Confidence: the calibrated probability that an answer is right.

A logistic model over what the pipeline knows of its choice: the winner's scores, how far the second draft is behind,
how many drafts agree, how many abstain, and what the reader and the verifier give to "no answer". It is fitted per
combination of models on questions with known answers, and kept in a small JSON file that names the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from specrag._fields import check_whole_numbers
from specrag._files import path_of, write_text
from specrag.errors import InvalidInputError, NotFoundError
from specrag.schema import Verdict

FORMAT = "specrag-calibration"
VERSION = 1
#: Fewer questions say too little about a probability.
LEAST_QUESTIONS = 50
#: What may be known of a choice; see ``features``.
FEATURES = (
    *("draft", "self_contain", "self_reflect", "listwise", "span", "verdict"),
    *("no_answer", "none", "margin", "agreement", "abstaining"),
)
_SHIPPED = Path(__file__).parent.parent / "data" / "calibrations"
# Features are cut at so many nats: one far outlier shall not decide.
_LOWEST = -20.0


def features(ranked: Sequence[Verdict]) -> dict[str, float]:
    """What is known of the first of ``ranked``, the winner. A feature that its models do not give is left out.

    All are logarithms of probabilities in nats or shares, so that none depends on the length of a text.
    """
    best = ranked[0]
    contest = [verdict for verdict in ranked if not verdict.draft.abstained]
    scores = ("draft", "self_contain", "self_reflect", "listwise", "span", "verdict")
    found: dict[str, float | None] = {name: getattr(best, f"log_{name}") for name in scores}
    found["no_answer"] = best.draft.log_no_answer
    found["none"] = best.log_none
    second = contest[1] if len(contest) > 1 else None
    if best.log_score is not None:
        behind = -_LOWEST if second is None or second.log_score is None else best.log_score - second.log_score
        found["margin"] = min(-_LOWEST, behind)
    drafts = sum(1 + len(verdict.same) for verdict in ranked)
    found["agreement"] = (1 + len(best.same)) / drafts
    found["abstaining"] = 1 - sum(1 + len(verdict.same) for verdict in contest) / drafts
    return {name: max(_LOWEST, float(value)) for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Calibration:
    """P(right) = 1 / (1 + exp(-(bias + Σ weight · feature))).

    Args:
        drafters: The names of the drafters it was fitted for.
        verifier: That of the verifier; ``""`` where none verifies.
        mode: ``Scoring.mode``, settled.
        weights: By feature (``features``).
        bias: What is added.
        questions: How many questions it was fitted on.
        right: The share of them that was answered right.

    Raises:
        InvalidInputError: A name is no text, a weight is of no feature, or a number is not finite.
    """

    drafters: tuple[str, ...]
    verifier: str
    mode: str
    weights: Mapping[str, float]
    bias: float
    questions: int
    right: float

    def __post_init__(self) -> None:
        if isinstance(self.drafters, str) or not all(isinstance(name, str) for name in self.drafters):
            raise InvalidInputError(f"drafters must be a list of names, got {self.drafters!r}")
        object.__setattr__(self, "drafters", tuple(self.drafters))
        for field in ("verifier", "mode"):
            if not isinstance(getattr(self, field), str):
                raise InvalidInputError(f"{field} must be a text, got {getattr(self, field)!r}")
        if not isinstance(self.weights, Mapping):
            raise InvalidInputError(f"weights must map features to numbers, got {self.weights!r}")
        if unknown := [name for name in self.weights if name not in FEATURES]:
            raise InvalidInputError(f"unknown features {unknown}: there are {', '.join(FEATURES)}")
        numbers = {f"the weight of {name}": value for name, value in self.weights.items()}
        numbers |= {"bias": self.bias, "right": self.right}
        for name, value in numbers.items():
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise InvalidInputError(f"{name} is not a number: {value!r}")
        check_whole_numbers(least=0, questions=self.questions)

    def probability(self, found: Mapping[str, float]) -> float | None:
        """P(right) of an answer with the features ``found``; ``None`` where one that counts is missing."""
        if any(name not in found for name in self.weights):
            return None
        logit = self.bias + sum(weight * found[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0

    def fits(self, drafters: Sequence[str], verifier: str, mode: str) -> bool:
        """Whether it was fitted for these models."""
        return (self.drafters, self.verifier, self.mode) == (tuple(map(model_key, drafters)), model_key(verifier), mode)

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, which appears whole or stays as it was.

        Raises:
            InvalidInputError: ``path`` is a folder.
            SpecRAGError: The disk is full, or writing is not allowed.
        """
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(path_of(path), json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: It is not a calibration, or one of another version.
        """
        file = path_of(path)
        if not file.is_file():
            raise NotFoundError(f"no calibration at {file}: make one with `specrag calibrate`")
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("format", None) != FORMAT:
                raise InvalidInputError(f'{file} is not a calibration: it does not say "format": "{FORMAT}"')
            if content.pop("version", None) != VERSION:
                raise InvalidInputError(f"{file} is a calibration of another version: fit it again")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, InvalidInputError):
                raise
            raise InvalidInputError(f"{file} is not a calibration: {error!r}") from error
        try:
            return cls(**content)
        except TypeError as error:
            raise InvalidInputError(f"{file} is not a calibration: {error}") from error
        except InvalidInputError as error:
            raise InvalidInputError(f"{file} is damaged: {error}") from error


def calibration_for(drafters: Sequence[str], verifier: str, mode: str) -> Calibration | None:
    """The calibration that ships for these models; ``None`` where there is none."""
    return next((one for one in _shipped() if one.fits(drafters, verifier, mode)), None)


@cache
def _shipped() -> tuple[Calibration, ...]:
    return tuple(Calibration.load(file) for file in sorted(_SHIPPED.glob("*.json")))


def model_key(name: str) -> str:
    """A model's name without its folder and its file's suffix: the same model in another place is the same model."""
    return Path(name).name.removesuffix(".gguf").lower()


def fit_calibration(
    examples: Sequence[tuple[Mapping[str, float], bool]],
    drafters: Sequence[str],
    verifier: str,
    mode: str,
    *,
    penalty: float = 1.0,
    least: int = LEAST_QUESTIONS,
) -> Calibration:
    """Fit P(right) to answers whose truth is known: logistic regression with an L2 penalty, by Newton's method.

    Args:
        examples: (``features`` of the choice, whether the answer is right) per question.
        drafters, verifier, mode: What it is for.
        penalty: Of the weights of standardised features.
        least: How many questions it takes.

    Raises:
        InvalidInputError: Fewer questions than that, or all are right, or none.
    """
    if len(examples) < least:
        raise InvalidInputError(f"a calibration needs at least {least} questions with an answer, got {len(examples)}")
    truth = np.array([right for _, right in examples], dtype=float)
    if truth.min() == truth.max():
        raise InvalidInputError(f"all {len(examples)} answers are {'right' if truth[0] else 'wrong'}: nothing to fit")
    names = sorted(set.intersection(*(set(found) for found, _ in examples)))
    values = np.array([[found[name] for name in names] for found, _ in examples])
    mean, spread = values.mean(0), values.std(0)
    names = [name for name, s in zip(names, spread, strict=True) if s > 1e-9]
    values = (values[:, spread > 1e-9] - mean[spread > 1e-9]) / spread[spread > 1e-9]
    weights = _logistic(np.column_stack([np.ones(len(values)), values]), truth, penalty)
    scaled = weights[1:] / spread[spread > 1e-9]
    return Calibration(
        drafters=tuple(map(model_key, drafters)),
        verifier=model_key(verifier),
        mode=mode,
        weights={name: float(weight) for name, weight in zip(names, scaled, strict=True)},
        bias=float(weights[0] - scaled @ mean[spread > 1e-9]),
        questions=len(examples),
        right=float(truth.mean()),
    )


def _logistic(inputs: np.ndarray, truth: np.ndarray, penalty: float) -> np.ndarray:  # [examples, features], [examples]
    """Weights of a logistic regression; the first input is the bias and is not penalised."""
    weights = np.zeros(inputs.shape[1])
    ridge = penalty * np.diag([1e-9, *np.ones(inputs.shape[1] - 1)])
    for _ in range(100):
        made = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (made - truth) + ridge @ weights
        step = np.linalg.solve((inputs.T * (made * (1 - made))) @ inputs + ridge, gradient)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights
