"""Names of systems over a long document: ``long-context``, ``rapid-self-10``, ``rapid-upward-40:candidates=8``, ...

They follow the main table of RAPID's paper (Chen et al., arXiv 2502.20330). Nothing here loads a model or torch, so
that a mistake in a name is found at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from specrag.errors import InvalidInputError
from specrag.evaluation.systems import SYSTEMS, settings_in

if TYPE_CHECKING:
    from specrag.rapid.settings import ProposerName, RapidSettings

# The proposers of `specrag.rapid.settings.ProposerName`, which loads torch; and the names of the paper's table.
_PROPOSERS: dict[str, Any] = {"rapid": "rag", "naive-sd": "naive", "magicdec": "window"} | {
    name: name for name in ("rag", "sparse", "naive", "window", "match", "hybrid", "hybrid-sparse", "rest", "triforce")
}
# An error lists the proposer "rag" as "rapid" only, because "rag-upward" is a system without a proposer.
FORMS = (
    "long-context, long-context-upward, rag, rag-upward, PROPOSER-self and PROPOSER-upward (lossless), "
    "PROPOSER-self-ETA and PROPOSER-upward-ETA (with transfer), and any but the first two with -irrelevant; "
    f"PROPOSER is one of {', '.join(name for name in _PROPOSERS if name != 'rag')}"
)
_SPECULATIVE = re.compile(
    rf"({'|'.join(sorted(_PROPOSERS, key=len, reverse=True))})-(self|upward)(?:-(\d+(?:\.\d+)?))?"
)
# The settings that a name may carry: of sampling; and of drafting, for a system that drafts.
_SAMPLING = ("temperature", "top_k", "top_p")
_DRAFTING = ("candidates", "window", "tree_width", "datastore", "tail", "exact")


@dataclass(frozen=True, kw_only=True)
class LongSystem:
    """One way to answer a question about a long document. ``named`` makes it.

    Attributes:
        name: As ``named`` takes it.
        proposer: Where candidates come from; ``None``: a model decodes alone.
        retrieved: Without a proposer: the model reads the retrieved chunks only ("RAG").
        upward: The other model drafts, or answers where there is no proposer; otherwise the target does.
        strength: η; ``None``: lossless.
        irrelevant: In place of what the question retrieves stand chunks of the document that hold no answer.
        changes: Settings of ``RapidSettings`` and of its ``sampling`` that this system has of its own.
    """

    name: str
    proposer: ProposerName | None = None
    retrieved: bool = False
    upward: bool = False
    strength: float | None = None
    irrelevant: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str) -> LongSystem:
        """The system of that name.

        - ``long-context``: the target reads the document and decodes alone; ``long-context-upward``: the other model.
        - ``rag``: the target reads the retrieved chunks only; ``rag-upward``: the other model does.
        - ``naive-sd-self``, ``magicdec-self``, ``match-self``, ...: lossless speculative decoding. Any proposer of
          ``RapidSettings`` is a name; ``naive-sd`` is ``naive``, ``magicdec`` is ``window``, ``rapid`` is ``rag``.
        - ``rapid-self-10``, ``rapid-upward-40``, ``hybrid-self-5``, ...: with knowledge transfer, η at the end.
        - ``-irrelevant`` after it: the paper's robustness test.
        - ``:candidates=8,temperature=0.5`` at the end: settings of this system alone, of ``RapidSettings`` or of its
          ``sampling``.

        Raises:
            InvalidInputError: There is no such system or setting; the message lists the forms.
        """
        base, _, rest = name.partition(":")
        plain = base.removesuffix("-irrelevant")
        irrelevant = plain != base
        if plain in ("long-context", "long-context-upward") and not irrelevant:
            made = cls(name=name, upward=plain.endswith("upward"))
        elif plain in ("rag", "rag-upward"):
            made = cls(name=name, retrieved=True, upward=plain.endswith("upward"), irrelevant=irrelevant)
        else:
            made = cls._speculative(name, plain, irrelevant)
        allowed = _SAMPLING if made.proposer is None else (*_DRAFTING, *_SAMPLING)
        return replace(made, changes=settings_in(name, rest, allowed)) if rest else made

    @classmethod
    def _speculative(cls, name: str, plain: str, irrelevant: bool) -> LongSystem:
        found = _SPECULATIVE.fullmatch(plain)
        if found is None:
            raise InvalidInputError(f"unknown system {name!r}: expected {FORMS}")
        proposer, drafter, strength = found.groups()
        return cls(
            name=name,
            proposer=_PROPOSERS[proposer],
            upward=drafter == "upward",
            strength=None if strength is None else float(strength),
            irrelevant=irrelevant,
        )

    @property
    def reading(self) -> tuple[str, bool, bool, Any]:
        """What its drafter reads; systems with the same share the reading."""
        kind = "rag" if self.proposer == "hybrid" else self.proposer or ""
        return kind, self.upward, self.irrelevant, self.changes.get("window")

    def settings(self, common: RapidSettings) -> RapidSettings:
        """The settings of its generator. The datastore of ``common`` is for ``rest`` alone.

        Raises:
            InvalidInputError: A setting in its name is out of range. The message begins with the name.
        """
        own = {key: value for key, value in self.changes.items() if key not in _SAMPLING}
        drawn = {key: value for key, value in self.changes.items() if key in _SAMPLING}
        try:
            if drawn:
                own["sampling"] = replace(common.sampling, **drawn)
            if self.proposer != "rest":
                common = replace(common, proposer=self.proposer or "rag", datastore=None)
            if self.proposer is None:
                return replace(common, candidates=0, transfer="none", **own)
            if self.strength is None:
                return replace(common, proposer=self.proposer, transfer="none", **own)
            return replace(common, proposer=self.proposer, transfer="rapid", transfer_strength=self.strength, **own)
        except InvalidInputError as error:
            raise InvalidInputError(f"{self.name}: {error}") from error


def long_systems(names: Sequence[str], *, drafter: bool) -> tuple[LongSystem, ...]:
    """The systems of ``names``, which must go together.

    Args:
        names: As ``LongSystem.named`` takes them.
        drafter: Whether there is a model besides the target.

    Raises:
        InvalidInputError: A name is unknown or there twice, there is none, or a system needs a drafter and there is
            none.
    """
    systems = tuple(LongSystem.named(name) for name in names)
    if not names or len(set(names)) < len(names):
        raise InvalidInputError(f"expected names of systems, each once; got {', '.join(names) or 'none'}")
    if not drafter and (lacking := [system.name for system in systems if system.upward]):
        raise InvalidInputError(f"these systems need a drafter: {', '.join(lacking)}; give one, or leave them out")
    return systems


def over_documents(names: Sequence[str]) -> bool:
    """Whether ``names`` are systems over a long document; otherwise they are systems over passages.

    Raises:
        InvalidInputError: A name is neither, or some are the one and some the other.
    """
    passages = [name for name in names if name.partition(":")[0] in SYSTEMS]
    others = [name for name in names if name not in passages]
    for name in others:
        try:
            LongSystem.named(name)
        except InvalidInputError as error:
            if not str(error).startswith("unknown system"):
                raise
            raise InvalidInputError(
                f"unknown system {name!r}; known are: {', '.join(SYSTEMS)}; and over long documents: {FORMS}"
            ) from error
    if passages and others:
        raise InvalidInputError(
            f"systems over passages ({', '.join(passages)}) and over long documents ({', '.join(others)}) need two runs"
        )
    return bool(others)
