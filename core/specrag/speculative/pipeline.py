"""SpeculativeRAG: perspectives -> drafting -> verification -> the answer.

One asynchronous generator is the whole pipeline; every other entry reads it. Drafts are verified as
they arrive: all at once when both models run in this process, one by one when they are servers.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specrag import _blocking
from specrag.errors import DraftingError, InvalidInputError
from specrag.models.base import LanguageModel, Sampling
from specrag.models.embedders import Embedder
from specrag.schema import (
    AnswerReady,
    Draft,
    DraftDone,
    DraftFailed,
    DraftFailure,
    EmbeddingSource,
    Event,
    Passage,
    SpeculativeAnswer,
    SubsetsChosen,
    Timings,
    Usage,
    Verdict,
    VerdictReady,
)
from specrag.speculative.drafting import Drafter
from specrag.speculative.perspectives import SAMPLING_MODES, SamplingMode, one_of_each, sample_perspectives
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import RawScores, Scoring, Verifier, broken, rank
from specrag.speculative.work import Work, current_work
from specrag.text import passage_text

if TYPE_CHECKING:
    from specrag.models.embedders import TransformersEmbedder


@dataclass(frozen=True, kw_only=True)
class SpeculativeRAG:
    """Draft with something cheap, verify with something strong (Wang et al., arXiv 2407.08223).

    Args:
        drafter: Writes the drafts.
        verifier: Scores them; by default the drafter itself.
        embedder: Makes the perspectives; by default the bundled MiniLM, loaded when first needed.
        drafts: m, the number of drafts (at least 1).
        passages_per_draft: k, the passages a draft reads (at least 1). Fewer passages than k: all of them.
        sampling: How subsets are chosen; see ``specrag.speculative.perspectives.sample_perspectives``.
        scoring: Which scores count and how.
        prompts: Every text that the models see; by default those that the drafter was trained with, where it
            knows them, or else ``Prompts()``. ``.texts`` are those in use.
        generation: How drafts are sampled; greedy by default.
        max_rationale_tokens, max_answer_tokens: Where a draft is cut.
        reuse_embeddings: Use ``Passage.embedding`` for the perspectives when every passage has one.
        deadline: Seconds from the question after which the best draft verified by then is the answer.
        seed: Of the subsets.

    Example:
        >>> rag = SpeculativeRAG(drafter=bundled("smollm2"), seed=0)            # doctest: +SKIP
        >>> rag.answer("who got the first nobel prize in physics", passages).text  # doctest: +SKIP
    """

    drafter: LanguageModel
    verifier: LanguageModel | None = None
    embedder: Embedder | None = None
    drafts: int = 5
    passages_per_draft: int = 2
    sampling: SamplingMode = "coverage"
    scoring: Scoring = field(default_factory=Scoring)
    prompts: Prompts | None = None
    generation: Sampling = field(default_factory=Sampling)
    max_rationale_tokens: int = Drafter.max_rationale_tokens
    max_answer_tokens: int = Drafter.max_answer_tokens
    reuse_embeddings: bool = True
    deadline: float | None = None
    seed: int = 0
    _trained_with: Prompts | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("drafts", "passages_per_draft"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.sampling not in SAMPLING_MODES:
            raise InvalidInputError(f"sampling must be one of {', '.join(SAMPLING_MODES)}; got {self.sampling!r}")
        if self.deadline is not None and not self.deadline > 0:
            raise InvalidInputError(f"deadline must be a positive number of seconds, got {self.deadline}")
        for name in ("drafter", "verifier"):
            model = getattr(self, name)
            if not isinstance(model, LanguageModel) and (name == "drafter" or model is not None):
                raise InvalidInputError(
                    f"{name} must be a specrag LanguageModel (TransformersLM, OpenAILM, bundled(...)), "
                    f"got {type(model).__name__}"
                )
        trained = Prompts.trained_with(self.drafter)
        object.__setattr__(self, "_trained_with", trained)
        if trained is not None and self.prompts is not None and not self.prompts.drafts_like(trained):
            warnings.warn(
                f"{self.drafter.name} was trained to draft with other prompts and will draft badly: leave `prompts` out, "
                "or change others than those with dataclasses.replace(rag.texts, ...)",
                stacklevel=3,
            )
        self._drafting()  # validates its own part

    @property
    def texts(self) -> Prompts:
        """The prompts in use."""
        return self.prompts or self._trained_with or Prompts()

    def replace(self, **changes: Any) -> SpeculativeRAG:
        """The same pipeline with other settings; the models are shared."""
        return replace(self, **changes)

    # --- front doors --------------------------------------------------------------------------------

    def answer(self, question: str, passages: Sequence[Passage]) -> SpeculativeAnswer:
        """The answer to ``question`` from ``passages``, best retrieved first. Also safe inside a notebook.

        Raises:
            InvalidInputError: The question is empty or too long for the drafter.
            DraftingError: Every draft failed.
            ModelError: The verifier failed for every draft.
        """
        return _blocking.run(self.aanswer(question, passages))

    async def aanswer(self, question: str, passages: Sequence[Passage]) -> SpeculativeAnswer:
        """``answer``, awaited."""
        async for event in self.astream(question, passages):
            if isinstance(event, AnswerReady):
                return event.answer
        raise AssertionError("the stream ended without an answer")  # pragma: no cover

    def stream(self, question: str, passages: Sequence[Passage]) -> Iterator[Event]:
        """What happens, as it happens: subsets, drafts, verdicts, and at last the answer."""
        return _blocking.iterate(self.astream(question, passages))

    # --- the pipeline --------------------------------------------------------------------------------

    async def astream(self, question: str, passages: Sequence[Passage]) -> AsyncIterator[Event]:
        """``stream``, awaited."""
        clock = _Clock(self.deadline)
        question = self._checked(question)
        kept, notes = distinct_passages(passages)
        if not kept:
            reason = "no passages were given" if not len(passages) else "every passage is empty"
            yield AnswerReady(_nothing(question, reason, clock, notes))
            return

        vectors, source = await self._embeddings(question, [passages[i] for i in kept], clock)
        with clock.measure("cluster"):
            subsets = self._subsets(kept, vectors, notes)
        yield SubsetsChosen(subsets, source)

        verdicts: list[Verdict] = []
        waiting: list[Draft] = []
        failures: list[DraftFailure] = []
        usage = {"drafter": Usage(), "verifier": Usage()}
        verifier = Verifier(self.verifier or self.drafter, self.texts, self.scoring)
        chosen = [[passages[i] for i in subset] for subset in subsets]
        clock.begin("draft")
        arrivals = _Arrivals(self._drafting().drafts(question, subsets, chosen))
        verifying: dict[asyncio.Task[list[RawScores]], list[Draft]] = {}
        errors: list[Exception] = []
        try:
            while not arrivals.closed or waiting or verifying:
                timed_out = not await _wait({*arrivals.pending(), *verifying}, clock)
                for arrival in arrivals.take():
                    clock.mark("draft")
                    if isinstance(arrival, DraftFailure):
                        failures.append(arrival)
                        yield DraftFailed(arrival)
                        continue
                    usage["drafter"] += arrival.usage
                    notes += [note for note in arrival.notes if note not in notes]
                    yield DraftDone(arrival)
                    if arrival.abstained or not verifier.needed:
                        verdicts.append(verifier.verdict(arrival, RawScores()))
                        yield VerdictReady(verdicts[-1])
                    else:
                        waiting.append(arrival)
                for task in [task for task in verifying if task.done()]:
                    scored = verifying.pop(task)
                    clock.mark("verify")
                    if (error := task.exception()) is not None:
                        if not isinstance(error, Exception):
                            raise error
                        errors.append(error)
                        lost = [DraftFailure(d.subset, f"verifier: {type(error).__name__}: {error}") for d in scored]
                        failures += lost
                        for failure in lost:
                            yield DraftFailed(failure)
                        continue
                    for draft, raw in zip(scored, task.result(), strict=True):
                        usage["verifier"] += raw.usage
                        if broken(raw):
                            failures.append(DraftFailure(draft.subset, "the verifier's scores are not numbers (NaN)"))
                            yield DraftFailed(failures[-1])
                            continue
                        if raw.substitute and _SUBSTITUTE not in notes:
                            notes.append(_SUBSTITUTE)
                        verdicts.append(verifier.verdict(draft, raw))
                        yield VerdictReady(verdicts[-1])
                if timed_out:
                    notes.append(
                        f"the deadline of {self.deadline} s passed with {len(subsets) - len(verdicts)} drafts open"
                    )
                    break
                for batch in self._batches(waiting, verifier, bool(verifying), arrivals):
                    clock.begin("verify")
                    task = asyncio.create_task(_verified(verifier, question, batch))
                    verifying[task] = batch
                    waiting = [draft for draft in waiting if draft not in batch]
        finally:
            for task in verifying:
                task.cancel()
            await arrivals.close()

        if not verdicts and not (self.deadline and clock.over):
            if errors:
                raise errors[0]
            raise DraftingError(f"all {len(subsets)} drafts failed; the first: {failures[0].error}")
        yield AnswerReady(self._choose(question, verdicts, failures, source, usage, notes, clock))

    def _checked(self, question: str) -> str:
        if not isinstance(question, str) or not question.strip():
            raise InvalidInputError("the question is empty")
        return question.strip()

    def _drafting(self) -> Drafter:
        return Drafter(self.drafter, self.texts, self.max_rationale_tokens, self.max_answer_tokens, self.generation)

    async def _embeddings(
        self, question: str, passages: Sequence[Passage], clock: _Clock
    ) -> tuple[np.ndarray | None, EmbeddingSource]:
        """emb(d | Q) of the passages, or their own embeddings, or nothing where no choice depends on them."""
        if len(passages) <= self.passages_per_draft or self.sampling == "random":
            return None, "none"
        if self.reuse_embeddings and (own := own_embeddings(passages)) is not None:
            return own, "passages"
        embedder = self.embedder or _default_embedder()
        with clock.measure("embed"):
            return await embedder.aembed(
                embedder.given_question(question, [passage_text(p) for p in passages])
            ), "embedder"

    def _subsets(
        self, kept: Sequence[int], vectors: np.ndarray | None, notes: list[str]
    ) -> tuple[tuple[int, ...], ...]:
        """The subsets as positions in the caller's list. Greedy drafts of one subset are equal: one is made."""
        made = sample_perspectives(
            vectors, len(kept), self.drafts, self.passages_per_draft, sampling=self.sampling, seed=self.seed
        )
        subsets = tuple(tuple(kept[i] for i in subset) for subset in made.subsets)
        if self.generation.greedy and len(set(subsets)) < len(subsets):
            subsets = tuple(dict.fromkeys(subsets))
            notes.append(f"{len(subsets)} different subsets for {self.drafts} drafts: each is drafted once")
        return subsets

    def _batches(self, waiting: list[Draft], verifier: Verifier, busy: bool, arrivals: _Arrivals) -> list[list[Draft]]:
        """What to verify now: each draft by itself on a server, all that wait in one pass in this process."""
        if not waiting:
            return []
        if not verifier.lm.capabilities.batched:
            return [[draft] for draft in waiting]
        if busy or (self.drafter.capabilities.batched and not arrivals.closed):
            return []  # the rest of the batch is a moment away, and one pass for all costs less than two
        return [list(waiting)]

    def _choose(
        self,
        question: str,
        verdicts: list[Verdict],
        failures: list[DraftFailure],
        source: EmbeddingSource,
        usage: dict[str, Usage],
        notes: list[str],
        clock: _Clock,
    ) -> SpeculativeAnswer:
        ranked, counting = rank(verdicts, self.scoring.scores)
        if ranked and not counting and not all(v.draft.abstained for v in ranked):
            notes.append("no score was available for every draft: agreement among drafts, then retrieval rank, decided")
        elif counting and (missing := [name for name in self.scoring.scores if name not in counting]):
            notes.append(f"not available for every draft, so left out: {', '.join(missing)}")
        best = next((v for v in ranked if not v.draft.abstained), None)
        reason = None
        if best is None:
            reason = "every draft says that the passages do not answer" if ranked else "no draft was verified in time"
        elif (
            self.scoring.threshold is not None
            and best.log_score is not None
            and best.log_score <= self.scoring.threshold
        ):
            reason = f"no draft scores above the threshold: {best.log_score:.3f} <= {self.scoring.threshold:.3f}"
        shown = best or (ranked[0] if ranked else None)
        return SpeculativeAnswer(
            question=question,
            text="" if reason or best is None else best.draft.text,
            rationale=shown.draft.rationale if shown else "",
            passages=() if reason or best is None else best.draft.passages,
            abstained=reason is not None,
            reason=reason,
            verdicts=ranked,
            failures=tuple(failures),
            scores_used=counting,
            embedding_source=source,
            timings=clock.timings(),
            drafter_usage=usage["drafter"],
            verifier_usage=usage["verifier"],
            notes=tuple(notes),
        )


