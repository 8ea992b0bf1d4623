"""Ways to answer from one long document, side by side: RAPID and what it is measured against.

All of them share the target's reading of a document, and what a drafter has read of it. ``LongSystem.named`` lists
them.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from specrag._extras import require
from specrag._files import write_text

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "local", "long-context systems")

from specrag.errors import InvalidInputError, SpecRAGError
from specrag.evaluation.long_documents import holds_answer
from specrag.evaluation.long_names import LongSystem, long_systems
from specrag.evaluation.long_rows import LongReading, answer_row, pieces
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow
from specrag.evaluation.scoring import asked_text, has_reference
from specrag.models.base import Sampling, Turn
from specrag.models.embedders import Embedder
from specrag.models.transformers import TransformersLM
from specrag.rapid import LongContext, RapidGenerator, RapidSettings, RapidStats
from specrag.rapid.chunks import CHUNK_TOKENS, Chunks, Retrieved
from specrag.rapid.compatibility import fingerprint
from specrag.rapid.prompt import PromptTokens, document_prompt
from specrag.rapid.proposing import DrafterCaches
from specrag.schema import Passage
from specrag.speculative.confidence import model_key

#: The instruction before each question. The answer is a sentence, as RAPID's first token is the target's own.
INSTRUCTION = "Answer the question from the text above in one short sentence.\n\n"


class LongSystems:
    """Asks several systems about long documents. Each document is read once.

    Args:
        names: Names of systems (``LongSystem.named``).
        target: The model that reads the document.
        drafter: The other model, for the systems with ``upward``. Both read prompts in the target's chat template.
        embedder: For retrieval; by default the bundled MiniLM.
        settings: What all systems share. ``proposer``, ``transfer`` and ``transfer_strength`` are the systems' own; a
            datastore is used by ``rest`` alone. By default γ = 5 and greedy decoding, so that every run gives the same
            texts.
        max_tokens: Of each answer.
        instruction: Stands before each question, unless its answer is a whole text, such as a summary: then the
            question itself says what is wanted. Retrieval does not see it.
        seed: Chooses the irrelevant chunks, together with the question's id.
        sessions: A folder where each document's reading is kept, for a run that continues or asks other systems: about
            12 kB per token for a model of 0.5B. ``None``: it is kept in memory alone, until the next document.

    Raises:
        InvalidInputError: A name is unknown or there twice, a system needs a drafter and there is none, or a setting
            does not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        target: TransformersLM,
        drafter: TransformersLM | None = None,
        *,
        embedder: Embedder | None = None,
        settings: RapidSettings | None = None,
        max_tokens: int = 48,
        instruction: str = INSTRUCTION,
        seed: int = 0,
        sessions: str | Path | None = None,
    ) -> None:
        self.systems = long_systems(names, drafter=drafter is not None)
        if max_tokens < 1:
            raise InvalidInputError(f"max_tokens must be at least 1, got {max_tokens}")
        common = settings or RapidSettings(candidates=5, sampling=Sampling())
        self.target, self.drafter = target, drafter
        self._common, self._max_tokens, self._instruction, self._seed = common, max_tokens, instruction, seed
        self._base = RapidGenerator(target, None, replace(common, candidates=0), embedder=embedder)
        self._retrieves_with = "minilm" if embedder is None else model_key(embedder.name)
        self._generators = {system.name: self._generator(system) for system in self.systems}
        self._sessions = None if sessions is None else Path(sessions)
        self._open: _Document | None = None

    def _generator(self, system: LongSystem) -> RapidGenerator:
        other = self.drafter if system.upward else None
        settings = system.settings(self._common)
        if system.proposer is None:
            return RapidGenerator(other or self.target, None, settings, embedder=self._base.embedder)
        return RapidGenerator(self.target, other, settings, embedder=self._base.embedder)

    def describe(self) -> dict[str, dict[str, Any]]:
        """The settings of each system, for ``run.json``."""
        shared = {
            "max_tokens": self._max_tokens,
            "instruction": self._instruction,
            "target": self.target.name,
            "embedder": self._retrieves_with,
        }
        described = {}
        for system in self.systems:
            used = {"drafter": self.drafter.name} if system.upward and self.drafter is not None else {}
            described[system.name] = {
                **{key: value for key, value in asdict(system).items() if key not in ("name", "changes")},
                **shared,
                **used,
                "rapid": self._generators[system.name].settings.to_dict(),
            }
        return described

    def answers(self, question: Question, done: Collection[str] = ()) -> Iterator[AnswerRow]:
        """What each system answers, as soon as it has. A document that cannot be read is an error of every system.

        Args:
            question: With ``context``. Successive questions with the same context share its reading.
            done: Names of systems to leave out.

        Raises:
            InvalidInputError: The question has no context.
        """
        asked = [system for system in self.systems if system.name not in done]
        if not asked:
            return
        document = self._document(question)
        if isinstance(document, SpecRAGError):
            yield from (AnswerRow(system=system.name, id=question.id, error=str(document)) for system in asked)
            return
        document.continue_after(())
        shown = {False: document.retrieved(question.question)}
        if any(system.irrelevant for system in asked):
            shown[True] = self._irrelevant(document, question, shown[False])
        for system in asked:
            yield self._answer(system, document, question, shown[system.irrelevant])

    def dialogue(
        self, questions: Sequence[Question], done: Mapping[tuple[str, str], str] | None = None
    ) -> Iterator[AnswerRow]:
        """What each system answers to questions that follow one another in one dialogue over one document.

        Each system sees its own earlier answers.

        Args:
            questions: With the same ``context``.
            done: Answers that are there already, by system and the question's id.

        Raises:
            InvalidInputError: A question has no context, or another one than the first.
        """
        if len({question.context for question in questions}) != 1:
            raise InvalidInputError("a dialogue needs questions over one document: their contexts differ")
        known = done or {}
        waiting = [key for key in ((s.name, q.id) for s in self.systems for q in questions) if key not in known]
        if not waiting:
            return
        document = self._document(questions[0])
        if isinstance(document, SpecRAGError):
            yield from (AnswerRow(system=name, id=key, error=str(document)) for name, key in waiting)
            return
        for system in self.systems:
            history: list[tuple[str, str]] = []
            for question in questions:
                text = known.get((system.name, question.id))
                if text is None:
                    document.continue_after(history)
                    shown = document.retrieved(question.question)
                    if system.irrelevant:
                        shown = self._irrelevant(document, question, shown)
                    row = self._answer(system, document, question, shown)
                    text = row.text
                    yield row
                history.append((self._asked(question), text))

    def _asked(self, question: Question) -> str:
        """What the models are asked."""
        return ("" if has_reference(question) else self._instruction) + asked_text(question)

    def _document(self, question: Question) -> _Document | SpecRAGError:
        """The document of ``question``: the one that was read last, or another one, which is read now; or why not."""
        if not question.context:
            raise InvalidInputError(f"question {question.id!r} has no document (`context`) to read")
        if self._open is None or self._open.text != question.context:
            self._open = None  # the old document's memory goes before the new one is read
            try:
                self._open = _Document(question.context, self._base, self._sessions)
            except SpecRAGError as error:  # it is longer than the model's window, say: the next one may be shorter
                return error
        return self._open

    def _irrelevant(self, document: _Document, question: Question, retrieved: Retrieved) -> Retrieved:
        """As many tokens as were retrieved, of chunks that hold no answer and were not retrieved."""
        context, taken = document.session.prompt.context, set(retrieved.positions)
        starts = list(range(0, len(context), CHUNK_TOKENS))
        random = np.random.default_rng([self._seed, zlib.crc32(question.id.encode())])
        positions: list[int] = []
        for at in random.permutation(len(starts)).tolist():
            chunk = range(starts[at], min(starts[at] + CHUNK_TOKENS, len(context)))
            text = str(self.target.tokenizer.decode([context[i] for i in chunk]))
            if not taken & set(chunk) and not holds_answer(Passage(text=text), question.answers):
                positions += chunk[: len(taken) - len(positions)]
        return Retrieved(sorted(positions), 1.0, similar=bool(positions))

    def _answer(self, system: LongSystem, document: _Document, question: Question, shown: Retrieved) -> AnswerRow:
        stats, start, text, error = RapidStats(trace=[]), time.perf_counter(), "", None
        generator, read = self._generators[system.name], document.session.prefill_seconds
        try:
            session = self._session(system, document, shown)
            read, start = session.prefill_seconds, time.perf_counter()
            text = session.ask(self._asked(question), max_tokens=self._max_tokens, stats=stats).text
        except SpecRAGError as problem:
            error = str(problem)
        seconds = time.perf_counter() - start
        drafts = system.proposer is not None
        retrieves = system.retrieved or system.proposer in ("rag", "hybrid", "sparse", "hybrid-sparse", "triforce")
        reading = LongReading(
            document_tokens=len(document.session.prompt.context),
            retrieval_seconds=document.retrieval_seconds if retrieves else 0.0,
            prefill_seconds=read,
            drafter_seconds=document.drafter_seconds(system, shown, stats.startup_seconds) if drafts else 0.0,
            drafter_tokens=len(shown.positions) if drafts else 0,
            holds_answer=document.holds_answer(shown, question),
        )
        made = pieces(stats.trace or (), stats.tokens, self.target.tokenizer, generator.target.end_tokens)
        return answer_row(system.name, question, text, stats, reading, made, seconds=seconds, error=error)

    def _session(self, system: LongSystem, document: _Document, shown: Retrieved) -> LongContext:
        generator = self._generators[system.name]
        if not shown.positions:
            raise InvalidInputError("every other chunk of the document holds an answer: there is no irrelevant context")
        if system.retrieved:
            return document.excerpt(shown, generator)
        if system.proposer is None and system.upward:
            return document.read_by(generator)
        return document.for_system(system, generator, shown)


