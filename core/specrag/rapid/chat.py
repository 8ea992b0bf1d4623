"""RapidChat: conversations over long documents behind a chat interface, with sessions that are reused.

What adapters to chat frameworks share: finding the context in a conversation, keeping its session for the next call,
tools in the prompt and tool calls in the reply.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from specrag.errors import InvalidInputError
from specrag.models.base import GenerationRequest, Turn
from specrag.models.tokenization import ConversationEncoder
from specrag.models.transformers import TransformersLM
from specrag.rapid.decoding import RapidStats
from specrag.rapid.session import QUERY, LongContext, RapidGenerator

# A single message with less before its last paragraph is all question.
_CONTEXT_CHARACTERS = 1000
# A session is taken over for another prompt when they begin with at least so many equal tokens.
_WORTH_SHARING = 64
# LlamaIndex's question-answering templates, and others written like them: the context between two rules of dashes.
_RULED = re.compile(r"\A.*?^-{5,}\n.*?^-{5,}\n", re.DOTALL | re.MULTILINE)
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asked for."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """A message of a conversation, as chat frameworks have them. Role ``"tool"``: what a tool returned."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass
class _Kept:
    session: LongContext
    prompt: tuple[str, str]  # head and context
    busy: bool = False


@dataclass
class RapidChat:
    """Conversations with a ``RapidGenerator``; the sessions of the latest documents stay in memory.

    The context of a call is, in this order: ``documents``; the text before the question in a single long message (between
    rules of dashes, or all but the last paragraph); the conversation before the last message.

    Args:
        rapid: Models and settings.
        max_sessions: How many are kept; the one that was not used for longest goes first.
        max_bytes: And how much memory their caches may take together.
    """

    rapid: RapidGenerator
    max_sessions: int = 4
    max_bytes: int = 4 << 30
    _kept: list[_Kept] = field(default_factory=list, repr=False)  # latest last
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.max_sessions < 0 or self.max_bytes < 0:
            raise InvalidInputError("max_sessions and max_bytes must be 0 or more")

    @classmethod
    def load(
        cls,
        model: str | None,
        drafter: str | None = None,
        *,
        quantization: Literal["int8"] | None = None,
        max_sessions: int = 4,
        **settings: Any,
    ) -> RapidChat:
        """With models from folders or hub ids; ``settings`` are the ``RapidGenerator``'s.

        Raises:
            InvalidInputError: There is no model.
            ModelNotFoundError: One cannot be loaded.
        """
        if model is None:
            raise InvalidInputError("give model= (a folder or hub id) or rapid= (a RapidGenerator)")
        target = TransformersLM(model, quantization=quantization)
        helper = TransformersLM(drafter, quantization=quantization) if drafter else None
        return cls(RapidGenerator(target, helper, **settings), max_sessions)

    @classmethod
    def of_fields(cls, adapter: Any) -> RapidChat:
        """From an adapter's fields, which have the names of ``load``'s arguments and of the ``RapidGenerator``'s."""
        names = (
            *("model", "drafter", "quantization", "max_sessions"),
            *("candidates", "transfer", "transfer_strength", "temperature", "seed", "proposer"),
        )
        return cls.load(**{name: getattr(adapter, name) for name in names})

    @staticmethod
    def options(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of ``stream`` from an adapter's own settings and what a call gives.

        Args:
            defaults, given: Of ``stop``, ``max_tokens``, ``temperature``, ``seed``; ``given`` also of ``documents`` (texts)
                and ``tools``. ``None`` stands for "not given".

        Raises:
            InvalidInputError: ``given`` has something else.
        """
        if unknown := set(given) - {"stop", "max_tokens", "temperature", "seed", "documents", "tools"}:
            raise InvalidInputError(
                f"unknown options {', '.join(sorted(unknown))}: a call takes stop, max_tokens, temperature, seed and documents"
            )
        merged = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        stop = merged.get("stop") or ()
        return {
            "documents": merged.get("documents") or (),
            "tools": merged.get("tools") or (),
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "max_new_tokens": merged["max_tokens"],
            "temperature": merged["temperature"],
            "seed": merged["seed"],
        }

    @property
    def sessions(self) -> list[LongContext]:
        """The sessions kept, latest last."""
        return [kept.session for kept in self._kept]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        documents: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        stats: RapidStats | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The reply, piece by piece.

        Args:
            messages: The last one is a user's, or a tool's result.
            documents: The context, in place of what the messages hold.
            tools: JSON schemas in OpenAI's form, shown through the chat template.
            stats: Filled in as the reply is made.
            options: As in ``LongContext.stream``.

        Raises:
            InvalidInputError: No message that asks, a template without tools, or too long a context.
        """
        encoder = self.rapid.target.encoder
        head, context, tail, question = conversation(encoder, messages, documents, tools)
        kept = self._checkout(head, context, tail)
        try:
            yield from kept.session.stream(question, stats=stats, **options)
        finally:
            self._put_back(kept)

    def complete(self, messages: Sequence[Message], **options: Any) -> tuple[str, RapidStats]:
        """The whole reply, and how it was made. Takes the options of ``stream``."""
        stats = options.pop("stats", None) or RapidStats()
        return "".join(self.stream(messages, stats=stats, **options)), stats

    def clear(self) -> None:
        """Forget every session that is not in use."""
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.busy]

    # --- sessions -------------------------------------------------------------------------------------

    def _checkout(self, head: str, context: str, tail: str) -> _Kept:
        """A session for this prompt that nobody else uses: the same one, one that begins alike, or a new one."""
        with self._lock:
            same = next((kept for kept in self._kept if not kept.busy and kept.prompt == (head, context)), None)
            if same is not None:
                same.busy = True
                same.session.tail = tail
                self._kept.append(self._kept.pop(self._kept.index(same)))
                return same
        fresh = LongContext.unread(self.rapid, head, context, tail)
        with self._lock:
            free = [(fresh.shared_with(kept.session), kept) for kept in self._kept if not kept.busy]
            shared, best = max(free, key=lambda pair: pair[0], default=(0, None))
            taken = None
            # A document's session is not given up for one that only begins with the same template.
            if best is not None and shared >= max(_WORTH_SHARING, best.session.tokens // 2):
                self._kept.remove(best)
                taken = best.session
            kept = _Kept(fresh, (head, context), busy=True)
            self._kept.append(kept)
        try:
            fresh.read(reuse=taken)
        except BaseException:
            with self._lock:
                self._kept.remove(kept)
            raise
        return kept

    def _put_back(self, kept: _Kept) -> None:
        with self._lock:
            kept.busy = False
            while self._kept and (
                len(self._kept) > self.max_sessions or sum(kept.session.nbytes for kept in self._kept) > self.max_bytes
            ):
                idle = next((kept for kept in self._kept if not kept.busy), None)
                if idle is None:
                    return
                self._kept.remove(idle)


# --- prompts --------------------------------------------------------------------------------------------


def conversation(
    encoder: ConversationEncoder,
    messages: Sequence[Message],
    documents: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, str, str, str]:
    """(what stands before the context, the context, what follows with QUERY for the question, the question)."""
    if not messages or messages[-1].role not in ("user", "tool"):
        raise InvalidInputError("the last message must be the user's, or a tool's result")
    if tools:
        check_tools(encoder)
    turns = [_turn(message) for message in messages]
    question = turns[-1].text
    if not question.strip():
        raise InvalidInputError("the last message is empty")
    if documents:
        document = "\n\n".join(text.strip() for text in documents if text.strip())
        if not document:
            raise InvalidInputError("the documents are empty")
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        asked = QUERY if first == len(turns) - 1 else turns[first].text
        turns = [*turns[:-1], Turn.of("user", QUERY)]
        turns[first] = Turn.of("user", f"{_MARK}\n\n{asked}")
        head, _, tail = _rendered(encoder, turns, tools).partition(_MARK)
        return head, encoder.sanitize(document).replace(QUERY, ""), tail, question
    own, question = split_context(question) if len([t for t in turns if t.role == "user"]) == 1 else ("", question)
    if own:
        turns = [*turns[:-1], Turn.of("user", f"{_MARK}\n\n{QUERY}")]
        head, _, tail = _rendered(encoder, turns, tools).partition(_MARK)
        return head, encoder.sanitize(own).replace(QUERY, ""), tail, question
    before, _, after = _rendered(encoder, [*turns[:-1], Turn.of("user", QUERY)], tools).partition(QUERY)
    return "", before, QUERY + after, question


_MARK = "\ue0f3"  # private use, as QUERY is


def split_context(text: str) -> tuple[str, str]:
    """A long message as (its context, its question); a short one is all question."""
    ruled = _RULED.match(text)
    if ruled and text[ruled.end() :].strip():
        return text[: ruled.end()].strip(), text[ruled.end() :].strip()
    before, gap, last = text.rstrip().rpartition("\n\n")
    if gap and len(before) >= _CONTEXT_CHARACTERS and len(last) < len(before):
        return before.strip(), last.strip()
    return "", text


def _rendered(encoder: ConversationEncoder, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> str:
    return encoder.render_generation(GenerationRequest(tuple(turns)), tools=tools)


def _turn(message: Message) -> Turn:
    """Tool calls and results in the words of the templates that know ``<tool_call>`` (Qwen, Hermes, SmolLM3)."""
    if message.role == "tool":
        return Turn.of("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if message.role not in ("system", "user", "assistant"):
        raise InvalidInputError(f"a message's role must be system, user, assistant or tool, got {message.role!r}")
    calls = [
        f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': dict(call.arguments)})}\n</tool_call>"
        for call in message.tool_calls
    ]
    return Turn.of(message.role, "\n".join([message.content, *calls] if message.content else calls))  # type: ignore[arg-type]


# --- tools ----------------------------------------------------------------------------------------------


def check_tools(encoder: ConversationEncoder) -> None:
    """Whether the chat template can show tools in the format that ``parse_tool_calls`` reads.

    Raises:
        InvalidInputError: It cannot.
    """
    template = encoder.template or ""
    if "tools" not in template or "<tool_call>" not in template:
        raise InvalidInputError(
            "this model's chat template has no tools in the <tool_call> format (Qwen2.5, Qwen3, Hermes and SmolLM3 have): "
            "use such a model, or call without tools"
        )


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall], list[str]]:
    """A reply as (its text, the calls in it, what looked like a call and could not be read)."""
    calls, broken = [], []
    for block in _TOOL_CALL.findall(text):
        try:
            row = json.loads(block)
            arguments = row.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            calls.append(ToolCall(str(row["name"]), dict(arguments)))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            broken.append(block)
    return _TOOL_CALL.sub("", text).strip() if calls or broken else text, calls, broken