_SUBSTITUTE = (
    'the verifier gives no log-probabilities of given text: P("Yes") is that of its first generated token, '
    "and self-containment is left out"
)


async def _verified(verifier: Verifier, question: str, batch: Sequence[Draft]) -> list[RawScores]:
    if len(batch) == 1:
        current_work.set(Work("verify", batch[0].subset))  # of this task alone
    return await verifier.raw_scores(question, batch)


async def aselect_perspectives(
    question: str,
    passages: Sequence[Passage],
    count: int,
    *,
    embedder: Embedder | None = None,
    reuse_embeddings: bool = True,
    seed: int = 0,
) -> tuple[int, ...]:
    """Positions of ``count`` passages of different perspectives, each the best ranked of its own, in their order.

    Empty and repeated passages are left out. Embeddings as in ``SpeculativeRAG``.

    Raises:
        InvalidInputError: ``count`` is below 1.
    """
    if count < 1:
        raise InvalidInputError(f"the number of perspectives must be at least 1, got {count}")
    kept, _ = distinct_passages(passages)
    if len(kept) <= count:
        return tuple(kept)
    members = [passages[i] for i in kept]
    vectors = own_embeddings(members) if reuse_embeddings else None
    if vectors is None:
        embedder = embedder or _default_embedder()
        vectors = await embedder.aembed(embedder.given_question(question, [passage_text(p) for p in members]))
    return tuple(kept[i] for i in one_of_each(vectors, count, seed=seed))