class _Document:
    """A document that the target has read, and what other readers have read of it."""

    def __init__(self, text: str, base: RapidGenerator, sessions: Path | None) -> None:
        self.text = text
        self.session = _read(text, base, sessions)
        self._base, self._chunks = base, self.session.chunks
        self._drafters: dict[tuple[str, bool, bool, Any], DrafterCaches] = {}
        self._seconds: dict[tuple[tuple[str, bool, bool, Any], tuple[int, ...]], float] = {}
        self._others: dict[int, LongContext] = {}
        self.retrieval_seconds = 0.0

    def retrieved(self, question: str) -> Retrieved:
        """The chunks that the question retrieves. Their embeddings are made once per document."""
        budget, start = self._base.budget(len(self.session.prompt.context)), time.perf_counter()
        shown = self._chunks.retrieve(question, budget, self._base.embedder)
        self.retrieval_seconds = time.perf_counter() - start
        return shown

    def continue_after(self, history: Sequence[tuple[str, str]]) -> None:
        """From here on, questions follow these questions and answers."""
        turns = [Turn.of(*said) for asked, told in history for said in (("user", asked), ("assistant", told))]  # type: ignore[arg-type]
        prompt = document_prompt(self.session.rapid.target.encoder, "-", [*turns, Turn.of("user", "")])
        self.session.prompt = self.session.prompt.with_tail(prompt.tail)

    def tokens_of(self, shown: Retrieved) -> tuple[int, ...]:
        """The tokens at the positions that are shown."""
        return tuple(self.session.prompt.context[i] for i in shown.positions)

    def holds_answer(self, shown: Retrieved, question: Question) -> bool:
        """Whether what is shown holds an answer."""
        text = str(self.session.rapid.target.tokenizer.decode(list(self.tokens_of(shown))))
        return holds_answer(Passage(text=text), question.answers)

    def for_system(self, system: LongSystem, generator: RapidGenerator, shown: Retrieved) -> LongContext:
        """The target's session, for a system whose drafter sees ``shown``."""
        session = self.session
        session.rapid, session.estimates = generator, generator.estimates
        session.chunks = _Shown(self._chunks, session.rapid.target.tokenizer, shown)
        session.drafters = self._drafters.setdefault(system.reading, DrafterCaches())
        return session

    def excerpt(self, shown: Retrieved, generator: RapidGenerator) -> LongContext:
        """A session over ``shown`` alone, in the target's chat template."""
        prompt = self.session.prompt
        return LongContext(PromptTokens(prompt.head, self.tokens_of(shown), prompt.tail), generator)

    def read_by(self, generator: RapidGenerator) -> LongContext:
        """A session of another model over the whole document, in the target's chat template."""
        key = id(generator.target)
        if key not in self._others:
            self._others[key] = LongContext(self.session.prompt, generator)
        self._others[key].prompt = self.session.prompt
        return self._others[key]

    def drafter_seconds(self, system: LongSystem, shown: Retrieved, seconds: float) -> float:
        """Seconds in which the drafter read, whichever of the systems that share it made it read."""
        key = (system.reading, tuple(shown.positions))
        if seconds:
            self._seconds.setdefault(key, seconds)
        return self._seconds.get(key, 0.0)


def _read(text: str, base: RapidGenerator, sessions: Path | None) -> LongContext:
    """A session over ``text``: loaded where it was kept, else read, and kept in ``sessions``."""
    if sessions is None:
        return LongContext(text, base)
    digest = hashlib.sha256(f"{fingerprint(base.target)} {text}".encode()).hexdigest()[:24]
    file, note = sessions / f"{digest}.safetensors", sessions / f"{digest}.json"
    if file.exists() and note.exists():
        session = LongContext.load(file, base)
        session.prefill_seconds = float(json.loads(note.read_text())["prefill_seconds"])
        return session
    sessions.mkdir(parents=True, exist_ok=True)
    session = LongContext(text, base)
    session.save(file)
    write_text(note, json.dumps({"prefill_seconds": session.prefill_seconds, "tokens": session.tokens}))
    return session


class _Shown(Chunks):
    """Chunks that were chosen beforehand."""

    def __init__(self, chunks: Chunks, tokenizer: Any, shown: Retrieved) -> None:
        super().__init__(chunks.tokens, tokenizer, chunks.vectors, chunks.embedder)
        self._shown = shown

    def retrieve(self, question: str, budget: int, embedder: Embedder) -> Retrieved:
        return self._shown
