"""RapidChat: conversations over long contexts, with sessions that are kept between calls.

This is what adapters to chat frameworks share: keeping the session of a conversation's context for the next call, and
the options of a call. What the context is, ``specrag.rapid.conversation`` finds.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypedDict

from specrag.errors import InvalidInputError, ModelError
from specrag.models.base import Quantization, Sampling
from specrag.models.transformers import TransformersLM
from specrag.rapid.conversation import Message, conversation, document_texts
from specrag.rapid.decoding import RapidStats
from specrag.rapid.generator import RapidGenerator
from specrag.rapid.prompt import Prompt, PromptTokens
from specrag.rapid.session import LongContext, ReadPrefix, check_prompt
from specrag.rapid.settings import RapidSettings
from specrag.rapid.tools import opens_thought

# A session is given up for another prompt when the two begin with at least so many equal tokens.
_WORTH_SHARING = 64
_CALL_OPTIONS = ("stop", "max_tokens", "temperature", "top_k", "top_p", "seed", "documents", "tools")


class CallOptions(TypedDict):
    """The options of one call of ``RapidChat``."""

    documents: Sequence[str]
    tools: Sequence[Mapping[str, Any]]
    stop: tuple[str, ...]
    max_tokens: int
    sampling: Sampling


def call_options(
    given: Mapping[str, Any], *, max_tokens: int, stop: Sequence[str] | None, sampling: Sampling
) -> CallOptions:
    """The options of a call: what a framework's call gives, else an adapter's own.

    Args:
        given: Of ``stop`` (one string or several), ``max_tokens``, ``temperature``, ``top_k``, ``top_p``, ``seed``,
            ``documents`` (see ``document_texts``) and ``tools``. ``None`` means "not given".
        max_tokens: The adapter's own.
        stop: The adapter's own.
        sampling: The adapter's own.

    Raises:
        InvalidInputError: ``given`` has another option, or a value is out of range.
    """
    if unknown := sorted(set(given) - set(_CALL_OPTIONS)):
        known = f"{', '.join(_CALL_OPTIONS[:-1])} and {_CALL_OPTIONS[-1]}"
        raise InvalidInputError(f"unknown options {', '.join(unknown)}: a call takes {known}")
    options = {name: value for name, value in given.items() if value is not None}
    stop = options.get("stop") or stop or ()
    drawn = {name: options[name] for name in ("temperature", "top_k", "top_p", "seed") if name in options}
    return {
        "documents": document_texts(options.get("documents")),
        "tools": options.get("tools") or (),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "max_tokens": options.get("max_tokens", max_tokens),
        "sampling": replace(sampling, **drawn),
    }


class RapidChat:
    """Conversations with a ``RapidGenerator``. The sessions of the latest contexts stay in memory.

    The context of a call is, in this order: ``documents``; the text before the question in a single long message
    (between rules of dashes, or all but the last paragraph); the conversation before the last message.

    Args:
        rapid: Models and settings.
        max_sessions: How many sessions are kept. The one that was not used for longest goes first.
        max_bytes: How much memory their caches may take together. Where the machine has too little for a new session,
            those that nobody uses are dropped.
        sampling: In place of the generator's.

    Attributes:
        settings: The generator's settings, with the sampling of this chat.

    Raises:
        InvalidInputError: A limit is negative.
    """

    def __init__(
        self,
        rapid: RapidGenerator,
        max_sessions: int = 4,
        max_bytes: int = 4 << 30,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        self.rapid = rapid
        self.settings = rapid.settings if sampling is None else replace(rapid.settings, sampling=sampling)
        self._sessions = _Sessions(rapid, max_sessions, max_bytes)

    @classmethod
    def open(
        cls,
        model: str | None = None,
        drafter: str | None = None,
        *,
        rapid: RapidGenerator | None = None,
        settings: RapidSettings | Mapping[str, Any] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        quantization: Quantization | None = None,
        max_sessions: int = 4,
    ) -> RapidChat:
        """With a generator that exists, or with models from folders or hub ids.

        Chats over one generator with one limit share their sessions: a copy with another sampling reads no document
        again.

        Args:
            model: The target's folder or hub id.
            drafter: The drafter's; without one the target drafts for itself.
            rapid: A generator, in place of the models; or the one that this method loaded for a chat before. Models
                with the same names are then not loaded again.
            settings: The generator's settings. With a generator of the caller's own they are its own, but for the
                sampling.
            temperature: In place of that in ``settings.sampling``, as are ``top_k``, ``top_p`` and ``seed``.
            top_k: See ``Sampling``.
            top_p: See ``Sampling``.
            seed: See ``Sampling``.
            quantization: Of both models; see ``TransformersLM``.
            max_sessions: How many sessions are kept.

        Raises:
            InvalidInputError: There is neither a model nor a generator, a setting is unknown or out of range, or the
                settings are not those of ``rapid``.
            ModelNotFoundError: A model cannot be loaded.
        """
        if settings is None and rapid is not None:
            settings = rapid.settings
        wanted = RapidSettings.of(settings)
        wanted = wanted.with_sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        rapid = _generator(wanted, rapid, (model, drafter, quantization))
        chat = cls(rapid, max_sessions, sampling=wanted.sampling)
        chat._sessions = _shared(chat._sessions)
        return chat

    @property
    def sessions(self) -> list[LongContext]:
        """The sessions that are kept, latest last."""
        return self._sessions.all

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the target's chat template begins each reply with ``<think>``."""
        return opens_thought(self.rapid.target.encoder)

    def fields(self, model: str | None) -> dict[str, Any]:
        """What holds, under the names of the adapters' fields. ``model``: as the user named the target."""
        return {
            "model": model or self.rapid.target.name,
            "rapid": self.rapid,
            "settings": self.settings,
            **asdict(self.settings.sampling),
        }

    def clear(self) -> None:
        """Forget every session that is not in use."""
        self._sessions.clear()

    def stream(
        self,
        messages: Sequence[Message],
        *,
        documents: Any = (),
        tools: Sequence[Mapping[str, Any]] = (),
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        stats: RapidStats | None = None,
    ) -> Iterator[str]:
        """The reply, piece by piece.

        Args:
            messages: The conversation. The last message is a user's, or a tool's result.
            documents: The context, in place of what the messages hold; see ``document_texts``.
            tools: JSON schemas in OpenAI's form, shown through the chat template.
            max_tokens: As in ``LongContext.stream``, and so are the arguments below.
            stop: Strings that end the reply.
            sampling: In place of the chat's for this call.
            cancelled: Asked between rounds.
            stats: Filled in while the reply is made.

        Raises:
            InvalidInputError: No message asks anything, the template has no tools, or the context is too long.
        """
        prompt, question = conversation(self.rapid.target.encoder, messages, document_texts(documents), tools)
        sampling = self.settings.sampling if sampling is None else sampling
        with self._sessions.use(prompt) as session:
            yield from session.stream(
                question, max_tokens=max_tokens, stop=stop, sampling=sampling, cancelled=cancelled, stats=stats
            )

    def complete(self, messages: Sequence[Message], **options: Any) -> tuple[str, RapidStats]:
        """The whole reply, and how it was made. Takes the options of ``stream``."""
        stats = options.pop("stats", None) or RapidStats()
        return "".join(self.stream(messages, stats=stats, **options)), stats


