"""``specrag eval`` over long documents: what is checked before a model loads, and the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag._files import check_folder_target
from specrag.cli.console import counting, working
from specrag.cli.loading import ModelOptions, check_generating, load_generating
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from specrag.evaluation.long_data import DocumentPlan
    from specrag.evaluation.records import Question
    from specrag.evaluation.runs import Run

RANDOM = "random"
MAX_TOKENS = 48  # of an answer, by default


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """What ``specrag eval`` is given for systems over long documents.

    Attributes:
        names: The systems.
        data: Where the questions come from, for ``run.json``.
        questions: What is asked.
        corpus: All questions of the data, whose passages fill documents.
        plan: How documents are made; ``None``: the questions have their own.
        target: The name of the model that reads the documents.
        chosen: The models, as in ``specrag ask``; the drafter is the other model, if any.
        max_tokens: Of an answer.
        sessions: Where readings are kept.
        seed: Chooses the passages of documents and their depths, irrelevant chunks, and samples.
        retry: Ask again what failed.
    """

    names: Sequence[str]
    data: Path
    questions: Sequence[Question]
    corpus: Sequence[Question]
    plan: DocumentPlan | None
    target: str
    chosen: ModelOptions
    max_tokens: int
    sessions: Path | None
    seed: int
    retry: bool

    def check(self) -> None:
        """Check everything that needs no model.

        Raises:
            SpecRAGError: Something is wrong with the systems, the questions or the models' names.
        """
        from specrag.evaluation.long_data import check_long_questions
        from specrag.evaluation.long_names import long_systems
        from specrag.models._loading import source_of
        from specrag.models.bundled import DRAFTING

        drafters = self.chosen.drafter or ()
        if len(drafters) > 1:
            raise InvalidInputError(f"RAPID has one drafter: give --drafter once, not {len(drafters)} times")
        systems = long_systems(self.names, drafter=bool(drafters))
        check_long_questions(self.questions, self.plan, max_tokens=self.max_tokens)
        check_generating([self.target, *drafters])
        self.chosen.check_models()
        if self.target not in DRAFTING:
            source_of(self.target, "target")
        if self.sessions is not None:
            check_folder_target(self.sessions)
        for system in systems:
            system.settings(self._common())

    def _common(self) -> Any:
        """The settings that all systems share: those of the papers' tables, decoding greedily."""
        from specrag.models.base import Sampling
        from specrag.rapid import RapidSettings

        return RapidSettings(candidates=5, sampling=Sampling(seed=self.seed))

    def ask(self, output: Path) -> Run:
        """Ask every system every question; a run that is in ``output`` goes on."""
        from specrag.evaluation.long_data import turns_of
        from specrag.evaluation.long_run import run_dialogues, run_long_systems
        from specrag.evaluation.long_systems import LongSystems
        from specrag.evaluation.runs import Run

        with working("loading models"):
            folder = self.chosen.models
            target, *others = [load_generating(name, folder) for name in (self.target, *(self.chosen.drafter or ()))]
            runner = LongSystems(
                self.names,
                target,
                others[0] if others else None,
                embedder=self.chosen.load_embedder(),
                settings=self._common(),
                max_tokens=self.max_tokens,
                seed=self.seed,
                sessions=self.sessions,
            )
        with working("making documents"):
            questions = self._with_documents(target.count_tokens)
        dialogues = [turns_of(question) for question in questions]
        asked = [turn for dialogue in dialogues for turn in dialogue]
        settings = self._settings()
        with counting("asking") as bar:
            done, total = self._answered(output), len(asked) * len(self.names)

            def progress(*told: object) -> None:
                nonlocal done
                done += 1
                bar(done, total)

            told: Mapping[str, Any] = {"source": str(self.data), "settings": settings, "retry": self.retry}
            if any(question.turns for question in questions):
                run_dialogues(runner, dialogues, output, progress=progress, **told)
            else:
                run_long_systems(runner, asked, output, progress=progress, **told)
        return Run.load(output)

    def _answered(self, output: Path) -> int:
        """How many answers of these systems an unfinished run in ``output`` has already."""
        from specrag.evaluation.runs import RUN_FILE, Run

        if not (output.expanduser() / RUN_FILE).exists():
            return 0
        rows = [row for row in Run.load(output).answers if row.system in self.names]
        return sum(row.error is None or not self.retry for row in rows)

    def _with_documents(self, count_tokens: Any) -> Sequence[Question]:
        from specrag.evaluation.long_data import filler_of, made_documents

        if self.plan is None:
            return self.questions
        corpus = filler_of(self.corpus)
        groups = made_documents(self.questions, corpus, count_tokens, self.plan, max_tokens=self.max_tokens)
        return [question for group in groups for question in group]

    def _settings(self) -> dict[str, Any]:
        """For ``run.json``: what else changes the answers."""
        if self.plan is None:
            return {"seed": self.seed}
        depth = RANDOM if self.plan.depth is None else self.plan.depth
        return {"seed": self.seed, "documents": list(self.plan.tokens), "depth": depth, "share": self.plan.share}


def plan_of(documents: Sequence[int] | None, depth: str | None, share: int | None, seed: int) -> DocumentPlan | None:
    """How documents are made, as the options say it; ``None`` without ``--documents``.

    Raises:
        InvalidInputError: An option is out of range, or of no use.
    """
    from specrag.evaluation.long_data import DocumentPlan

    if not documents:
        if depth is not None or share is not None:
            raise InvalidInputError("--depth and --share are those of documents that are made: give --documents TOKENS")
        return None
    return DocumentPlan(tokens=tuple(documents), depth=_depth(depth), share=share or 1, seed=seed)


def _depth(given: str | None) -> float | None:
    if given is None or given == RANDOM:
        return None
    try:
        depth = float(given)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise InvalidInputError(f"--depth must be a number in [0, 1] or {RANDOM}, got {given!r}")
    return depth


def check_options(over_documents: bool, passages: Mapping[str, object], documents: Mapping[str, object]) -> None:
    """Check that only options of the chosen kind of systems are given.

    Args:
        over_documents: Whether the systems read long documents; otherwise they read passages.
        passages: The options of systems over passages alone, with what was given.
        documents: The options of systems over long documents alone.

    Raises:
        InvalidInputError: An option of the other kind is given, or ``--target`` is missing.
    """
    other, fitting, read = passages, "passages", "long documents"
    if not over_documents:
        other, fitting, read = documents, read, fitting
    if given := [name for name, value in other.items() if value]:
        raise InvalidInputError(f"{', '.join(given)}: only for systems over {fitting}; those of --systems read {read}")
    if over_documents and not documents["--target"]:
        raise InvalidInputError("systems over long documents need --target: the model that reads the document")
