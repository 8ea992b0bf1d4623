"""Systems over passages by name: ``standard``, ``speculative:subsets=random,drafts=10``, ...

A name may carry settings, so that ablations stand side by side in one run. Everything is checked when the systems are
built, before any question is asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from specrag.baselines import CorrectiveRAG, SelfReflectiveRAG, StandardRAG, System, drafter_alone, extractive_pair
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import LanguageModel, Reader
from specrag.models.embedders import Embedder
from specrag.speculative._roles import Model, as_drafters
from specrag.speculative.pipeline import SpeculativeRAG
from specrag.speculative.prompts import SELF_REFLECTION_STATEMENTS, Prompts
from specrag.speculative.verification import Scoring, with_self_reflection


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the systems are made from.

    Args:
        drafter: One model or several.
        verifier: The larger model. By default the first drafter that is a language model.
        embedder: Makes perspectives, and may grade passages. By default the bundled MiniLM.
        second: The second retriever of corrective RAG.
        settings: Settings of ``SpeculativeRAG`` for every system that is one, unless its name says otherwise.
    """

    drafter: Model | Sequence[Model]
    verifier: Model | None = None
    embedder: Embedder | None = None
    second: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reading_model(self) -> LanguageModel:
        """The model that reads all passages: the verifier, or else the first drafter that is a language model.

        Raises:
            InvalidInputError: No language model is there.
        """
        for model in (self.verifier, *as_drafters(self.drafter)):
            if isinstance(model, LanguageModel):
                return model
        raise InvalidInputError(
            "this system needs a language model: give one as the verifier (a reader only finds spans)"
        )


@dataclass(frozen=True)
class Kind:
    """A system that has a name.

    Attributes:
        make: Builds it from the parts and the settings in its name.
        settings: The settings that its name may carry.
        about: One line for lists.
        roles: Whose tokens the answer's ``drafter_usage`` and ``verifier_usage`` are.
    """

    make: Callable[[Parts, dict[str, Any]], System]
    settings: tuple[str, ...]
    about: str
    roles: tuple[str, str] = ("drafter", "verifier")


@dataclass(frozen=True)
class Entry:
    """A system as a run asks it. ``about``: its models and settings, for ``run.json``."""

    system: System
    roles: tuple[str, str] = ("drafter", "verifier")

    @property
    def about(self) -> dict[str, Any]:
        return about(self.system)


_SCORING = ("scores", "normalization", "evidence", "mode", "threshold")
_SPECULATIVE = (
    *("drafts", "passages_per_draft", "subsets", "max_rationale_tokens", "max_answer_tokens"),
    *("min_confidence", "escalate", "escalate_below", "deadline", "seed"),
)


