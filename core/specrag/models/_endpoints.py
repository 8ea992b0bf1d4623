"""The endpoints of an OpenAI-compatible server that a language model uses: ``/completions`` and ``/chat/completions``.

Each writes its requests and hands the replies to ``_replies``. Which of them is used is ``OpenAILM``'s decision.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrag.errors import ServerError
from specrag.models._options import names_log_probs, refused_option
from specrag.models._replies import (
    checked_chat,
    checked_completion,
    choice_of,
    read_chat_reply,
    read_echo,
    read_echoed_ids,
    usage_of,
)
from specrag.models._servers import NoSuchEndpointError, RefusedError, ServerPool
from specrag.models._written import WrittenPart, hidden_blank
from specrag.models.base import (
    Completion,
    GeneratedText,
    GenerationRequest,
    Sampling,
    Score,
    Segment,
    Stage,
    Turn,
)
from specrag.models.chat import chat_request, ended_at_limit, read_chat
from specrag.models.tokenization import ConversationEncoder, plain_pieces, stripped, up_to_last_named
from specrag.schema import Usage

# A stop string of white space may end a part before it began. So often the part is continued.
_MAX_CONTINUATIONS = 4


class Client:
    """A pool, and what is known of the requests that its servers take.

    Args:
        extra_body: Fields that are added to every request of a model.

    Attributes:
        log_probs: Whether they give log-probabilities of what they write; ``None``: not known yet.
        thinking_tokens: Tokens that are added to the limit of each chat reply.
    """

    def __init__(self, pool: ServerPool, extra_body: Mapping[str, Any] | None = None, thinking_tokens: int = 0) -> None:
        self.pool = pool
        self.log_probs: bool | None = None
        self.thinking_tokens = thinking_tokens
        self._extra = dict(extra_body or {})
        self._refused: dict[str, set[str]] = {}  # by path: fields that are not sent
        self._most_top: int | None = None

    async def post(
        self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Any], *, scoring: bool = False
    ) -> dict[str, Any]:
        """A reply, checked by ``read``. Fields that the servers refuse are left out, from then on.

        ``scoring``: it is of no use without log-probabilities.
        """
        for _ in range(1 + len(_OPTIONAL)):
            sent = self._sent(path, body, scoring=scoring)
            try:
                reply: dict[str, Any] = await self.pool.post(path, sent | self._extra, read)
                return reply
            except RefusedError as error:
                if isinstance(error, NoSuchEndpointError) or not self._drops(path, sent, error.said, scoring=scoring):
                    raise
        raise ServerError(f"{self.pool}/{path} refuses every option: {', '.join(sorted(self._refused[path]))}")

    def _sent(self, path: str, body: dict[str, Any], *, scoring: bool) -> dict[str, Any]:
        refused = self._refused.get(path, set())
        sent = {name: value for name, value in body.items() if name not in refused and value is not None}
        if "max_tokens" in refused and body.get("max_tokens") is not None and _RENAMED not in refused:
            sent[_RENAMED] = body["max_tokens"]
        if self.log_probs is False and not scoring:
            sent = {name: value for name, value in sent.items() if name not in _LOG_PROBS}
        if self._most_top is not None:
            field = "top_logprobs" if "top_logprobs" in sent else "logprobs"
            if not isinstance(sent.get(field, True), bool):
                sent[field] = min(sent[field], self._most_top)
        return sent

    def _drops(self, path: str, sent: dict[str, Any], said: str, *, scoring: bool) -> bool:
        """Whether a refusal is about something that can be left out, which is then remembered."""
        if names_log_probs(said):
            if scoring or not _LOG_PROBS & sent.keys():
                return False
            asked, most = sent.get("top_logprobs", sent.get("logprobs")), _most_named(said)
            if isinstance(asked, int) and not isinstance(asked, bool) and most is not None and 0 < most < asked:
                self._most_top = most
            else:
                self.log_probs = False
            return True
        option = refused_option(said, [name for name in (*_OPTIONAL, _RENAMED) if name in sent])
        if option is None:
            return False
        self._refused.setdefault(path, set()).add(option)
        return True

    def notes(self, path: str) -> tuple[str, ...]:
        """What an answer says of fields that were not sent."""
        names = sorted(self._refused.get(path, set()) & _NOTED)
        return (f"refused by {self.pool}, so not sent: {', '.join(names)}",) if names else ()

    def learn(self, given: bool | None) -> None:
        """A reply came with, or without, log-probabilities; ``None``: it had nothing to give them for."""
        if self.log_probs is None and given is not None:
            self.log_probs = given


_LOG_PROBS = {"logprobs", "top_logprobs"}
# Fields that a request can do without; the limit has a new name on some servers.
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "max_tokens",
    "add_special_tokens",
    "return_token_ids",
)
_RENAMED = "max_completion_tokens"
# Those of them that change what is written.
_NOTED = {"temperature", "top_p", "top_k", "seed", _RENAMED}


def _most_named(message: str) -> int | None:
    """The limit in a refusal like "logprobs of 20, which is greater than max allowed: 5"."""
    found = re.search(
        r"(?i)(?:max\w*(?: allowed)?|less than or equal to|at most|<=|between 0 and)\D{0,9}(\d+)", message
    )
    return int(found[1]) if found else None


class Completions:
    """``/completions``: conversations are rendered here, with a tokenizer's chat template or as plain text."""

    def __init__(self, client: Client, encoder: ConversationEncoder | None) -> None:
        self._client, self._encoder = client, encoder

    async def generate(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """Each stage is a request of its own that continues the text so far; the server caches the prefix.

        Args:
            options: Fields of the request that say how tokens are drawn.
            top_log_probs: How many of the likeliest tokens to report per position.
        """
        if self._encoder is None:
            prompt = _Prompt(_text(_plain(request.turns, generate=True)) + request.stages[0].header)
        else:
            text = self._encoder.render_generation(request)
            ids = self._encoder.encode_rendered(text) if self._client.pool.takes_token_ids else None
            prompt = _Prompt(text, ids, self._encoder)
        parts: list[GeneratedText] = []
        notes: list[str] = []
        usage = Usage()
        for i, stage in enumerate(request.stages):
            if i:
                prompt = prompt.followed_by(stage.header)
            part, prompt, used, noted = await self._write(stage, prompt, options, top_log_probs)
            parts.append(part)
            notes += noted
            usage += used
        return Completion(tuple(parts), usage, notes=tuple(dict.fromkeys([*notes, *self._client.notes("completions")])))

    async def _write(
        self, stage: Stage, start: _Prompt, options: dict[str, Any], top_log_probs: int
    ) -> tuple[GeneratedText, _Prompt, Usage, tuple[str, ...]]:
        """One part, the prompt that includes it, and notes on it."""
        written, usage, prompt = WrittenPart(self._encoder, stage.stop), Usage(), start
        for _ in range(1 + _MAX_CONTINUATIONS):
            body = {
                **prompt.fields(),
                "max_tokens": stage.max_tokens - written.tokens,
                "stop": list(stage.stop) or None,
                "logprobs": max(1, top_log_probs),
                **options,
            }
            reply = await self._client.post("completions", body, checked_completion)
            choice, used = choice_of(reply), usage_of(reply)
            shown = not hidden_blank(choice, stage.stop, used.completion_tokens)
            if not shown:  # the tokens before the part's first character, without the stop string that hides them
                body |= {"max_tokens": min(used.completion_tokens, body["max_tokens"]), "stop": None}
                reply = await self._client.post("completions", body, checked_completion)
                usage += used
                choice, used = choice_of(reply), usage_of(reply)
            stopped = written.add(choice, used.completion_tokens)
            usage += used
            self._client.learn(written.listed)
            if written.text.strip() or (stopped is None and shown) or written.tokens >= stage.max_tokens:
                break
            prompt = start.followed_by(written.text_with_stop, *written.split(with_stop=True))
        part = written.part(cut=ended_at_limit(choice), with_top=top_log_probs > 0)
        return part, start.followed_by(part.text, *written.split()), usage, written.notes(part)

    async def score(self, turns: Sequence[Turn]) -> Score | None:
        """The log-probabilities of the named segments; ``None`` where the server gives none of a prompt."""
        with_ids = self._client.pool.takes_token_ids
        if self._encoder is None:
            pieces = up_to_last_named(_plain(turns, generate=False))
        else:
            pieces = self._encoder.pieces(turns)
        encoded = self._encoder.encode_scored(turns) if self._encoder and with_ids else None
        prompt = _Prompt(_text(pieces), encoded.ids if encoded else None, self._encoder)
        body = {
            **prompt.fields(generate=False),
            "echo": True,
            "logprobs": 1,
            "max_tokens": 0 if with_ids else 1,  # others refuse 0, or take it for their default
            "temperature": 0,
        }
        reply = await self._client.post("completions", body, checked_completion, scoring=True)
        if encoded is not None:
            echoed = read_echoed_ids(reply, encoded)
        else:
            echoed = read_echo(reply, pieces, self._encoder.encode_scored(turns) if self._encoder else None)
        return None if echoed is None else Score(echoed.named, usage_of(reply), echoed.notes)


class Chat:
    """``/chat/completions``: the server renders the conversation, and the reply is one part in free form."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def generate(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """The whole reply; the arguments are those of ``Completions.generate``."""
        asked = chat_request(request, Sampling(), top_log_probs, self._client.log_probs is not False)
        body: dict[str, Any] = {
            "messages": [{"role": role, "content": text} for role, text in asked.messages],
            "max_tokens": asked.max_tokens + self._client.thinking_tokens,
            "stop": list(asked.stop) or None,
            "logprobs": True if asked.log_probs else None,
            "top_logprobs": (top_log_probs or None) if asked.log_probs else None,
            **options,
        }
        answered = read_chat_reply(await self._client.post("chat/completions", body, checked_chat))
        self._client.learn(answered.content is not None if answered.content or answered.text else None)
        made = read_chat(answered, request, top_log_probs)
        return replace(made, notes=(*made.notes, *self._client.notes("chat/completions")))


@dataclass(frozen=True)
class _Prompt:
    """What a server continues: a text, and its token ids where the server takes them."""

    text: str
    ids: list[int] | None = None
    encoder: ConversationEncoder | None = None
    unfed: str = ""  # the end of the text, after the ids: it is tokenised together with what follows

    def fields(self, *, generate: bool = True) -> dict[str, Any]:
        """The part of the request's body that says what to continue."""
        if self.ids is not None:
            return {"prompt": [*self.ids, *self._rest()], "return_token_ids": True if generate else None}
        templated = self.encoder is not None and self.encoder.template is not None  # it wrote the special tokens
        return {"prompt": self.text, "add_special_tokens": False if templated else None}

    def followed_by(self, text: str, fed: Sequence[int] = (), unfed: str | None = None) -> _Prompt:
        """This prompt, then ``text``: the tokens ``fed`` and the rest, ``unfed``, which is tokenised here."""
        rest = text if unfed is None else unfed
        if self.ids is None:
            return replace(self, text=self.text + text)
        if not fed:
            return replace(self, text=self.text + text, unfed=self.unfed + rest)
        return replace(self, text=self.text + text, ids=[*self.ids, *self._rest(), *fed], unfed=rest)

    def _rest(self) -> list[int]:
        return self.encoder.encode_text(self.unfed) if self.encoder and self.unfed else []


def _plain(turns: Sequence[Turn], *, generate: bool) -> list[Segment]:
    return plain_pieces([stripped(list(turn.segments)) for turn in turns], generate=generate)


def _text(pieces: Sequence[Segment]) -> str:
    return "".join(piece.text for piece in pieces)
