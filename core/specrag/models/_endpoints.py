"""The endpoints of an OpenAI-compatible server that a language model uses: ``/completions`` and ``/chat/completions``.

Each writes its requests and hands the replies to ``_replies``. Which of them is used is ``OpenAILM``'s decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrag.models._replies import (
    WrittenPart,
    choice_of,
    read_chat_reply,
    read_echo,
    read_echoed_ids,
    usage_of,
)
from specrag.models._servers import RefusedError, ServerPool
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
from specrag.models.chat import chat_request, read_chat
from specrag.models.tokenization import ConversationEncoder, plain_pieces, stripped, up_to_last_named
from specrag.schema import Usage

# A stop string of white space may end a part before it began. So often the part is continued.
_MAX_CONTINUATIONS = 4


class Client:
    """A pool, and what is known of the log-probabilities of what its servers write.

    Attributes:
        log_probs: Whether they give them; ``None``: not known yet.
    """

    def __init__(self, pool: ServerPool) -> None:
        self.pool = pool
        self.log_probs: bool | None = None

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A reply. Servers that refuse to be asked for log-probabilities are asked again, and from now on, without."""
        try:
            return await self.pool.post(path, body)
        except RefusedError as error:
            asked = {key: None for key in ("logprobs", "top_logprobs") if body.get(key) is not None}
            if not asked or "logprob" not in str(error):
                raise
            self.log_probs = False
            return await self.pool.post(path, body | asked)

    def learn(self, given: bool) -> None:
        """Remember whether the first reply had log-probabilities."""
        if self.log_probs is None:
            self.log_probs = given


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
        usage = Usage()
        for i, stage in enumerate(request.stages):
            if i:
                prompt = prompt.followed_by(stage.header)
            part, prompt, used = await self._write(stage, prompt, options, top_log_probs)
            parts.append(part)
            usage += used
        return Completion(tuple(parts), usage)

    async def _write(
        self, stage: Stage, start: _Prompt, options: dict[str, Any], top_log_probs: int
    ) -> tuple[GeneratedText, _Prompt, Usage]:
        """One part, and the prompt that includes it."""
        written, usage, prompt = WrittenPart(self._encoder), Usage(), start
        for _ in range(1 + _MAX_CONTINUATIONS):
            body = {
                **prompt.fields(),
                "max_tokens": stage.max_tokens - len(written.log_probs),
                "stop": list(stage.stop) or None,
                "logprobs": None if self._client.log_probs is False else max(1, top_log_probs),
                **options,
            }
            reply = await self._client.post("completions", body)
            choice = choice_of(reply)
            stopped = written.add(choice)
            usage += usage_of(reply)
            self._client.learn(written.log_probs_known)
            if written.text.strip() or stopped is None or len(written.log_probs) >= stage.max_tokens:
                break
            prompt = start.followed_by(written.text_with_stop, written.ids, "")
        part = written.part(cut=choice.get("finish_reason") == "length", with_top=top_log_probs > 0)
        return part, start.followed_by(part.text, *written.split()), usage

    async def score(self, turns: Sequence[Turn]) -> Score | None:
        """The log-probabilities of the named segments; ``None`` where the reply does not hold them."""
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
        reply = await self._client.pool.post("completions", body)
        named = read_echo(reply, pieces) if encoded is None else read_echoed_ids(reply, encoded)
        return None if named is None else Score(named, usage_of(reply))


class Chat:
    """``/chat/completions``: the server renders the conversation, and the reply is one part in free form."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def generate(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """The whole reply; the arguments are those of ``Completions.generate``."""
        asked = chat_request(request, Sampling(), top_log_probs, self._client.log_probs is not False)
        body: dict[str, Any] = {
            "messages": [{"role": role, "content": text} for role, text in asked.messages],
            "max_tokens": asked.max_tokens,
            "stop": list(asked.stop) or None,
            "logprobs": True if asked.log_probs else None,
            "top_logprobs": (top_log_probs or None) if asked.log_probs else None,
            **options,
        }
        answered = read_chat_reply(await self._client.post("chat/completions", body))
        self._client.learn(answered.content is not None)
        return read_chat(answered, request, top_log_probs)


@dataclass(frozen=True)
class _Prompt:
    """What a server continues: a text, and its token ids where the server takes them."""

    text: str
    ids: list[int] | None = None
    encoder: ConversationEncoder | None = None

    def fields(self, *, generate: bool = True) -> dict[str, Any]:
        """The part of the request's body that says what to continue."""
        if self.ids is not None:
            return {"prompt": self.ids, "return_token_ids": True if generate else None}
        templated = self.encoder is not None and self.encoder.template is not None  # it wrote the special tokens
        return {"prompt": self.text, "add_special_tokens": False if templated else None}

    def followed_by(self, text: str, fed: Sequence[int] = (), unfed: str | None = None) -> _Prompt:
        """This prompt, then ``text``: the tokens ``fed`` and the rest, ``unfed``, which is tokenised here."""
        if self.ids is None or self.encoder is None:
            return replace(self, text=self.text + text)
        rest = self.encoder.encode_text(text if unfed is None else unfed)
        return replace(self, text=self.text + text, ids=[*self.ids, *fed, *rest])


def _plain(turns: Sequence[Turn], *, generate: bool) -> list[Segment]:
    return plain_pieces([stripped(list(turn.segments)) for turn in turns], generate=generate)


def _text(pieces: Sequence[Segment]) -> str:
    return "".join(piece.text for piece in pieces)