def _speculative_settings(parts: Parts, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of ``SpeculativeRAG`` out of those in a name."""
    settings = {"embedder": parts.embedder, **parts.settings}
    scoring = {name: given.pop(name) for name in _SCORING if name in given}
    if "scores" in scoring:
        scoring["scores"] = tuple(str(scoring["scores"]).split("+"))
    if scoring:
        settings["scoring"] = replace(settings.get("scoring") or Scoring(), **scoring)
    statement = given.pop("statement", None)
    if statement is not None:
        if statement not in range(1, len(SELF_REFLECTION_STATEMENTS) + 1):
            raise InvalidInputError(f"statement must be 1 to {len(SELF_REFLECTION_STATEMENTS)}, got {statement!r}")
        base = settings.get("prompts") or _trained_with(parts) or Prompts()
        settings["prompts"] = replace(base, statement=SELF_REFLECTION_STATEMENTS[statement - 1])
        settings["scoring"] = with_self_reflection(settings.get("scoring") or Scoring())
    return {**settings, **given}


def _trained_with(parts: Parts) -> Prompts | None:
    writers = [model for model in as_drafters(parts.drafter) if isinstance(model, LanguageModel)]
    return next((own for writer in writers if (own := Prompts.trained_with(writer)) is not None), None)


def _speculative(parts: Parts, given: dict[str, Any]) -> System:
    verifier = given.pop("verifier", "given")
    if verifier not in ("given", "own"):
        raise InvalidInputError(f"verifier must be 'given' or 'own' (the drafter verifies itself), got {verifier!r}")
    settings = _speculative_settings(parts, given)
    own = next((model for model in as_drafters(parts.drafter) if isinstance(model, LanguageModel)), None)
    return SpeculativeRAG(drafter=parts.drafter, verifier=parts.verifier if verifier == "given" else own, **settings)


def _drafter(parts: Parts, given: dict[str, Any]) -> System:
    return drafter_alone(parts.drafter, **_speculative_settings(parts, given))  # type: ignore[arg-type]


def _extractive_pair(parts: Parts, given: dict[str, Any]) -> System:
    readers = [model for model in as_drafters(parts.drafter) if isinstance(model, Reader)]
    if not readers or not isinstance(parts.verifier, Reader):
        raise InvalidInputError("extractive-pair needs a reader as the drafter and another as the verifier")
    return extractive_pair(readers[0], parts.verifier, **_speculative_settings(parts, given))


def _standard(parts: Parts, given: dict[str, Any]) -> System:
    return StandardRAG(model=parts.reading_model, **given)


def _corrective(parts: Parts, given: dict[str, Any]) -> System:
    evaluators = {"model": parts.reading_model, "embedder": parts.embedder, "drafter": as_drafters(parts.drafter)[0]}
    named = given.pop("evaluator", "model")
    if named not in evaluators or evaluators[named] is None:
        raise InvalidInputError(f"evaluator must be model, drafter, or embedder (where one is given), got {named!r}")
    return CorrectiveRAG(model=parts.reading_model, evaluator=evaluators[named], second=parts.second, **given)


def _self_reflective(parts: Parts, given: dict[str, Any]) -> System:
    return SelfReflectiveRAG(model=parts.reading_model, **given)


#: Every kind of system by its name.
SYSTEMS: dict[str, Kind] = {
    "standard": Kind(
        _standard, ("max_answer_tokens",), "the verifier's model reads all passages", ("verifier", "verifier")
    ),
    "corrective": Kind(
        _corrective,
        ("evaluator", "upper", "lower", "strips", "strip_sentences", "strip_threshold", "max_answer_tokens"),
        "passages are graded, and strips of them are kept (Yan et al., 2401.15884)",
        ("verifier", "evaluator"),
    ),
    "self-reflective": Kind(
        _self_reflective,
        ("candidates", "reflection", "retrieve", "retrieve_above", "max_answer_tokens"),
        "one candidate per passage, each judged by its writer (Asai et al., 2310.11511)",
        ("verifier", "verifier"),
    ),
    "drafter": Kind(_drafter, (*_SPECULATIVE, "normalization"), "the drafter's best draft by its own score"),
    "extractive-pair": Kind(
        _extractive_pair, (*_SPECULATIVE, *_SCORING), "a reader drafts spans, a larger reader verifies them"
    ),
    "speculative": Kind(
        _speculative,
        (*_SPECULATIVE, *_SCORING, "statement", "verifier"),
        "drafts from subsets, verified (Wang et al., 2407.08223)",
    ),
}


def split_names(text: str) -> list[str]:
    """The names in a list with commas; ``drafts=10`` after a comma belongs to the name before it.

    Raises:
        InvalidInputError: The list is empty, or begins with a setting.
    """
    names: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if "=" in piece and ":" not in piece:
            if not names:
                raise InvalidInputError(f"{piece!r} stands before any system: write system:{piece}")
            names[-1] += ("," if ":" in names[-1] else ":") + piece
        elif piece:
            names.append(piece)
    if not names:
        raise InvalidInputError(f"name at least one system of {', '.join(SYSTEMS)}")
    return names


def check_names(names: Sequence[str]) -> None:
    """Check ``names`` before any model is loaded.

    Raises:
        InvalidInputError: An unknown name or setting.
    """
    for name in names:
        _parsed(name)


def build(names: Sequence[str], parts: Parts) -> dict[str, Entry]:
    """The systems that ``names`` mean, by name.

    Raises:
        InvalidInputError: An unknown name or setting, a name given twice, or a model that lacks what a system needs.
            The message begins with the name.
    """
    made: dict[str, Entry] = {}
    for name in names:
        kind, given = _parsed(name)
        if name in made:
            raise InvalidInputError(f"the system {name!r} is named twice")
        try:
            made[name] = Entry(kind.make(parts, given), kind.roles)
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error}") from error
    return made


def _parsed(name: str) -> tuple[Kind, dict[str, Any]]:
    """The kind that a name means, and the settings in it."""
    base, _, rest = name.partition(":")
    if base not in SYSTEMS:
        raise InvalidInputError(f"unknown system {base!r}; known are: {', '.join(SYSTEMS)}")
    kind = SYSTEMS[base]
    return kind, settings_in(name, rest, kind.settings)


def settings_in(name: str, text: str, allowed: Sequence[str]) -> dict[str, Any]:
    """The settings in a system's name.

    Args:
        name: The whole name, for messages.
        text: What stands after the colon: ``drafts=10,subsets=random``.
        allowed: The settings that this system has.

    Raises:
        InvalidInputError: A piece is no setting of this system.
    """
    given = {}
    for piece in filter(None, text.split(",")):
        key, equals, value = piece.partition("=")
        if not equals or key not in allowed:
            raise InvalidInputError(f"{name}: expected settings as name=value of {', '.join(allowed)}; got {piece!r}")
        given[key] = _value(value)
    return given


def _value(text: str) -> Any:
    """A setting's value: a number, true, false, null, or a text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def about(system: Any) -> dict[str, Any]:
    """A system's models and settings as plain values, the same for the same system."""
    told = {"kind": type(system).__name__}
    if not is_dataclass(system):
        return told
    shown = {f.name: _told(getattr(system, f.name)) for f in fields(system) if f.init}
    return told | {name: value for name, value in shown.items() if value is not None}


def _told(value: Any) -> Any:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _told(item) for key, item in value.items()}
    if name := getattr(value, "name", None):
        quantization = getattr(value, "quantization", None)
        return f"{name} ({quantization})" if quantization else str(name)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _told(getattr(value, f.name)) for f in fields(value) if f.init}
    return kind_of(value)