def select_perspectives(question: str, passages: Sequence[Passage], count: int, **options: Any) -> tuple[int, ...]:
    """``aselect_perspectives``, blocking."""
    return _blocking.run(aselect_perspectives(question, passages, count, **options))


def distinct_passages(passages: Sequence[Passage]) -> tuple[list[int], list[str]]:
    """Positions of the passages that hold text, each text once (the first), and notes on what was left out."""
    seen: dict[str, int] = {}
    empty = 0
    for i, passage in enumerate(passages):
        if not isinstance(passage, Passage):
            raise InvalidInputError(f"passages[{i}] is a {type(passage).__name__}: wrap it, Passage(text=...)")
        if not passage.text.strip():
            empty += 1
            continue
        seen.setdefault(" ".join(passage.text.split()), i)
    notes = [f"{empty} empty passages were left out"] if empty else []
    repeated = len(passages) - empty - len(seen)
    return list(seen.values()), notes + ([f"{repeated} repeated passages were left out"] if repeated else [])


def own_embeddings(passages: Sequence[Passage]) -> np.ndarray | None:  # [passages, dim]
    """The passages' own embeddings, if all have one, of one dimension, finite; else ``None``."""
    vectors = [passage.embedding for passage in passages if passage.embedding is not None]
    if len(vectors) < len(passages) or len({len(vector) for vector in vectors}) != 1 or not len(vectors[0]):
        return None
    stacked = np.stack(vectors)
    return stacked if np.isfinite(stacked).all() else None


