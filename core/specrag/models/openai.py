"""Models behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, ``transformers serve``, hosted APIs.

What a server can do is found out at the first call and remembered. With ``tokenizer=`` conversations are
rendered and tokenised here, so that drafts and scores are made over exactly the tokens that the in-process
backend would use; without it the server's own chat template serves, and the reply is in free form.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx

from specrag import _blocking
from specrag.errors import InvalidInputError, LogProbsUnavailableError, ModelError, ServerError
from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Sampling,
    Score,
    Stage,
    Turn,
)
from specrag.models.chat import ChatReply, chat_request, ends_of_bytes, read_chat
from specrag.models.tokenization import (
    ConversationEncoder,
    IncrementalDecoder,
    assign_tokens,
    plain_pieces,
    stripped,
    up_to_last_named,
)
from specrag.schema import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Servers whose /v1/completions take token ids and return them.
_TAKES_TOKEN_IDS = ("vllm",)
# Stop strings that are white space may end a part before it began; it is continued so often.
_MAX_CONTINUATIONS = 4
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0
# Seconds for which a server that could not be reached is passed over while others of the pool answer.
_AWAY = 15.0


@dataclass
class _Server:
    """One base URL: what it is and how busy it is."""

    url: str
    vendor: str | None = None  # None: not asked yet; "": it does not say
    window: int | None = None
    in_flight: int = 0
    away_until: float = 0.0  # monotonic seconds; until then others of the pool are asked first

    @property
    def away(self) -> bool:
        """Whether it could not be reached a moment ago."""
        return self.away_until > time.monotonic()


@dataclass
class _Connection:
    """What belongs to one event loop: a connection pool and the limit on concurrent requests."""

    client: httpx.AsyncClient
    limit: asyncio.Semaphore
    discovery: asyncio.Lock = field(default_factory=asyncio.Lock)


class OpenAILM(LanguageModel):
    """A model behind one or several OpenAI-compatible servers.

    Args:
        model: The name under which the server knows it.
        base_url: Up to and with ``/v1``. Several URLs are one pool: each request goes to the least busy.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        tokenizer: A folder, hub id or fast tokenizer of the served model. Needed for ``score`` in a chat
            model's own format, and for headers in the drafts.
        chat_template: As in ``TransformersLM``; only with ``tokenizer``.
        api: ``"completions"``, ``"chat"``, or ``"auto"``: completions with a tokenizer, else chat, and the
            other one where the server lacks the first.
        prompt_log_probs: ``"auto"``: found out at the first ``score``; a server without raises
            ``LogProbsUnavailableError``, which Speculative RAG answers with its documented substitute.
            ``"required"``: that is a ``ServerError`` instead. ``"never"``: not even tried.
        max_concurrency: Requests under way at once, over all URLs.
        timeout: Seconds for one request.
        retries: How often a request is repeated after 408, 409, 429, 5xx or a connection error.
        backoff: Seconds before the first repetition; doubled for each further one, ``Retry-After`` obeyed.
        context_window: Tokens; by default what the server reports, where it does.
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
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise InvalidInputError("base_url is empty: give at least one, like http://127.0.0.1:8000/v1")
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise InvalidInputError(f"base_url must begin with http:// or https://, got {_public(url)!r}")
        for name, value, least in (
            ("max_concurrency", max_concurrency, 1),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < least:
                raise InvalidInputError(f"{name} must be at least {least}, got {value}")
        if not timeout > 0:
            raise InvalidInputError(f"timeout must be a positive number of seconds, got {timeout}")
        if api not in ("auto", "completions", "chat"):
            raise InvalidInputError(f"api must be 'auto', 'completions' or 'chat', got {api!r}")
        if prompt_log_probs not in ("auto", "required", "never"):
            raise InvalidInputError(f"prompt_log_probs must be 'auto', 'required' or 'never', got {prompt_log_probs!r}")
        self.name = model
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._api_key = api_key
        self._encoder: ConversationEncoder | None = None
        if tokenizer is not None:
            from specrag.models.transformers import load_tokenizer

            self._encoder = ConversationEncoder(load_tokenizer(tokenizer), chat_template)
        self._api: str = api if api != "auto" else ("completions" if self._encoder else "chat")
        self._api_may_change = api == "auto"
        self._max_concurrency, self._timeout = max_concurrency, timeout
        self._retries, self._backoff = retries, backoff
        self._window = context_window
        self._required = prompt_log_probs == "required"
        self._prompt_log_probs: bool | None = False if prompt_log_probs == "never" else None
        self._generation_log_probs: bool | None = None
        self._connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Connection] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"OpenAILM({self.name!r}, {[_public(server.url) for server in self._servers]})"

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
        if self._window is not None:
            return self._window
        return min((server.window for server in self._servers if server.window), default=None)

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
        await self._discover()

        async def one(i: int, request: GenerationRequest) -> Completion:
            options = _options(sampling, i)
            if self._api == "completions":
                try:
                    return await self._complete(request, options, top_log_probs)
                except _NoSuchEndpointError:
                    self._switch_api("chat")
            try:
                return await self._chat(request, options, top_log_probs)
            except _NoSuchEndpointError:
                self._switch_api("completions")
                return await self._complete(request, options, top_log_probs)

        return list(await _gather([one(i, request) for i, request in enumerate(requests)]))

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        if self._prompt_log_probs is False:
            raise self._cannot_score()
        await self._discover()
        return list(await _gather([self._score(turns) for turns in requests]))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.client.aclose()

    # --- generating ---------------------------------------------------------------------------------

    async def _complete(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """Each stage is a request of its own that continues the text so far; the server caches the prefix."""
        text = (
            self._encoder.render_generation(request)
            if self._encoder
            else "".join(p.text for p in _plain(request.turns, generate=True)) + request.stages[0].header
        )
        ids = self._encoder.encode_rendered(text) if self._encoder and self._takes_ids else None
        parts: list[GeneratedText] = []
        usage = Usage()
        for i, stage in enumerate(request.stages):
            if i:
                text += stage.header
                ids = ids + self._encoder.encode_text(stage.header) if ids is not None and self._encoder else None
            part, text, ids, used = await self._complete_stage(stage, text, ids, options, top_log_probs)
            parts.append(part)
            usage += used
        return Completion(tuple(parts), usage)

    async def _complete_stage(
        self, stage: Stage, text: str, ids: list[int] | None, options: dict[str, Any], top_log_probs: int
    ) -> tuple[GeneratedText, str, list[int] | None, Usage]:
        """One part, and the text and ids that the next stage continues."""
        before, written = ids, _Written(self._encoder)
        usage = Usage()
        for _ in range(1 + _MAX_CONTINUATIONS):
            body = {
                "prompt": text if ids is None else ids,
                "max_tokens": stage.max_tokens - len(written.log_probs),
                "stop": list(stage.stop) or None,
                "logprobs": None if self._generation_log_probs is False else max(1, top_log_probs),
                **options,
            }
            if ids is not None:
                body["return_token_ids"] = True
            elif self._encoder is not None and self._encoder.template is not None:
                body["add_special_tokens"] = False  # the template wrote them
            reply = await self._post("completions", body)
            choice = _choice(reply)
            usage += _usage(reply)
            stopped = choice.get("stop_reason") if isinstance(choice.get("stop_reason"), str) else None
            written.add(choice, stopped)
            self._learn_log_probs(written.log_probs_known)
            if written.kept_text.strip() or stopped is None or len(written.log_probs) >= stage.max_tokens:
                break
            text += stopped if ids is None else ""
            ids = None if before is None else before + written.ids
        part = written.part(choice.get("finish_reason") == "length", top_log_probs > 0)
        if before is not None and self._encoder is not None:
            fed, unfed = written.split()
            ids = before + fed + (self._encoder.encode_text(unfed) if unfed else [])
        return part, text + part.text, ids, usage

    async def _chat(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """The whole reply in one part: a chat API writes its own beginning."""
        asked = chat_request(request, Sampling(), top_log_probs, self._generation_log_probs is not False)
        body: dict[str, Any] = {
            "messages": [{"role": role, "content": text} for role, text in asked.messages],
            "max_tokens": asked.max_tokens,
            "stop": list(asked.stop) or None,
            **options,
        }
        if asked.log_probs:
            body["logprobs"] = True
            body["top_logprobs"] = top_log_probs or None
        reply = await self._post("chat/completions", body)
        choice = _choice(reply)
        answered = ChatReply(
            text=str((choice.get("message") or {}).get("content") or ""),
            content=(choice.get("logprobs") or {}).get("content") or None,
            usage=_usage(reply),
            cut=choice.get("finish_reason") == "length",
        )
        self._learn_log_probs(answered.content is not None)
        return read_chat(answered, request, top_log_probs)

    # --- scoring ------------------------------------------------------------------------------------

    async def _score(self, turns: Sequence[Turn]) -> Score:
        if self._encoder is not None:
            pieces = self._encoder.pieces(turns)
        else:
            pieces = up_to_last_named(_plain(turns, generate=False))
        text = "".join(piece.text for piece in pieces)
        encoded = self._encoder.encode_scored(turns) if self._encoder and self._takes_ids else None
        body: dict[str, Any] = {
            "prompt": text if encoded is None else encoded.ids,
            "echo": True,
            "logprobs": 1,
            "max_tokens": 0 if self._takes_ids else 1,  # others refuse 0, or answer with their default
            "temperature": 0,
        }
        if encoded is None and self._encoder is not None and self._encoder.template is not None:
            body["add_special_tokens"] = False
        try:
            reply = await self._post("completions", body)
        except _NoSuchEndpointError as error:
            self._prompt_log_probs = False
            raise self._cannot_score() from error
        except _RefusedError as error:
            if self._prompt_log_probs:
                raise
            self._prompt_log_probs = False
            raise self._cannot_score() from error
        echoed = _choice(reply).get("logprobs") or {}
        values = echoed.get("token_logprobs") or []
        if encoded is not None:
            if len(values) < len(encoded.ids):
                raise self._without_echo()
            segments = encoded.segments
        else:
            tokens = [str(token) for token in echoed.get("tokens") or ()]
            if not values or len("".join(tokens).encode()) < len(text.encode()):
                raise self._without_echo()
            ends = ends_of_bytes([list(token.encode()) for token in tokens])
            shift = max(0, "".join(tokens).find(text))  # an echoed beginning-of-sequence token
            segments = assign_tokens(pieces, *_spans([end - shift for end in ends]))
        self._prompt_log_probs = True
        named = {name: tuple(_value(values[p]) for p in at) for name, at in segments.items()}
        return Score(named, _usage(reply))

    def _without_echo(self) -> ModelError:
        self._prompt_log_probs = False
        return self._cannot_score()

    def _cannot_score(self) -> ModelError:
        message = (
            f"{_public(self._servers[0].url)} gives no log-probabilities of a prompt's own tokens "
            "(/completions with echo and logprobs): vLLM and SGLang do"
        )
        return ServerError(message) if self._required else LogProbsUnavailableError(message)

    # --- the wire -----------------------------------------------------------------------------------

    @property
    def _takes_ids(self) -> bool:
        return bool(self._known) and all(server.vendor in _TAKES_TOKEN_IDS for server in self._known)

    def _switch_api(self, api: str) -> None:
        if not self._api_may_change:
            raise ServerError(f"{_public(self._servers[0].url)} has no /{self._api} endpoint")
        self._api, self._api_may_change = api, False

    def _learn_log_probs(self, given: bool) -> None:
        if self._generation_log_probs is None:
            self._generation_log_probs = given

    def _connection(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            client = httpx.AsyncClient(
                headers=headers, timeout=self._timeout, limits=httpx.Limits(max_connections=None)
            )
            self._connections[loop] = _Connection(client, asyncio.Semaphore(self._max_concurrency))
        return self._connections[loop]

    async def _discover(self) -> None:
        """Ask each server what it is, once. One of a pool that is away is asked when it is back."""
        if all(server.vendor is not None or server.away for server in self._servers) and self._known:
            return
        async with self._connection().discovery:
            problem: ServerError | None = None
            for server in [server for server in self._servers if server.vendor is None]:
                try:
                    listing = await self._request("GET", "models", None, only=server)
                except _AnsweredError:  # it is there, and cannot list its models
                    server.vendor = ""
                    continue
                except ServerError as error:
                    problem = error
                    continue
                entries = [entry for entry in listing.get("data") or () if isinstance(entry, Mapping)]
                mine = next((entry for entry in entries if entry.get("id") == self.name), entries[0] if entries else {})
                server.vendor = str(mine.get("owned_by") or "")
                window = mine.get("max_model_len")
                server.window = window if isinstance(window, int) else None
            if problem is not None and not self._known:
                raise problem

    @property
    def _known(self) -> list[_Server]:
        return [server for server in self._servers if server.vendor is not None]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.name, **{key: value for key, value in body.items() if value is not None}}
        try:
            return await self._request("POST", path, body)
        except _RefusedError as error:
            asked = [key for key in ("logprobs", "top_logprobs") if key in body]
            if body.get("echo") or not asked or "logprob" not in str(error):
                raise
            # A server that refuses to be asked for log-probabilities: never ask again.
            self._generation_log_probs = False
            return await self._request("POST", path, {key: value for key, value in body.items() if key not in asked})

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, only: _Server | None = None
    ) -> dict[str, Any]:
        """Send a request to the least busy server, again after passing failures; or once answered, to ``only``."""
        connection = self._connection()
        problem = ""
        attempts = 1 + (self._retries if only is None or len(self._servers) == 1 else 0)
        for attempt in range(attempts):
            server = only or min(self._servers, key=lambda s: (s.away, s.in_flight))
            wait = min(_LONGEST_WAIT, self._backoff * 2**attempt)
            async with connection.limit:
                server.in_flight += 1
                try:
                    response = await connection.client.request(method, f"{server.url}/{path}", json=body)
                except httpx.TransportError as error:
                    server.away_until = time.monotonic() + _AWAY
                    problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    response = None
                finally:
                    server.in_flight -= 1
            if response is not None:
                if response.status_code < 400:
                    server.away_until = 0.0
                    return _json(response, server.url)
                problem = f"HTTP {response.status_code}: {self._redact(_message(response))}"
                if only is not None:
                    raise _AnsweredError(f"{_public(server.url)}/{path}: {problem}")
                if response.status_code not in _RETRIED:
                    missing = response.status_code in (404, 405) and "model" not in _message(response).lower()
                    kind = _NoSuchEndpointError if missing else _RefusedError
                    raise kind(f"{_public(server.url)}/{path} refused the request: {problem}")
                wait = max(wait, min(_LONGEST_WAIT, _retry_after(response)))
            if attempt + 1 < attempts:
                await asyncio.sleep(wait)
        where = _public((only or server).url)
        raise ServerError(
            f"no answer from {where}/{path} after {attempts} attempts ({self._redact(problem)}): "
            "is the server running, and base_url right?"
        )

    def _redact(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


class _AnsweredError(ServerError):
    """The server is there, but this request got an error from it."""


class _RefusedError(_AnsweredError):
    """The server answered, and the answer is no: repeating would not help."""


class _NoSuchEndpointError(_RefusedError):
    """The server has no such path."""


class _Written:
    """The tokens of one part, gathered over one request or several continuations."""

    def __init__(self, encoder: ConversationEncoder | None) -> None:
        self._encoder = encoder
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.log_probs_known = False
        self._texts: list[str] = []
        self._top: list[Mapping[str, float]] = []
        self._reply_text = ""

    def add(self, choice: Mapping[str, Any], stopped: str | None) -> None:
        listed = choice.get("logprobs") or {}
        self.log_probs_known = bool(listed)
        self.ids += choice.get("token_ids") or []
        self._texts += [str(token) for token in listed.get("tokens") or ()]
        self.log_probs += [_value(value) for value in listed.get("token_logprobs") or ()]
        self._top += [dict(top or {}) for top in listed.get("top_logprobs") or ()]
        self.kept_text = self._reply_text + str(choice.get("text") or "")
        self._reply_text = self.kept_text + (stopped or "")

    def _ends(self) -> list[int]:
        if self.ids and self._encoder is not None and len(self.ids) == len(self.log_probs):
            decoder = IncrementalDecoder(self._encoder.tokenizer)
            for token in self.ids:
                decoder.add(token)
            decoder.flush()
            return decoder.ends
        return ends_of_bytes([list(text.encode()) for text in self._texts])

    def _kept(self) -> tuple[list[int], int]:
        """The tokens' ends, and how many of them are the text's: not the stop string's, no end of sequence."""
        ends, last = self._ends(), len(self.kept_text)
        kept = sum(1 for end in ends if end <= last)
        while kept and (ends[kept - 2] if kept > 1 else 0) == ends[kept - 1] == last:
            kept -= 1  # no characters: an end of sequence
        return ends, kept

    def part(self, length: bool, with_top: bool) -> GeneratedText:
        ends, kept = self._kept()
        return GeneratedText(
            text=self.kept_text,
            log_probs=tuple(self.log_probs[:kept]) if self.log_probs_known else None,
            tokens=kept,
            token_ends=tuple(ends[:kept]) if self.log_probs_known else None,
            finish="length" if length else "stop",
            top_log_probs=tuple(self._top) if with_top and self._top else None,
        )

    def split(self) -> tuple[list[int], str]:
        """Ids whose characters all belong to the text, and the rest of the text behind them."""
        ends, kept = self._kept()
        if len(ends) != len(self.ids):
            kept = 0  # the server did not say which tokens it wrote: the whole text is tokenised anew
        return self.ids[:kept], self.kept_text[ends[kept - 1] if kept else 0 :]


async def _gather(coroutines: Sequence[Any]) -> list[Any]:
    """All results, in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _plain(turns: Sequence[Turn], *, generate: bool) -> list[Any]:
    return plain_pieces([stripped(list(turn.segments)) for turn in turns], generate=generate)


def _options(sampling: Sampling, row: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "seed": None if sampling.seed is None else sampling.seed + row,
    }


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ServerError(f"the server's reply has no choices; its keys: {', '.join(reply)}")
    return choices[0]


def _usage(reply: Mapping[str, Any]) -> Usage:
    used = reply.get("usage") or {}
    return Usage(int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))


def _value(log_prob: Any) -> float:
    return math.nan if log_prob is None else float(log_prob)


def _json(response: httpx.Response, url: str) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise ServerError(f"{_public(url)} did not answer with JSON: {response.text[:80]!r}") from error
    if not isinstance(value, dict):
        raise ServerError(f"{_public(url)} answered with a JSON {type(value).__name__}, expected an object")
    return value


def _message(response: httpx.Response) -> str:
    try:
        value = response.json()
    except ValueError:
        return response.text[:300]
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def _spans(ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ends and starts in characters; a token that ends inside a character gets the span of the one that completes it."""
    full, starts = list(ends), [0, *ends[:-1]]
    for i in range(len(full) - 2, -1, -1):
        if full[i] == starts[i]:
            full[i] = full[i + 1]
    return full, starts


def _public(url: str) -> str:
    """A URL without the credentials that may stand in it."""
    scheme, found, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
