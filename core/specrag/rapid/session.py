"""LongContext: a context that the target reads once and that is then asked many times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from specrag._fields import check_whole_numbers
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import Sampling, stop_strings
from specrag.models.transformers import TransformersLM
from specrag.rapid.cached_model import CachedModel, Progress
from specrag.rapid.chunks import Chunks, Retrieved
from specrag.rapid.compatibility import relative_cost
from specrag.rapid.decoding import RapidStats, decode
from specrag.rapid.draft_length import draft_length
from specrag.rapid.output import Limits
from specrag.rapid.prompt import Prompt, PromptTokens, document_prompt
from specrag.rapid.proposing import DrafterCaches, RapidModels, check_question, proposer_for
from specrag.rapid.session_file import SavedSession, read_session, write_session
from specrag.text import question_of

# Room in the target's cache for a question and its answer, before the cache has to grow.
_SPARE_TOKENS = 1024


@dataclass(frozen=True)
class RapidOutput:
    """A finished answer."""

    text: str
    stats: RapidStats


@dataclass(frozen=True)
class ReadPrefix:
    """What a target has read already, for a new session to begin with.

    Args:
        model: The target and its cache. The new session owns it from then on.
        tokens: The tokens that its cache begins with.
        chunks: The chunks of the context that was read; used when the new session has the same context.
    """

    model: CachedModel
    tokens: Sequence[int]
    chunks: Chunks | None = None


def check_prompt(prompt: PromptTokens, target: TransformersLM) -> None:
    """Check that ``target`` can read the prompt's head and context.

    Raises:
        InvalidInputError: The context is empty, or has more tokens than the target has positions.
    """
    if not prompt.context and not prompt.all_question:
        raise InvalidInputError("the context is empty")
    window = target.context_window
    if window is not None and len(prompt.ids) >= window:
        raise InvalidInputError(
            f"the context has {len(prompt.ids)} tokens, {target.name} {window} positions: shorten it, "
            "or configure RoPE scaling in the model's config"
        )


class _OneAtATime:
    """Keeps the cache of a session from everybody else: it holds one answer at a time.

    Raises:
        InvalidInputError: On entry, where another answer is still being written.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InvalidInputError(
                "this session is still writing another answer: read that to its end or close it, or use ask(), which "
                "waits for its turn"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class LongContext:
    """A context that the target has read, its chunks, and its cache.

    Args:
        prompt: The document; or a prompt with the context, made by a function of ``specrag.rapid.prompt``.
        rapid: A ``RapidGenerator``: models and settings.
        progress: Called while the context is read, with the tokens read so far and in all.
        prefix: What was read before. What it and the prompt begin with alike is not read again.

    Attributes:
        prompt: The prompt as token ids.
        rapid: Models and settings. It may be replaced by a generator with the same target.
        chunks: The chunks of the context, for retrieval.
        read_tokens: The tokens that the target's cache begins with: the prompt and the latest question.
        estimates: Costs and acceptance that were measured on this context.
        prefill_seconds: How long reading took.
        drafters: ``DrafterCaches()`` keeps what drafters read for the next question; ``None``, the default, does not.
        any_length: Whether ``"triforce"`` may have a window that covers the context; then the target decodes alone.

    Raises:
        InvalidInputError: The context is empty, or has more tokens than the target has positions.
        ModelError: Memory ran out, or it is known before anything is read that it will. Nothing is kept.
    """

    def __init__(
        self,
        prompt: str | Prompt | PromptTokens,
        rapid: RapidModels,
        *,
        progress: Progress | None = None,
        prefix: ReadPrefix | None = None,
    ) -> None:
        self.prompt = _encoded(prompt, rapid.target)
        check_prompt(self.prompt, rapid.target)
        self.rapid = rapid
        self._asked, self._in_use = threading.RLock(), _OneAtATime()
        self.estimates = rapid.estimates.for_another_context()
        self.drafters: DrafterCaches | None = None
        self.any_length = False
        if prefix is None:
            prefix = ReadPrefix(CachedModel(rapid.target, self.tokens + _SPARE_TOKENS, rapid.vocabulary), ())
        self.chunks = _chunks(prefix.chunks, self.prompt.context, rapid.target)
        self._model: CachedModel | None = self._prefilled(prefix, progress)

    def _prefilled(self, prefix: ReadPrefix, progress: Progress | None) -> CachedModel:
        shared = self.prompt.shared_with(prefix.tokens)
        unread = self.prompt.ids[shared:]
        start = time.perf_counter()
        prefix.model.rollback_to(shared)
        prefix.model.prefill(unread, progress)
        self.read_tokens: Sequence[int] = self.prompt.ids
        self.prefill_seconds = time.perf_counter() - start if unread else 0.0
        self._seconds_per_token = self.prefill_seconds / len(unread) if unread else 0.0  # 0: nothing was measured
        return prefix.model

    @property
    def model(self) -> CachedModel:
        """The target and its cache.

        Raises:
            InvalidInputError: The session was given up.
        """
        if self._model is None:
            raise InvalidInputError("this session was given up to another one: read the text again")
        return self._model

    @property
    def tokens(self) -> int:
        """Tokens of the prompt up to the end of the context."""
        return len(self.prompt.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the target's cache."""
        return self._model.cache.nbytes if self._model is not None else 0

    def give_up(self) -> ReadPrefix:
        """What this session has read, for another one to begin with. This one can no longer be asked."""
        with self._in_use:
            prefix = ReadPrefix(self.model, self.read_tokens, self.chunks)
            self._model = None
        return prefix

    # --- asking -----------------------------------------------------------------------------------------

    def ask(self, question: str, **options: Any) -> RapidOutput:
        """The answer to ``question``, with the options and errors of ``stream``. Threads that ask take turns."""
        stats = options.pop("stats", None) or RapidStats()
        with self._asked:
            text = "".join(self.stream(question, stats=stats, **options))
        return RapidOutput(text, stats)

    def stream(
        self,
        question: str,
        *,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        stats: RapidStats | None = None,
    ) -> Iterator[str]:
        """The answer piece by piece. The first token comes from the target, before the drafter reads anything.

        Args:
            question: What is asked of the context.
            max_tokens: Tokens of the answer. Exact, unless the answer ends before.
            stop: Strings that end the answer. They are not part of it.
            sampling: In place of the settings' for this call.
            cancelled: Asked between rounds. When it is true the answer ends there.
            stats: Filled in while the answer is made.

        Raises:
            InvalidInputError: The question is empty or too long, or the window of ``"triforce"`` covers the context.
            ModelError: Memory ran out. The session stays usable for shorter questions.
        """
        rapid, settings = self.rapid, self.rapid.settings
        limits = _limits(max_tokens, stop, sampling, rapid.target)
        tail = self._checked_tail(question, max_tokens)
        stats = stats if stats is not None else RapidStats()
        with self._in_use:
            start = time.perf_counter()
            self.model.rollback_to(self.tokens)
            self.read_tokens = self.prompt.ids
            logits = self.model.prefill(tail)
            assert logits is not None
            stats.prefill_seconds = stats.first_token_seconds = time.perf_counter() - start
            self._seconds_per_token = self._seconds_per_token or stats.prefill_seconds / len(tail)
            stats.prompt_tokens = self.tokens + len(tail)
            self.read_tokens = [*self.prompt.ids, *tail]
            find = partial(self._retrieved, question, stats)
            proposer, confidence = proposer_for(rapid, self.prompt, tail, self.model, find, stats.notes, self.drafters)
            rapid.estimates = self.estimates
            yield from decode(
                self.model,
                logits,
                proposer,
                settings.knowledge_transfer(confidence),
                settings.sampling if sampling is None else sampling,
                draft_length(settings.candidates, self.estimates, settings.widths),
                limits,
                cancelled=cancelled,
                stats=stats,
                startup_seconds=self._seconds_per_token * relative_cost(rapid.drafter, rapid.target),
                exact=settings.exact,
            )

    def _checked_tail(self, question: str, max_tokens: int) -> list[int]:
        """The tokens after the context, if they may be asked."""
        rapid, tail = self.rapid, self.question_tokens(question_of(question))
        check_question(rapid, self.prompt.context, tail, any_length=self.any_length)
        window, needed = rapid.target.context_window, self.tokens + len(tail) + max_tokens
        if window is not None and needed > window:
            raise InvalidInputError(f"context, question and answer need {needed} positions, the target has {window}")
        return tail

    def question_tokens(self, question: str) -> list[int]:
        """The tokens that follow the context: ``question`` and the rest of the template."""
        return self.prompt.question(self.rapid.target.encoder, question)

    # --- retrieval --------------------------------------------------------------------------------------

    def retrieve(self, question: str, stats: RapidStats | None = None) -> tuple[list[int], float]:
        """The tokens of the retrieved context, in document order, and the confidence of the retrieval in [0, 1].

        Chunks of 512 tokens with a cosine above 0.3 are taken best first, within the budget. When none is similar
        enough, the beginning and the end of the context are taken, and ``stats.notes`` says so.
        """
        retrieved = self._retrieved(question, stats)
        return [self.prompt.context[i] for i in retrieved.positions], retrieved.confidence

    def _retrieved(self, question: str, stats: RapidStats | None) -> Retrieved:
        retrieved = self.chunks.retrieve(question, self.rapid.budget(len(self.prompt.context)), self.rapid.embedder)
        if not retrieved.similar and stats is not None:
            stats.notes.append("nothing retrieved: the drafter reads the beginning and the end of the context")
        return retrieved

    # --- on disk ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to a safetensors file, whole or not at all. Raises what ``write_session`` raises."""
        with self._asked, self._in_use:
            self.model.rollback_to(self.tokens)
            self.read_tokens = self.prompt.ids
            write_session(SavedSession(self.prompt, self.model, self.chunks.vectors, self.chunks.embedder), path)

    @classmethod
    def load(cls, path: str | Path, rapid: RapidModels) -> LongContext:
        """A session that ``save`` wrote. It continues with the same logits.

        Raises:
            NotFoundError: There is no such file.
            InvalidInputError: The file is damaged, of another version, or of another target model.
        """
        saved = read_session(path, rapid.target, rapid.vocabulary, _SPARE_TOKENS)
        chunks = Chunks(saved.prompt.context, rapid.target.tokenizer, saved.vectors, saved.embedder)
        return cls(saved.prompt, rapid, prefix=ReadPrefix(saved.model, saved.prompt.ids, chunks))


def _encoded(prompt: str | Prompt | PromptTokens, target: TransformersLM) -> PromptTokens:
    if isinstance(prompt, PromptTokens):
        return prompt
    if not isinstance(prompt, str | Prompt):
        raise InvalidInputError(f"a session reads a text or a Prompt, got {kind_of(prompt)}")
    return (document_prompt(target.encoder, prompt) if isinstance(prompt, str) else prompt).encoded(target.encoder)


def _chunks(known: Chunks | None, context: Sequence[int], target: TransformersLM) -> Chunks:
    """The chunks of ``context``: those that are known, where they are its own."""
    return known if known is not None and known.tokens == context else Chunks(context, target.tokenizer)


def _limits(max_tokens: int, stop: Sequence[str], sampling: Sampling | None, target: TransformersLM) -> Limits:
    """The limits of an answer, when its options can be used."""
    check_whole_numbers(least=1, max_tokens=max_tokens)
    if not isinstance(sampling, Sampling | None):
        raise InvalidInputError(f"sampling must be a Sampling, got {kind_of(sampling)}")
    return Limits(max_tokens, stop_strings(stop), target.end_tokens)