# --- sessions -------------------------------------------------------------------------------------------


def _generator(
    wanted: RapidSettings,
    given: RapidGenerator | None,
    names: tuple[str | None, str | None, Quantization | None],
) -> RapidGenerator:
    """The generator of a chat: ``given``, one over its models, or one over the models of these names."""
    model, drafter, quantization = names
    if given is not None and given.opened is None:  # the caller's own
        if drafter is not None or quantization is not None:
            raise InvalidInputError("give drafter= and quantization= with model=, or rapid=, which has its models")
        if model not in (None, given.target.name):
            raise InvalidInputError(f"give model= or rapid=, which has {given.target.name}, not both")
        if replace(wanted, sampling=given.settings.sampling) != given.settings:
            raise InvalidInputError(
                f"settings= and rapid= differ: {wanted}, but {given.settings}; give settings to the RapidGenerator"
            )
        return given
    if given is not None and given.opened == names:
        if replace(wanted, sampling=given.settings.sampling) == given.settings:
            return given
        made = RapidGenerator(given.target, None if given.drafter is given.target else given.drafter, wanted)
    elif model is None:
        raise InvalidInputError("give model= (a folder or hub id) or rapid= (a RapidGenerator)")
    else:
        target = TransformersLM(model, quantization=quantization)
        made = RapidGenerator(target, TransformersLM(drafter, quantization=quantization) if drafter else None, wanted)
    made.opened = names
    return made