def _default_embedder() -> TransformersEmbedder:
    from specrag.models.bundled import bundled

    return bundled("minilm")


def _nothing(question: str, reason: str, clock: _Clock, notes: list[str]) -> SpeculativeAnswer:
    return SpeculativeAnswer(
        question=question,
        text="",
        rationale="",
        passages=(),
        abstained=True,
        reason=reason,
        verdicts=(),
        scores_used=(),
        embedding_source="none",
        timings=clock.timings(),
        notes=tuple(notes),
    )


class _Arrivals:
    """Drafts of an asynchronous iterator, so that a loop can wait for the next one beside other tasks."""

    def __init__(self, drafts: AsyncIterator[Draft | DraftFailure]) -> None:
        self._ready: list[Draft | DraftFailure] = []
        self._news = asyncio.Event()
        self._waiter: asyncio.Task[bool] | None = None
        self._pump = asyncio.create_task(self._read(drafts))

    async def _read(self, drafts: AsyncIterator[Draft | DraftFailure]) -> None:
        async for draft in drafts:
            self._ready.append(draft)
            self._news.set()

    @property
    def closed(self) -> bool:
        """Everything has arrived and was taken."""
        return self._pump.done() and not self._ready

    def pending(self) -> set[asyncio.Task[Any]]:
        """What to wait for: news, or the end."""
        if self._pump.done():
            return {self._pump} if self._ready else set()
        if self._waiter is None or self._waiter.done():
            self._waiter = asyncio.create_task(self._news.wait())
        return {self._pump, self._waiter}

    def take(self) -> list[Draft | DraftFailure]:
        if self._pump.done() and not self._pump.cancelled() and (error := self._pump.exception()) is not None:
            raise error
        taken, self._ready = self._ready, []
        self._news.clear()
        return taken

    async def close(self) -> None:
        for task in (self._pump, self._waiter):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(t for t in (self._pump, self._waiter) if t is not None), return_exceptions=True)


