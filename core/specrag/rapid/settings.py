"""The settings of RAPID, as one value that the core and both adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from specrag._fields import check_whole_numbers
from specrag._files import path_of
from specrag.engine.trees import MAX_ROWS
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import Sampling
from specrag.rapid.acceptance import KnowledgeTransfer, Tail, Transfer
from specrag.rapid.draft_length import MAX_CANDIDATES, checked_candidates

ProposerName = Literal["rag", "sparse", "naive", "window", "match", "hybrid", "hybrid-sparse", "rest", "triforce"]

#: The width of REST's trees where none is given.
REST_WIDTH = 4
#: What ``tree_width="auto"`` chooses from.
AUTO_WIDTHS = (1, 2, 3)
#: η of ``transfer_strength="auto"`` at full retrieval confidence.
AUTO_STRENGTH = 10.0

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RapidSettings:
    """How RAPID drafts, what it samples and how much it retrieves.

    Args:
        candidates: γ, the number of candidate tokens per round. A number is fixed. A sequence is a schedule that is
            replayed round by round; its last entry then stays (``stats.schedule`` of an earlier run repeats that run).
            ``"auto"`` chooses γ from measured costs and acceptance (``AdaptiveLength``). With ``transfer="rapid"`` γ
            changes what is sampled, so give a number or a schedule where a run must repeat exactly.
        transfer: ``"none"``: samples from the target (lossless). ``"rapid"``: the paper's rule. ``"augmented"``:
            samples from the augmented target. See ``specrag.rapid.acceptance``.
        transfer_strength: η, 0 or more; or ``"auto"``, which interpolates η with retrieval confidence, from 0 at a
            cosine of 0.3 to 10 at a cosine of 0.7. This is a heuristic.
        tail: Which tokens the transfer leaves alone. See ``augmented_target``.
        sampling: Temperature, top-k, top-p and seed, of target and drafter alike.
        proposer: Where candidates come from.
            ``"rag"``: the drafter reads the retrieved chunks (RAPID).
            ``"sparse"``: the drafter continues the target's own keys and values of the retrieved chunks, so it reads
            nothing (after TriForce, arXiv 2404.11912); it must be the target or a copy of it.
            ``"window"``: the drafter sees the first 4 and the last ``window`` tokens (MagicDec).
            ``"naive"``: the drafter reads the whole context.
            ``"match"``: no drafter; candidates are copied from after the longest match of the latest tokens.
            ``"hybrid"`` and ``"hybrid-sparse"``: a match of three tokens or more, else ``"rag"`` or ``"sparse"``.
            ``"rest"``: no drafter; a tree of what follows the latest tokens in ``datastore`` (REST, arXiv 2311.08252).
            ``"triforce"``: the drafter sees what it sees with ``"window"``. It proposes to the target on its own keys
            and values of the retrieved chunks, whose tokens the whole target verifies (TriForce, arXiv 2404.11912).
        window: How many of the last tokens of the context the drafter of ``"window"`` and ``"triforce"`` sees.
        datastore: The folder of a datastore, for ``"rest"`` only: ``specrag datastore build`` makes one.
        tree_width: A round verifies a tree of at most ``candidates`` times ``tree_width`` tokens, and at most 63. Its
            paths have at most ``candidates`` tokens. A model drafts one path, and beside each of its candidates stand
            ``tree_width`` - 1 others; ``transfer`` must then be ``"none"``. ``None``: 4 for ``"rest"``; 1, which is no
            tree, for others. ``"auto"``, with ``candidates="auto"`` and a drafter: 1, 2 or 3 from round to round, as
            measured costs and acceptance say.
        exact: At temperature 0 the text is that of decoding without candidates, also where the target rounds a pass
            over several tokens otherwise than single steps: in torch, in bfloat16 and int8. ``transfer`` must be
            ``"none"``.
        retrieval_budget: Tokens of retrieved context. The default is ``RapidGenerator.budget``.

    Raises:
        InvalidInputError: A value is out of range.
    """

    candidates: int | Sequence[int] | Literal["auto"] = "auto"
    transfer: Transfer = "rapid"
    transfer_strength: float | Literal["auto"] = AUTO_STRENGTH
    tail: Tail = "drafter"
    sampling: Sampling = Sampling(temperature=1.0)
    proposer: ProposerName = "hybrid"
    window: int = 512
    datastore: str | None = None
    tree_width: int | Literal["auto"] | None = None
    exact: bool = False
    retrieval_budget: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", checked_candidates(self.candidates))
        if isinstance(self.transfer_strength, str) and self.transfer_strength != "auto":
            raise InvalidInputError(f"transfer_strength must be a number or 'auto', got {self.transfer_strength!r}")
        self.knowledge_transfer()  # checks its values
        if not isinstance(self.sampling, Sampling):
            raise InvalidInputError(f"sampling must be a Sampling, got {self.sampling!r}")
        if self.proposer not in get_args(ProposerName):
            names = ", ".join(get_args(ProposerName))
            raise InvalidInputError(f"proposer must be one of {names}, got {self.proposer!r}")
        check_whole_numbers(least=1, window=self.window)
        if not isinstance(self.exact, bool):
            raise InvalidInputError(f"exact must be True or False, got {self.exact!r}")
        if self.exact and self.transfer != "none":
            raise InvalidInputError(
                f"exact=True needs transfer='none', got {self.transfer!r}: transfer changes the text"
            )
        if self.datastore is not None:
            object.__setattr__(self, "datastore", str(path_of(self.datastore)))  # paths are taken too
            if self.proposer != "rest":
                raise InvalidInputError(
                    f"proposer={self.proposer!r} looks up no datastore: give proposer='rest', or leave datastore out"
                )
        elif self.proposer == "rest":
            raise InvalidInputError(
                "proposer='rest' looks up a datastore: give datastore=FOLDER, made by `specrag datastore build`"
            )
        self._check_tree()
        if self.retrieval_budget is not None:
            check_whole_numbers(least=1, retrieval_budget=self.retrieval_budget)

    @property
    def width(self) -> int:
        """``tree_width``, or its default; with ``"auto"`` that of the first round."""
        return self.widths[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that are chosen from, ascending."""
        if self.tree_width == "auto":
            return AUTO_WIDTHS
        return (self.tree_width or (REST_WIDTH if self.proposer == "rest" else 1),)

    def _check_tree(self) -> None:
        if self.tree_width == "auto":
            if self.candidates != "auto":
                raise InvalidInputError(
                    f"tree_width='auto' is chosen together with candidates='auto', got {self.candidates}: give a number"
                )
            if self.proposer == "rest":
                raise InvalidInputError("proposer='rest' has no tree_width='auto': give a number")
        elif self.tree_width is not None:
            check_whole_numbers(least=1, tree_width=self.tree_width)
        widest = self.widths[-1]
        if widest > 1 and self.proposer in ("match", "triforce"):
            raise InvalidInputError(f"proposer={self.proposer!r} makes no trees: leave tree_width out")
        if widest > 1 and self.proposer != "rest" and self.transfer != "none":
            raise InvalidInputError(
                f"tree_width={self.tree_width!r} needs transfer='none', got {self.transfer!r}: knowledge is "
                "transferred to single candidates only"
            )
        depth = MAX_CANDIDATES if self.candidates == "auto" else max(_schedule(self.candidates))
        auto = f" ('auto' takes up to {MAX_CANDIDATES})" if self.candidates == "auto" else ""
        if (widest > 1 or self.exact) and depth * widest >= MAX_ROWS:
            raise InvalidInputError(
                f"a tree of {depth} x {widest} candidates is wider than the cache's room for a round, "
                f"{MAX_ROWS - 1} candidates{auto}: lower candidates or tree_width"
            )

    @classmethod
    def of(cls, settings: RapidSettings | Mapping[str, Any] | None = None, **changes: Any) -> RapidSettings:
        """Settings from a value, a mapping of fields (``sampling`` may be a mapping too) or nothing, with ``changes``.

        Raises:
            InvalidInputError: A name is not a field, or a value is out of range.
        """
        if settings is not None and not isinstance(settings, RapidSettings | Mapping):
            raise InvalidInputError(f"settings must be RapidSettings or a mapping of its fields, got {settings!r}")
        base = settings if isinstance(settings, RapidSettings) else cls()
        given = {**(settings if isinstance(settings, Mapping) else {}), **changes}
        if isinstance(given.get("sampling"), Mapping):
            given["sampling"] = _changed(base.sampling, given["sampling"])
        return _changed(base, given)

    def with_sampling(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> RapidSettings:
        """The same settings with other sampling. ``None`` keeps what is there."""
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return replace(self, sampling=_changed(self.sampling, {k: v for k, v in given.items() if v is not None}))

    def knowledge_transfer(self, confidence: float = 1.0) -> KnowledgeTransfer:
        """Transfer, η and tail. ``confidence``, in [0, 1], scales η where that is ``"auto"``."""
        strength = self.transfer_strength
        if isinstance(strength, str):
            strength = AUTO_STRENGTH * confidence
        return KnowledgeTransfer(self.transfer, strength, self.tail)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which ``of`` reads back."""
        plain = asdict(self)
        if isinstance(plain["candidates"], tuple):
            plain["candidates"] = list(plain["candidates"])
        return plain


def _schedule(candidates: int | Sequence[int] | str) -> Sequence[int]:
    return (candidates,) if isinstance(candidates, int) else [int(n) for n in candidates]


def _changed(value: _T, changes: Mapping[str, Any]) -> _T:
    """A frozen dataclass with some fields changed; an unknown name is an error that lists the fields."""
    known = [field.name for field in fields(value)]  # type: ignore[arg-type]
    if unknown := [name for name in changes if name not in known]:
        hint = ""
        if isinstance(value, RapidSettings) and set(unknown) & {field.name for field in fields(Sampling)}:
            hint = "; temperature, top_k, top_p and seed are fields of sampling=Sampling(...)"
        raise InvalidInputError(
            f"unknown settings {', '.join(map(str, unknown))}: {kind_of(value)} has {', '.join(known)}{hint}"
        )
    return replace(value, **changes)  # type: ignore[type-var]
