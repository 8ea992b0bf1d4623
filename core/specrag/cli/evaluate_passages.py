"""``specrag eval`` over passages: what is checked before a model loads, and the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specrag.cli.console import counting, working
from specrag.cli.loading import ModelOptions
from specrag.cli.options import check_index

if TYPE_CHECKING:
    from specrag.evaluation.records import Question
    from specrag.evaluation.runs import Run
    from specrag.models.embedders import Embedder
    from specrag.retrieval import PassageIndex


@dataclass(frozen=True, kw_only=True)
class PassagesRun:
    """What ``specrag eval`` is given for systems over passages.

    Attributes:
        names: The systems.
        data: Where the questions come from, for ``run.json``.
        questions: What is asked.
        chosen: The models, as in ``specrag ask``.
        retrieve: An index that the passages come from, ``top`` for each question; ``None``: the questions have theirs.
        second: The index of corrective RAG's second retriever.
        seed: Of the systems.
        retry: Ask again what failed.
    """

    names: Sequence[str]
    data: Path
    questions: Sequence[Question]
    chosen: ModelOptions
    retrieve: Path | None
    top: int
    second: Path | None
    seed: int
    retry: bool

    def check(self) -> None:
        """Check everything that needs no model.

        Raises:
            SpecRAGError: Something is wrong with the systems, the questions, the indexes or the models' names.
        """
        from specrag.evaluation.scoring import check_questions
        from specrag.evaluation.systems import check_names

        check_names(self.names)
        check_questions(self.questions, passages=self.retrieve is None)
        for index in (self.retrieve, self.second):
            if index is not None:
                check_index(index)
        self.chosen.check_models()

    def ask(self, output: Path) -> Run:
        """Ask every system every question; a run that is in ``output`` goes on."""
        from specrag.evaluation.run import evaluate
        from specrag.evaluation.systems import Parts, build

        with working("loading the embedder"):
            used = self.chosen.load_embedder()
            other = _index(self.second, used) if self.second else None
        questions = self._retrieved(used)
        with working("loading models"):
            drafting, judge = self.chosen.load_models()
            parts = Parts(drafter=drafting, verifier=judge, embedder=used, second=other, settings={"seed": self.seed})
            entries = build(self.names, parts)
        with counting("asking") as progress:
            return evaluate(entries, questions, output, source=str(self.data), retry=self.retry, progress=progress)

    def _retrieved(self, embedder: Embedder) -> Sequence[Question]:
        from specrag.evaluation.data import with_retrieved

        if self.retrieve is None:
            return self.questions
        index = _index(self.retrieve, embedder)
        with working("retrieving"):
            found = with_retrieved(self.questions, lambda question: index.search(question, self.top))
        # A passage's vector would not be written with the question: what is asked later shall be what is asked now.
        return [replace(q, passages=tuple(replace(p, embedding=None) for p in q.passages)) for q in found]


def _index(folder: Path, embedder: Embedder) -> PassageIndex:
    from specrag.retrieval import PassageIndex

    return PassageIndex.load(folder, embedder)