async def _wait(tasks: set[asyncio.Task[Any]], clock: _Clock) -> bool:
    """Wait for any of ``tasks``; false when the deadline came first."""
    if not tasks:
        return True
    done, _ = await asyncio.wait(tasks, timeout=clock.left, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


class _Clock:
    """Wall-clock seconds a stage, and the deadline."""

    def __init__(self, deadline: float | None) -> None:
        self._start = time.perf_counter()
        self._end = None if deadline is None else self._start + deadline
        self._spent = {"embed": 0.0, "cluster": 0.0, "draft": 0.0, "verify": 0.0}
        self._began: dict[str, float] = {}

    @property
    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - time.perf_counter())

    @property
    def over(self) -> bool:
        return self.left == 0.0

    def measure(self, stage: str) -> _Measure:
        return _Measure(self, stage)

    def begin(self, stage: str) -> None:
        self._began.setdefault(stage, time.perf_counter())

    def mark(self, stage: str) -> None:
        """Something of ``stage`` has just ended: the stage has lasted from its beginning until now."""
        self._spent[stage] = time.perf_counter() - self._began.get(stage, self._start)

    def timings(self) -> Timings:
        return Timings(**self._spent, total=time.perf_counter() - self._start)


class _Measure:
    def __init__(self, clock: _Clock, stage: str) -> None:
        self._clock, self._stage = clock, stage

    def __enter__(self) -> None:
        self._clock.begin(self._stage)

    def __exit__(self, *_: object) -> None:
        self._clock.mark(self._stage)
