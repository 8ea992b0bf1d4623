"""``OpenAILM``: a model behind an OpenAI-compatible server.

For example vLLM, SGLang, llama.cpp, ``transformers serve``, or a hosted API.

What a server can do is found out at the first call and remembered. With ``tokenizer=``, conversations are rendered and
tokenised here, so drafts and scores are made over exactly the tokens that a model in this process would use. Without
it, the server's own chat template serves, and the reply is in free form.

The requests of each endpoint are in ``_endpoints``, the pool of servers in ``_servers``, the reading of replies in
``_replies``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specrag import _blocking
from specrag._fields import check_whole_numbers
from specrag.errors import InvalidInputError, LogProbsUnavailableError, ModelError, ServerError, kind_of
from specrag.models._endpoints import Chat, Client, Completions
from specrag.models._loading import load_tokenizer
from specrag.models._options import names_log_probs
from specrag.models._servers import NoSuchEndpointError, RefusedError, ServerPool, all_or_none
from specrag.models.base import Capabilities, Completion, GenerationRequest, LanguageModel, Sampling, Score, Turn
from specrag.models.tokenization import ConversationEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OpenAILM(LanguageModel):
    """A model behind one or several OpenAI-compatible servers.

    Args:
        model: The name under which the server knows it.
        base_url: Up to and including ``/v1``. Several URLs are one pool: each request goes to the least busy server.
        api_key: Sent as a bearer token. It appears in no repr, log or error.
        headers: Sent with every request. Their values appear in no error.
        extra_body: Fields that are added to every request, as a server's own options need it.
        tokenizer: A folder, hub id or fast tokenizer of the served model. Needed for ``score`` in a chat model's own
            format, and for headers in the drafts. Needs no torch.
        chat_template: As in ``TransformersLM``; only with ``tokenizer``.
        api: ``"completions"``, ``"chat"``, or ``"auto"``: completions with a tokenizer, else chat, and the other one
            where the server lacks the first.
        prompt_log_probs: ``"auto"``: found out at the first ``score``; a server without them raises
            ``LogProbsUnavailableError``, which Speculative RAG answers with its documented substitute.
            ``"required"``: that is a ``ServerError``. ``"never"``: not even tried.
        thinking_tokens: For a model that thinks before it answers: tokens added to the limit of each chat reply.
        max_concurrency: Requests under way at once, per URL.
        max_waiting: Requests that may wait for their turn; a further one is a ``ServerBusyError``. Of one call with
            many requests, only those count that could be under way at once.
        timeout: Seconds for one request.
        retries: How often a request is repeated that no server of the pool answered: after 408, 409, 425, 429, 5xx, a
            connection error, or a reply that cannot be used. Once at most, where nobody listens at any of the URLs and
            nobody ever did.
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
        headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = "auto",
        api: Literal["auto", "completions", "chat"] = "auto",
        prompt_log_probs: Literal["auto", "required", "never"] = "auto",
        thinking_tokens: int = 0,
        max_concurrency: int = 16,
        max_waiting: int = 1024,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        context_window: int | None = None,
    ) -> None:
        if api not in ("auto", "completions", "chat"):
            raise InvalidInputError(f"api must be 'auto', 'completions' or 'chat', got {api!r}")
        if prompt_log_probs not in ("auto", "required", "never"):
            raise InvalidInputError(f"prompt_log_probs must be 'auto', 'required' or 'never', got {prompt_log_probs!r}")
        if not isinstance(model, str):
            raise InvalidInputError(f"model must be the name under which the server knows it, got {kind_of(model)}")
        check_whole_numbers(least=0, thinking_tokens=thinking_tokens)
        if context_window is not None:
            check_whole_numbers(least=1, context_window=context_window)
        self.name = model
        self._pool = ServerPool(
            base_url,
            model,
            api_key=api_key,
            headers=headers,
            max_concurrency=max_concurrency,
            max_waiting=max_waiting,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
        )
        self._encoder: ConversationEncoder | None = None
        if tokenizer is not None:
            self._encoder = ConversationEncoder(load_tokenizer(tokenizer), chat_template)
        self._client = Client(self._pool, extra_body, thinking_tokens)
        self._completions = Completions(self._client, self._encoder)
        self._endpoints: dict[str, Completions | Chat] = {"completions": self._completions, "chat": Chat(self._client)}
        self._api: str = api if api != "auto" else ("completions" if self._encoder else "chat")
        self._api_may_change = api == "auto"
        self._window = context_window
        self._required = prompt_log_probs == "required"
        self._prompt_log_probs: bool | None = False if prompt_log_probs == "never" else None

    def __repr__(self) -> str:
        return f"OpenAILM({self.name!r}, {[str(server) for server in self._pool.servers]})"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            prompt_log_probs=self._prompt_log_probs,
            generation_log_probs=self._client.log_probs,
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

    async def prepare(self) -> None:
        await self._pool.discover()

    async def agenerate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        await self._pool.discover()
        asked = [self._generate(request, _options(sampling, i), top_log_probs) for i, request in enumerate(requests)]
        return await all_or_none(asked, self._pool.at_once)

    async def ascore(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        if self._prompt_log_probs is False:
            raise self._cannot_score()
        await self._pool.discover()
        return await all_or_none([self._score(turns) for turns in requests], self._pool.at_once)

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._pool.aclose()

    async def _generate(self, request: GenerationRequest, options: dict[str, Any], top_log_probs: int) -> Completion:
        """The reply of the endpoint in use, or of the other one where the servers lack the first.

        What answers is used from then on. So requests that find out at the same time agree.
        """
        other = "chat" if self._api == "completions" else "completions"
        missing = []
        for used in (self._api, other) if self._api_may_change else (self._api,):
            try:
                made = await self._endpoints[used].generate(request, options, top_log_probs)
            except NoSuchEndpointError as error:
                missing.append(error)
                continue
            self._api = used
            return made
        if len(missing) > 1:
            raise ServerError(f"{self._pool} has neither /completions nor /chat/completions: {missing[0]}")
        raise ServerError(f"{self._pool} has no /{self._api} endpoint") from missing[0]

    async def _score(self, turns: Sequence[Turn]) -> Score:
        try:
            score = await self._completions.score(turns)
        except NoSuchEndpointError as error:
            raise self._cannot_score() from error
        except RefusedError as error:
            if self._prompt_log_probs or not names_log_probs(error.said):
                raise  # this request was wrong, or the server is: that says nothing of the next one
            raise self._cannot_score() from error
        if score is None:
            raise self._cannot_score()
        self._prompt_log_probs = True
        return score

    def _cannot_score(self) -> ModelError:
        """The error to raise; from now on, no score is tried."""
        self._prompt_log_probs = False
        message = (
            f"{self._pool} gives no log-probabilities of a prompt's own tokens "
            "(/completions with echo and logprobs): vLLM and SGLang do"
        )
        return ServerError(message) if self._required else LogProbsUnavailableError(message)


def _options(sampling: Sampling, row: int) -> dict[str, Any]:
    """The fields of a request that say how tokens are drawn; each row of a batch has its own seed."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "seed": None if sampling.seed is None else sampling.seed + row,
    }
