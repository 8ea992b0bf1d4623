"""``OpenAILM``: a model behind an OpenAI-compatible server.

For example vLLM, SGLang, llama.cpp, ``transformers serve``, or a hosted API.

What a server can do is found out at the first call and remembered. With ``tokenizer=``, conversations are rendered and
tokenised here, so drafts and scores are made over exactly the tokens that a model in this process would use. Without
it, the server's own chat template serves, and the reply is in free form.

The requests themselves are in ``_servers``, the reading of the replies in ``_replies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrag import _blocking
from specrag.errors import InvalidInputError, LogProbsUnavailableError, ModelError, ServerError
from specrag.models._loading import load_tokenizer
from specrag.models._replies import (
    WrittenPart,
    choice_of,
    read_chat_reply,
    read_echo,
    read_echoed_ids,
    usage_of,
)
from specrag.models._servers import NoSuchEndpointError, RefusedError, ServerPool, all_or_none
from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Sampling,
    Score,
    Segment,
    Stage,
    Turn,
)
from specrag.models.chat import chat_request, read_chat
from specrag.models.tokenization import ConversationEncoder, plain_pieces, stripped, up_to_last_named
from specrag.schema import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A stop string of white space may end a part before it began. So often the part is continued.
_MAX_CONTINUATIONS = 4


class OpenAILM(LanguageModel):
    """A model behind one or several OpenAI-compatible servers.

    Args:
        model: The name under which the server knows it.
        base_url: Up to and including ``/v1``. Several URLs are one pool: each request goes to the least busy server.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        tokenizer: A folder, hub id or fast tokenizer of the served model. Needed for ``score`` in a chat model's own
            format, and for headers in the drafts. Needs no torch.
        chat_template: As in ``TransformersLM``; only with ``tokenizer``.
        api: ``"completions"``, ``"chat"``, or ``"auto"``: completions with a tokenizer, else chat, and the other one
            where the server lacks the first.
        prompt_log_probs: ``"auto"``: found out at the first ``score``; a server without them raises
            ``LogProbsUnavailableError``, which Speculative RAG answers with its documented substitute.
            ``"required"``: that is a ``ServerError``. ``"never"``: not even tried.
        max_concurrency: Requests under way at once, over all URLs.
        timeout: Seconds for one request.
        retries: How often a request is repeated after 408, 409, 429, 5xx or a connection error.
        backoff: Seconds before the first repetition, doubled for each further one. ``Retry-After`` is obeyed.
        context_window: Tokens; by default what the server reports, where it does.

    Raises:
        InvalidInputError: An argument cannot be used.
        ModelNotFoundError: There is no tokenizer at ``tokenizer``.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = "auto",
        api: Literal["auto", "completions", "chat"] = "auto",
        prompt_log_probs: Literal["auto", "required", "never"] = "auto",
        max_concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        context_window: int | None = None,
    ) -> None:
        if api not in ("auto", "completions", "chat"):
            raise InvalidInputError(f"api must be 'auto', 'completions' or 'chat', got {api!r}")
        if prompt_log_probs not in ("auto", "required", "never"):
            raise InvalidInputError(f"prompt_log_probs must be 'auto', 'required' or 'never', got {prompt_log_probs!r}")
        self.name = model
        self._pool = ServerPool(
            base_url,
            model,
            api_key=api_key,
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
        )
        self._encoder: ConversationEncoder | None = None
        if tokenizer is not None:
            self._encoder = ConversationEncoder(load_tokenizer(tokenizer), chat_template)
        self._api: str = api if api != "auto" else ("completions" if self._encoder else "chat")
        self._api_may_change = api == "auto"
        self._window = context_window
        self._required = prompt_log_probs == "required"
        self._prompt_log_probs: bool | None = False if prompt_log_probs == "never" else None
        self._generation_log_probs: bool | None = None

    def __repr__(self) -> str:
        return f"OpenAILM({self.name!r}, {[str(server) for server in self._pool.servers]})"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            prompt_log_probs=self._prompt_log_probs,
            generation_log_probs=self._generation_log_probs,
            batched=False,
            prefill=self._api == "completions",
        )

    @property
    def context_window(self) -> int | None:
        return self._window if self._window is not None else self._pool.context_window

    def count_tokens(self, text: str) -> int:
        return len(self._encoder.encode_text(text)) if self._encoder else super().count_tokens(text)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        return _blocking.run(self.agenerate(requests, sampling, top_log_probs=top_log_probs))

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        return _blocking.run(self.ascore(requests))

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        await self._pool.discover()

        async def one(i: int, request: GenerationRequest) -> Completion:
            options = _options(sampling, i)
            if self._api == "completions":
                try:
                    return await self._complete(request, options, top_log_probs)
                except NoSuchEndpointError:
                    self._switch_api("chat")
            try:
                return await self._chat(request, options, top_log_probs)
            except NoSuchEndpointError:
                self._switch_api("completions")
                return await self._complete(request, options, top_log_probs)

        return await all_or_none([one(i, request) for i, request in enumerate(requests)])

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        if self._prompt_log_probs is False:
            raise self._cannot_score()
        await self._pool.discover()
        return await all_or_none([self._score(turns) for turns in requests])

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._pool.aclose()

    # --- generating ---------------------------------------------------------------------------------

    async def _complete(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """Each stage is a request of its own that continues the text so far; the server caches the prefix."""
        if self._encoder is None:
            prompt = _Prompt("".join(p.text for p in _plain(request.turns, generate=True)) + request.stages[0].header)
        else:
            text = self._encoder.render_generation(request)
            ids = self._encoder.encode_rendered(text) if self._pool.takes_token_ids else None
            prompt = _Prompt(text, ids, self._encoder)
        parts: list[GeneratedText] = []
        usage = Usage()
        for i, stage in enumerate(request.stages):
            if i:
                prompt = prompt.followed_by(stage.header)
            part, prompt, used = await self._complete_stage(stage, prompt, options, top_log_probs)
            parts.append(part)
            usage += used
        return Completion(tuple(parts), usage)

    async def _complete_stage(
        self, stage: Stage, start: _Prompt, options: dict[str, Any], top_log_probs: int
    ) -> tuple[GeneratedText, _Prompt, Usage]:
        """One part, and the prompt that includes it."""
        written, usage, prompt = WrittenPart(self._encoder), Usage(), start
        for _ in range(1 + _MAX_CONTINUATIONS):
            body = {
                **prompt.fields(),
                "max_tokens": stage.max_tokens - len(written.log_probs),
                "stop": list(stage.stop) or None,
                "logprobs": None if self._generation_log_probs is False else max(1, top_log_probs),
                **options,
            }
            reply = await self._post("completions", body)
            choice = choice_of(reply)
            stopped = written.add(choice)
            usage += usage_of(reply)
            self._learn_log_probs(written.log_probs_known)
            if written.text.strip() or stopped is None or len(written.log_probs) >= stage.max_tokens:
                break
            prompt = start.followed_by(written.text_with_stop, written.ids, "")
        part = written.part(cut=choice.get("finish_reason") == "length", with_top=top_log_probs > 0)
        return part, start.followed_by(part.text, *written.split()), usage

    async def _chat(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """The whole reply in one part: a chat API writes its own beginning."""
        asked = chat_request(request, Sampling(), top_log_probs, self._generation_log_probs is not False)
        body: dict[str, Any] = {
            "messages": [{"role": role, "content": text} for role, text in asked.messages],
            "max_tokens": asked.max_tokens,
            "stop": list(asked.stop) or None,
            "logprobs": True if asked.log_probs else None,
            "top_logprobs": (top_log_probs or None) if asked.log_probs else None,
            **options,
        }
        answered = read_chat_reply(await self._post("chat/completions", body))
        self._learn_log_probs(answered.content is not None)
        return read_chat(answered, request, top_log_probs)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A server that refuses to be asked for log-probabilities is asked again without, and never for them later."""
        try:
            return await self._pool.post(path, body)
        except RefusedError as error:
            asked = {key: None for key in ("logprobs", "top_logprobs") if body.get(key) is not None}
            if not asked or "logprob" not in str(error):
                raise
            self._generation_log_probs = False
            return await self._pool.post(path, body | asked)

    # --- scoring ------------------------------------------------------------------------------------

    async def _score(self, turns: Sequence[Turn]) -> Score:
        if self._encoder is None:
            pieces = up_to_last_named(_plain(turns, generate=False))
        else:
            pieces = self._encoder.pieces(turns)
        encoded = self._encoder.encode_scored(turns) if self._encoder and self._pool.takes_token_ids else None
        prompt = _Prompt("".join(p.text for p in pieces), encoded.ids if encoded else None, self._encoder)
        body = {
            **prompt.fields(generate=False),
            "echo": True,
            "logprobs": 1,
            "max_tokens": 0 if self._pool.takes_token_ids else 1,  # others refuse 0, or take it for their default
            "temperature": 0,
        }
        try:
            reply = await self._pool.post("completions", body)
        except NoSuchEndpointError as error:
            raise self._cannot_score() from error
        except RefusedError as error:
            if self._prompt_log_probs:
                raise
            raise self._cannot_score() from error
        named = read_echo(reply, pieces) if encoded is None else read_echoed_ids(reply, encoded)
        if named is None:
            raise self._cannot_score()
        self._prompt_log_probs = True
        return Score(named, usage_of(reply))

    def _cannot_score(self) -> ModelError:
        """The error to raise; from now on, no score is tried."""
        self._prompt_log_probs = False
        message = (
            f"{self._pool.servers[0]} gives no log-probabilities of a prompt's own tokens "
            "(/completions with echo and logprobs): vLLM and SGLang do"
        )
        return ServerError(message) if self._required else LogProbsUnavailableError(message)

    # --- what is found out --------------------------------------------------------------------------

    def _switch_api(self, api: str) -> None:
        if not self._api_may_change:
            raise ServerError(f"{self._pool.servers[0]} has no /{self._api} endpoint")
        self._api, self._api_may_change = api, False

    def _learn_log_probs(self, given: bool) -> None:
        if self._generation_log_probs is None:
            self._generation_log_probs = given


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
        templated = (
            self.encoder is not None and self.encoder.template is not None
        )  # then special tokens are in the text
        return {"prompt": self.text, "add_special_tokens": False if templated else None}

    def followed_by(self, text: str, fed: Sequence[int] = (), unfed: str | None = None) -> _Prompt:
        """This prompt, then ``text``: the tokens ``fed`` and the rest, ``unfed``, which is tokenised here."""
        if self.ids is None or self.encoder is None:
            return replace(self, text=self.text + text)
        rest = self.encoder.encode_text(text if unfed is None else unfed)
        return replace(self, text=self.text + text, ids=[*self.ids, *fed, *rest])


def _plain(turns: Sequence[Turn], *, generate: bool) -> list[Segment]:
    return plain_pieces([stripped(list(turn.segments)) for turn in turns], generate=generate)


def _options(sampling: Sampling, row: int) -> dict[str, Any]:
    """The fields of a request that say how tokens are drawn; each row of a batch has its own seed."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "seed": None if sampling.seed is None else sampling.seed + row,
    }