@dataclass
class _Kept:
    prompt: tuple[str, str]  # head and context
    session: LongContext | None = None  # ``None`` while it is being read
    busy: bool = True

    @property
    def nbytes(self) -> int:
        return self.session.nbytes if self.session is not None else 0


@dataclass(eq=False)
class _Sessions:
    """The sessions of the latest prompts. A session serves one call at a time."""

    rapid: RapidGenerator
    max_sessions: int
    max_bytes: int
    _kept: list[_Kept] = field(default_factory=list, init=False)  # latest last
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        if self.max_sessions < 0 or self.max_bytes < 0:
            raise InvalidInputError("max_sessions and max_bytes must be 0 or more")

    @property
    def all(self) -> list[LongContext]:
        return [kept.session for kept in self._kept if kept.session is not None]

    def clear(self) -> None:
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.busy]

    @contextlib.contextmanager
    def use(self, prompt: Prompt) -> Iterator[LongContext]:
        """A session for ``prompt`` that nobody else uses: the same one, one that begins alike, or a new one."""
        kept = self._same(prompt) or self._new(prompt)
        try:
            assert kept.session is not None
            kept.session.prompt = kept.session.prompt.with_tail(prompt.tail)
            yield kept.session
        finally:
            self._put_back(kept)

    def _same(self, prompt: Prompt) -> _Kept | None:
        with self._lock:
            for i, kept in enumerate(self._kept):
                if not kept.busy and kept.prompt == (prompt.head, prompt.context):
                    kept.busy = True
                    self._kept.append(self._kept.pop(i))
                    return kept
        return None

    def _new(self, prompt: Prompt) -> _Kept:
        tokens = prompt.encoded(self.rapid.target.encoder)
        check_prompt(tokens, self.rapid.target)  # before another session is given up for it
        kept = _Kept((prompt.head, prompt.context))
        with self._lock:
            prefix = self._given_up_for(tokens)
            self._kept.append(kept)
        try:
            kept.session = self._read(tokens, prefix)
            kept.session.any_length = True
        except BaseException:
            with self._lock:
                self._kept.remove(kept)
            raise
        return kept

    def _read(self, prompt: PromptTokens, prefix: ReadPrefix | None) -> LongContext:
        """A new session. Where memory is too small for it, the sessions that nobody uses are dropped."""
        try:
            return LongContext(prompt, self.rapid, prefix=prefix)
        except ModelError:
            if all(kept.busy for kept in list(self._kept)):
                raise
        self.clear()
        return LongContext(prompt, self.rapid, prefix=prefix)

    def _given_up_for(self, prompt: PromptTokens) -> ReadPrefix | None:
        """What the session that begins most like ``prompt`` has read, where that is worth giving it up."""
        shared, best = 0, None
        for kept in self._kept:
            if not kept.busy and kept.session is not None:
                common = prompt.shared_with(kept.session.read_tokens)
                if common > shared:
                    shared, best = common, kept
        # A document's session is not given up for a prompt that only begins with the same template.
        if best is None or best.session is None or shared < max(_WORTH_SHARING, best.session.tokens // 2):
            return None
        self._kept.remove(best)
        return best.session.give_up()

    def _put_back(self, kept: _Kept) -> None:
        with self._lock:
            kept.busy = False
            while self._kept and (
                len(self._kept) > self.max_sessions or sum(kept.nbytes for kept in self._kept) > self.max_bytes
            ):
                idle = next((kept for kept in self._kept if not kept.busy), None)
                if idle is None:
                    return
                self._kept.remove(idle)


#: The sessions of the chats that ``RapidChat.open`` made. They live as long as one of the chats.
_SHARED: weakref.WeakSet[_Sessions] = weakref.WeakSet()
_SHARED_LOCK = threading.Lock()


def _shared(new: _Sessions) -> _Sessions:
    """``new``, or the sessions of another chat over the same generator with the same limits."""
    with _SHARED_LOCK:
        for known in _SHARED:
            if known.rapid is new.rapid and (known.max_sessions, known.max_bytes) == (new.max_sessions, new.max_bytes):
                return known
        _SHARED.add(new)
        return new
