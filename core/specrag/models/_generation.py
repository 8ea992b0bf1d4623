"""Generating with a model of transformers: a batch of requests, token by token, in a loop of its own.

Log-probabilities come out of the generation itself. Rows that are done leave the batch. Headers are fed, not sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from specrag._abandoned import stop_if_abandoned
from specrag.engine import forward
from specrag.engine.kv_cache import RollbackCache, rollback_cache
from specrag.engine.sampling import draw, to_probabilities
from specrag.engine.step import NativeDecoder
from specrag.errors import InvalidInputError
from specrag.models._native_batch import NativeBatch
from specrag.models._scoring import probe_rows
from specrag.models._stopping import stoppable
from specrag.models.base import Completion, GeneratedText, GenerationRequest, Sampling
from specrag.models.tokenization import ConversationEncoder, IncrementalDecoder, StopStrings, shared_beginning
from specrag.schema import Usage

# A shorter common beginning of the prompts is not worth a forward pass of its own.
MIN_SHARED_TOKENS = 32


#: How rows share a batch: with what they begin with read once; padded; or not at all, one row after the other.
Layout = Literal["shared", "padded", "single"]


def generate(
    model: Any,
    rows: Sequence[Row],
    sampling: Sampling,
    layout: Layout = "shared",
    native: NativeDecoder | None = None,
) -> None:
    """Run every row to its end; what they wrote is in ``row.completion()``.

    Args:
        model: A causal language model of transformers.
        rows: One per request; at least one.
        sampling: How tokens are drawn. Its seed is not used here: each row has its own generator.
        layout: How the rows share a batch; see ``batch_layout``.
        native: The model's native forward pass, where it has one. It takes rows of any layout.
    """
    if layout == "single" and len(rows) > 1:
        for row in rows:
            generate(model, [row], sampling)
        return
    prompts, new_tokens = [row.prompt for row in rows], max(row.max_tokens for row in rows)
    share = layout == "shared" and _fits_window(model, prompts, new_tokens)
    batch: Batch | NativeBatch
    if native is None:
        batch = Batch(model, prompts, new_tokens, share=share)
    else:
        batch = NativeBatch(native, prompts, new_tokens)
    active = list(rows)
    while True:
        stop_if_abandoned()
        inputs = _next_inputs(active, batch.logits(), sampling)
        going = {i: token for i, token in enumerate(inputs) if token is not None}
        if not going:
            return
        if len(going) < len(active):
            batch.keep(list(going))
            active = [active[i] for i in going]
        batch.feed(list(going.values()))


class Batch:
    """Rows of tokens over one cache. What the prompts share is read once, at construction.

    A row of the cache holds [shared][padding][own prompt][generated]; the mask hides the padding.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, *, share: bool = True) -> None:
        self._model = model
        shared = shared_beginning(prompts) if len(prompts) > 1 and share else 0
        shared = shared if shared >= MIN_SHARED_TOKENS else 0
        longest = max(map(len, prompts)) - shared
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            own = prompt[shared:]
            ids[i, longest - len(own) :] = torch.tensor(own)
            mask[i, longest - len(own) :] = 1
        self._ids, self._mask = ids.to(model.device), mask.to(model.device)  # the tokens to feed next; the whole row
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0) + shared
        self._cache = _cache(model, shared + longest + new_tokens)
        # The one place that chooses our own forward pass for generation.
        self._light = isinstance(self._cache, RollbackCache) and forward.supports(model)
        if shared:
            beginning = torch.tensor([prompts[0][:shared]], device=model.device)
            with stoppable(model):
                model(input_ids=beginning, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache.batch_repeat_interleave(len(prompts))
            self._mask = torch.cat([self._mask.new_ones(len(prompts), shared), self._mask], dim=-1)

    def logits(self) -> Tensor:  # [rows, vocabulary]
        """Feed the tokens that are next; the logits after them."""
        if self._light and self._ids.shape[1] == 1:
            hidden = torch.zeros(self._mask.shape).masked_fill_(self._mask == 0, float("-inf"))[:, None, None]
            attend = partial(forward.one_query_attention, hidden=hidden)
            return forward.decoder_forward(self._model, self._ids, self._positions, self._cache, attend)[:, -1]
        with stoppable(self._model) if self._ids.shape[1] > 1 else nullcontext():
            return self._model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with ``rows`` alone."""
        kept = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._positions = self._mask[kept], self._positions[kept]

    def feed(self, tokens: Sequence[int]) -> None:
        """The next token of each row."""
        self._ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=-1)
        self._positions = self._positions[:, -1:] + 1


def _fits_window(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> bool:
    """Whether no row outgrows the model's sliding window: padding inside a row would count there."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is None or max(map(len, prompts)) + new_tokens <= window


def batch_layout(model: Any, tolerance: float) -> Layout:
    """The best layout in which rows of a batch write what each writes alone.

    Some models take positions from the place in the row (ALiBi): padding between the shared beginning and a row's own
    part moves them. The models of ``specrag.engine.forward`` take them as they are given, and need no probe.

    Args:
        tolerance: The largest difference, in nats, that counts as equal.
    """
    if forward.supports(model):
        return "shared"
    prompts = probe_rows(model, MIN_SHARED_TOKENS, (3, 20))
    alone = [_probed(model, [prompt])[0] for prompt in prompts]
    for layout in ("shared", "padded"):
        try:
            together = _probed(model, prompts, share=layout == "shared")
        except (ValueError, TypeError, RuntimeError, IndexError):
            continue
        if all((a - b).abs().max() <= tolerance for a, b in zip(alone, together, strict=True)):
            return layout  # type: ignore[return-value]
    return "single"


def _probed(model: Any, prompts: Sequence[Sequence[int]], *, share: bool = False) -> Tensor:  # [rows, 2, 8]
    """The log-probabilities of some tokens after each prompt, and after one token more."""
    batch = Batch(model, prompts, 2, share=share)
    found = []
    for _ in range(2):
        found.append(torch.log_softmax(batch.logits().float(), dim=-1)[:, :8])
        batch.feed([1] * len(prompts))
    return torch.stack(found, dim=1)


def _cache(model: Any, capacity: int) -> Cache:
    """A cache that is written in place, or transformers' own where the architecture keeps another kind of state."""
    try:
        return rollback_cache(model.config, capacity)
    except InvalidInputError:
        return DynamicCache(config=model.config)


def _next_inputs(
    rows: Sequence[Row],
    logits: Tensor,  # [rows, vocabulary], the model's at the last position
    sampling: Sampling,
) -> list[int | None]:
    """Advance every row by one token. The result is the token to feed next per row, ``None`` for a row that is done."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    if sampling.greedy:
        chosen = log_probs.argmax(-1)
    else:
        probabilities = to_probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        chosen = torch.stack([draw(probabilities[i : i + 1], row.generator)[0] for i, row in enumerate(rows)])
    values = log_probs.gather(-1, chosen[:, None])[:, 0].tolist()
    tops: list[dict[int, float]] = [{} for _ in rows]
    count = max(row.top_count for row in rows)
    if count:
        best = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
        tops = [dict(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [
        row.next_forced() if row.forced else row.take(token, value, top)
        for row, token, value, top in zip(rows, chosen.tolist(), values, tops, strict=True)
    ]


class Row:
    """One request of a running batch: its stage, what it has written, and what must be fed next.

    Args:
        encoder: Renders and tokenises the request.
        request: What to write.
        end_tokens: Ids that end a reply.
        generator: Draws this row's tokens; ``None``: torch's own.
        top_count: How many of the likeliest tokens to report per position.
    """

    def __init__(
        self,
        encoder: ConversationEncoder,
        request: GenerationRequest,
        end_tokens: frozenset[int],
        generator: torch.Generator | None = None,
        top_count: int = 0,
    ) -> None:
        self._encoder, self._end_tokens = encoder, end_tokens
        self.generator, self.top_count = generator, top_count
        self.prompt = encoder.encode_generation(request)
        self._stages = deque(request.stages)
        self._forced: deque[int] = deque()
        self._parts: list[GeneratedText] = []
        self._sampled = 0
        headers = sum(len(encoder.encode_text(stage.header)) for stage in request.stages[1:])
        self.max_tokens = request.max_tokens + headers + len(request.stages)
        self._begin_stage()

    def _begin_stage(self) -> None:
        self._decoder = IncrementalDecoder(self._encoder.tokenizer)
        self._log_probs: list[float] = []
        self._top: list[dict[str, float]] = []
        self._stop = StopStrings(self._stages[0].stop, after_visible=True)

    @property
    def forced(self) -> bool:
        """Whether the next token is given, not sampled."""
        return bool(self._forced)

    def next_forced(self) -> int:
        """The given token that is fed next."""
        return self._forced.popleft()

    def take(self, token: int, log_prob: float, top: dict[int, float]) -> int | None:
        """Record a sampled token; the id to feed next, or ``None`` when the row is done."""
        stage = self._stages[0]
        if self.top_count:
            decode = self._encoder.tokenizer.decode
            self._top.append({str(decode([i])): value for i, value in top.items()})
        self._sampled += 1
        if token in self._end_tokens:
            self._decoder.flush()
            return self._end_stage("stop", len(self._decoder.text))
        known = len(self._decoder.text)
        self._decoder.add(token)
        self._log_probs.append(log_prob)
        stop = self._stop.find(self._decoder.text, known)
        if stop is not None:
            return self._end_stage("stop", stop, unfed=self._unfed_text(stop))
        if len(self._log_probs) == stage.max_tokens:
            self._decoder.flush()
            return self._end_stage("length", len(self._decoder.text), last=token)
        return token

    def _unfed_text(self, stop: int) -> str:
        """The text before the stop string that is in the token just sampled, which was never fed."""
        fed = self._decoder.ends[-2] if len(self._decoder.ends) > 1 else 0
        return self._decoder.text[min(fed, stop) : stop]

    def _end_stage(
        self, finish: Literal["stop", "length"], end: int, unfed: str = "", last: int | None = None
    ) -> int | None:
        kept = sum(1 for e in self._decoder.ends if e <= end)
        self._parts.append(
            GeneratedText(
                text=self._decoder.text[:end],
                log_probs=tuple(self._log_probs[:kept]),
                tokens=kept,
                token_ends=tuple(self._decoder.ends[:kept]),
                finish=finish,
                top_log_probs=tuple(self._top) if self.top_count else None,
            )
        )
        self._stages.popleft()
        if not self._stages:
            return None
        self._begin_stage()
        # The model reads the text as it was kept: the piece before the stop string, then the next header.
        self._forced.extend([] if last is None else [last])
        self._forced.extend(self._encoder.encode_text(unfed + self._stages[0].header))
        return self._forced.popleft()

    def completion(self) -> Completion:
        """What the row wrote, one part per stage."""
        return Completion(tuple(self._parts), Usage(len(self.prompt), self._sampled))
