"""Who drafts, who verifies, and what the settings of a pipeline come to for these models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel, Reader
from specrag.schema import OWN_SCORES, Passage, ScoreName
from specrag.speculative.confidence import Calibration, calibration_for
from specrag.speculative.escalation import Escalation
from specrag.speculative.listwise import ListwiseVerifier
from specrag.speculative.prompts import VERIFYING_FIELDS, Prompts
from specrag.speculative.span_verification import NoVerifier, SpanVerifier
from specrag.speculative.verification import DraftVerifier, Scoring, Verifier

Model = LanguageModel | Reader
_MODELS = "a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...)) or a SpanReader"


def as_drafters(given: Model | Sequence[Model]) -> tuple[Model, ...]:
    """The drafters as a tuple.

    Raises:
        InvalidInputError: Something is not a model, or there is none.
    """
    if isinstance(given, Model):
        return (given,)
    if not isinstance(given, list | tuple) or not given:
        raise InvalidInputError(f"drafter must be {_MODELS}, or a list of them; got {kind_of(given)}")
    for i, model in enumerate(given):
        if not isinstance(model, Model):
            raise InvalidInputError(f"drafter[{i}] must be {_MODELS}, got {kind_of(model)}")
    return tuple(given)


@dataclass(frozen=True)
class Roles:
    """The models of a pipeline and what follows from them.

    Args:
        drafters: All of them; the readers copy, the writers (language models) write.
        verifier: As given; ``None`` where none was.
        scoring: As given.
        calibration: As given.
        escalate: As given.
        prompts: As given; ``None``: those that each drafter was trained with.

    Attributes:
        trained: The prompts that each writer was trained with, where a file beside its weights says so.
    """

    drafters: tuple[Model, ...]
    verifier: Model | None
    scoring: Scoring
    calibration: Calibration | Literal["auto"] | None
    escalate: Escalation | None = None
    prompts: Prompts | None = None
    trained: tuple[Prompts | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained", tuple(map(Prompts.trained_with, self.writers)))
        if self.verifier is not None and not isinstance(self.verifier, Model):
            raise InvalidInputError(f"verifier must be {_MODELS}, got {kind_of(self.verifier)}")
        self._check_scores()
        if not isinstance(self.calibration, Calibration) and self.calibration not in ("auto", None):
            raise InvalidInputError(f"calibration must be a Calibration, 'auto' or None, got {self.calibration!r}")
        if self.escalate not in ("passages", "standard", None):
            raise InvalidInputError(f"escalate must be 'passages', 'standard' or None, got {self.escalate!r}")
        if isinstance(self.calibration, Calibration) and not self.calibration.fits(*self.names, self.settled.mode):
            given = self.calibration
            raise InvalidInputError(
                f"the calibration was made for {_pair(given.drafters, given.verifier, given.mode)}, not for "
                f"{_pair(*self.names, self.settled.mode)}: make one with `specrag calibrate`"
            )

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The drafters that copy."""
        return tuple(model for model in self.drafters if isinstance(model, Reader))

    @property
    def writers(self) -> tuple[LanguageModel, ...]:
        """The drafters that write."""
        return tuple(model for model in self.drafters if isinstance(model, LanguageModel))

    @property
    def judge(self) -> Model | None:
        """Who can verify: the verifier, or else the first writer; ``None``: nobody."""
        return self.verifier or next(iter(self.writers), None)

    @property
    def judge_name(self) -> str:
        """The name of who can verify; ``""``: nobody."""
        return "" if self.judge is None else self.judge.name

    @property
    def verifies(self) -> bool:
        """Whether a score that counts comes from the judge."""
        return self.judge is not None and not set(self.settled.counted) <= OWN_SCORES

    @property
    def pooled(self) -> bool:
        """Whether several drafters draft."""
        return len(self.drafters) > 1

    @property
    def merges(self) -> bool:
        """Whether drafts with the same answer become one."""
        return self.pooled or self.settled.mode == "listwise"

    @property
    def settled(self) -> Scoring:
        """The scoring with its mode and its scores settled for these models."""
        mode, scores = self.scoring.mode, self.scoring.scores
        if mode == "auto":
            listwise = bool(self.readers) and isinstance(self.verifier, LanguageModel) and not self._asks_in_doubt
            mode = "listwise" if listwise else "pointwise"
            if scores is None and self._asks_in_doubt:
                scores = ("draft",)
            elif scores is None and self._judge_themselves:
                scores = ("draft", "verdict", "agreement") if self.pooled else ("draft", "verdict")
        if scores is None and not isinstance(self.judge, LanguageModel):
            scores = ("draft",) if self.judge is None else ("draft", "span")
        elif scores is None and self.pooled:
            scores = (*replace(self.scoring, mode=mode).counted, "agreement")
        return replace(self.scoring, mode=mode, scores=scores)

    def _check_scores(self) -> None:
        """Whether these models make the scores that are asked for by name.

        Raises:
            InvalidInputError: They do not.
        """
        if self.scoring.mode == "listwise" and not isinstance(self.judge, LanguageModel):
            raise InvalidInputError("mode='listwise' needs a verifier that is a language model: it compares the drafts")
        made: set[str] = {"draft", "agreement"}
        if any(map(self._header, self.writers)):
            made.add("verdict")
        if isinstance(self.judge, Reader):
            made.add("span")
        elif self.judge is not None:
            made |= {"listwise"} if self.settled.mode == "listwise" else {"self_contain", "self_reflect"}
        if missing := [name for name in self.scoring.scores or () if name not in made]:
            who = "nobody verifies" if self.judge is None else f"{self.judge.name} verifies ({self.settled.mode})"
            train = "; `specrag train --verdict` makes a drafter that gives verdicts" if "verdict" in missing else ""
            raise InvalidInputError(
                f"no model makes the scores {', '.join(missing)}, since {who}: "
                f"choose among {', '.join(sorted(made))}{train}"
            )

    @property
    def _judge_themselves(self) -> bool:
        """Whether every drafter was trained to judge its own drafts, and nothing is asked of a verifier."""
        alone = self.verifier is None and not self.readers and not _asks_verifier(self.scoring, self.texts)
        return alone and all(map(self._header, self.writers))

    @property
    def texts(self) -> Prompts:
        """The prompts of the pipeline: as given, or those of the first writer that was trained with some.

        What comes before a verdict belongs to one writer, so that is left out; ``drafting_texts`` has it.
        """
        if self.prompts is not None:
            return self.prompts
        own = next((own for own in self.trained if own is not None), Prompts())
        return replace(own, verdict_header=None)

    def drafting_texts(self, writer: LanguageModel) -> Prompts:
        """The prompts that ``writer`` drafts with. A verdict is asked of it where it counts, and was trained."""
        counts = "verdict" in self.settled.counted
        return replace(self.texts, verdict_header=self._header(writer) if counts else None)

    def _header(self, writer: LanguageModel) -> str | None:
        """What comes before the verdict of ``writer``: as it was trained, or as the prompts say for one on a server."""
        own = self.trained[self.writers.index(writer)]
        if own is not None:
            return own.verdict_header
        return None if self.prompts is None else self.prompts.verdict_header

    @property
    def _asks_in_doubt(self) -> bool:
        """Whether the verifier only answers in doubt, and scores nothing.

        So it is by default where readers draft alone and there is escalation: a trained reader chooses better than a
        small language model that compares its spans (docs/results.md). A calibration for listwise scores asks for them.
        """
        compared = isinstance(self.calibration, Calibration) and self.calibration.mode == "listwise"
        return self.escalate is not None and not self.writers and not compared

    @property
    def names(self) -> tuple[tuple[str, ...], str]:
        """The names of the drafters and of who verifies; ``""``: nobody."""
        return tuple(model.name for model in self.drafters), self.judge_name if self.verifies else ""

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration in use."""
        if self.calibration != "auto":
            return self.calibration
        found = calibration_for(*self.names, self.settled.mode)
        fits = found is not None and _scored_as_shipped(self.scoring, self.settled, found, written=bool(self.writers))
        return found if fits else None

    def verifying(self, prompts: Prompts, passages: Sequence[Passage]) -> DraftVerifier:
        """Whatever scores the drafts of a question, all of whose passages are ``passages``."""
        judge, scoring = self.judge, self.settled
        if judge is None or not self.verifies:
            return NoVerifier(scoring)
        if isinstance(judge, Reader):
            return SpanVerifier(judge, tuple(passages), scoring)
        return (ListwiseVerifier if scoring.mode == "listwise" else Verifier)(judge, prompts, scoring)

    def check_confidence(self, min_confidence: float | None, below: float) -> None:
        """Whether these settings make sense for these models.

        Raises:
            InvalidInputError: They do not.
        """
        check_numbers(min_confidence=min_confidence, escalate_below=below)
        for name, value in (("min_confidence", min_confidence), ("escalate_below", below)):
            if value is not None and not 0 <= value <= 1:
                raise InvalidInputError(f"{name} must be a probability in [0, 1], got {value}")
        if self.escalate is not None and not isinstance(self.judge, LanguageModel):
            raise InvalidInputError("escalate needs a verifier that is a language model: it answers itself")
        wanted = "min_confidence" if min_confidence is not None else "escalate" if self.escalate else None
        if wanted and self.calibrated is None:
            raise InvalidInputError(
                f"{wanted} needs a calibration, and none ships for {_pair(*self.names, self.settled.mode)}: "
                "make one with `specrag calibrate` and give calibration="
            )


def check_types(**values: tuple[Any, Any, str]) -> None:
    """Whether each value has its type: name = (value, type or types, what is expected).

    Raises:
        InvalidInputError: One has not.
    """
    for name, (value, kind, expected) in values.items():
        if not isinstance(value, kind):
            raise InvalidInputError(f"{name} must be {expected}, got {kind_of(value)}")


def _asks_verifier(scoring: Scoring, texts: Prompts) -> bool:
    """Whether settings are for a verifier: its evidence, weights of its scores, or prompts that are not the default."""
    prompted = any(getattr(texts, name) != getattr(Prompts, name) for name in VERIFYING_FIELDS)
    return prompted or not set(scoring.weights or ()) <= OWN_SCORES or scoring.evidence != Scoring.evidence


def _scored_as_shipped(given: Scoring, settled: Scoring, shipped: Calibration, *, written: bool) -> bool:
    """Whether drafts are scored as those were that ``shipped`` was fitted on: by default settings."""
    scores = {name for name in shipped.weights if name in get_args(ScoreName)} - {"agreement"}
    default = not given.weights and given.normalization == Scoring.normalization
    return scores <= set(settled.counted) and (default or not written)


def _pair(drafters: Sequence[str], verifier: str, mode: str) -> str:
    return f"{', '.join(drafters)} verified by {verifier or 'nobody'} ({mode})"
