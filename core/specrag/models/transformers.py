"""Models in this process: transformers and torch.

``generate`` runs all requests as one left-padded batch in a loop of its own: log-probabilities come out
of the generation itself, finished rows leave the batch, and fixed headers are fed instead of sampled.
``score`` packs all conversations into one row of one forward pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specrag.engine import forward
from specrag.engine.int8 import quantize_int8
from specrag.engine.kv_cache import RollbackCache, rollback_cache
from specrag.engine.lora import merge_lora
from specrag.engine.memory import out_of_memory
from specrag.engine.onednn import unpack, use_onednn
from specrag.engine.sampling import draw, to_probabilities
from specrag.errors import InvalidInputError, ModelError, ModelNotFoundError
from specrag.models.base import (
    Capabilities,
    Completion,
    GeneratedText,
    GenerationRequest,
    LanguageModel,
    Sampling,
    Score,
    Turn,
)
from specrag.models.tokenization import ConversationEncoder, EncodedConversation, IncrementalDecoder, StopStrings
from specrag.schema import Usage

# Tokens of one packed pass. Its mask has the square of this many entries: 64 MiB in float32.
MAX_PACKED_TOKENS = 4096
# Positions whose logits over the whole vocabulary stand in memory at once as float32.
SCORED_AT_ONCE = 512
# A shorter common beginning of the prompts is not worth a forward pass of its own.
MIN_SHARED_TOKENS = 32
# Where low precision begins to differ by itself between a packed row and single ones.
_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


class TransformersLM(LanguageModel):
    """A causal LM of transformers, for drafting, verifying, or both.

    On x86 CPUs float32 linear layers multiply with oneDNN, and a model that is loaded here, in float32 or in bfloat16, has its weights
    laid out for it (``specrag.engine.onednn``: ``unpack`` undoes that for those who train ``.model``).

    Args:
        model: A folder, a ``.gguf`` file, a hub id, or a loaded model (then ``tokenizer`` is needed).
        tokenizer: A folder, hub id or fast tokenizer; by default the model's own.
        dtype: A torch dtype; by default float32 on the CPU and bfloat16 elsewhere. Several drafts at once are fastest in
            bfloat16 on a CPU that multiplies it.
        device: ``"cpu"``, ``"cuda:0"``, ...; by default a GPU when there is one.
        device_map: Given to ``from_pretrained`` in place of ``device`` (several devices; needs accelerate).
        adapter: A folder with a LoRA adapter in peft's format, merged into the weights (``specrag train`` makes one).
        quantization: ``"int8"``: linear layers with int8 weights, on the CPU; fastest for one row at a time, as RAPID's drafter
            decodes. A loaded model is changed in place.
        chat_template: ``"auto"``: the tokenizer's own where it has one; ``None``: plain prompts; or a template.
        packing: ``"auto"`` packs all scored conversations into one row where the architecture allows it
            (checked once against scoring one at a time); ``False`` uses padded batches.

    Raises:
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
        InvalidInputError: The arguments do not go together.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        adapter: str | Path | None = None,
        quantization: Literal["int8"] | None = None,
        chat_template: str | None = "auto",
        packing: Literal["auto"] | bool = "auto",
    ) -> None:
        if device is not None and device_map is not None:
            raise InvalidInputError("give device or device_map, not both")
        if quantization not in (None, "int8"):
            raise InvalidInputError(f"quantization must be None or 'int8', got {quantization!r}")
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if quantization == "int8" and (wanted.type != "cpu" or device_map is not None):
            raise InvalidInputError("quantization='int8' runs on the CPU: give device='cpu'")
        if isinstance(model, PreTrainedModel):
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise InvalidInputError("a loaded model needs its tokenizer: TransformersLM(model, tokenizer)")
            self.model, self.name = model, str(getattr(model, "name_or_path", "") or type(model).__name__)
            if any(change is not None for change in (dtype, device, adapter, quantization)):
                unpack(self.model)
            if dtype is not None or device is not None:
                self.model = self.model.to(device=device, dtype=dtype)
        else:
            dtype = dtype or (torch.float32 if wanted.type == "cpu" else torch.bfloat16)
            self.name = str(model)
            place = {} if device_map is None else {"device_map": device_map}
            self.model, own = _load(model, None if tokenizer else AutoTokenizer, dtype, place)
            tokenizer = load_tokenizer(tokenizer) if tokenizer else own
            if device_map is None:
                self.model = self.model.to(wanted)
            self.folder = Path(model).expanduser()
        if adapter is not None:
            merge_lora(self.model, adapter)
            self.folder = Path(adapter).expanduser()
            self.name = f"{self.name}+{Path(adapter).name}"
        if quantization == "int8":
            quantize_int8(self.model)
        # A caller's own model stays as it lies, and one that accelerate dispatched keeps its modules (and their hooks).
        use_onednn(self.model, pack=not isinstance(model, PreTrainedModel) and device_map is None)
        self.model.eval()
        self.quantization = quantization
        self.tokenizer: Any = tokenizer
        self.encoder = ConversationEncoder(tokenizer, chat_template)
        self.lock = threading.RLock()
        self._packing = packing

    def __repr__(self) -> str:
        return f"TransformersLM({self.name!r}, dtype={self.dtype}, device={self.device})"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(prompt_log_probs=True, generation_log_probs=True, batched=True, prefill=True)

    @property
    def context_window(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a reply: the tokenizer's, the generation config's, and the one that closes a turn."""
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        known = self.tokenizer.get_added_vocab()
        ids |= {known[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>") if t in known}
        return frozenset(i for i in ids if i is not None)

    def count_tokens(self, text: str) -> int:
        return len(self.encoder.encode_text(text))

    # --- generation -----------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        if not requests:
            return []
        prompts = [self.encoder.encode_generation(request) for request in requests]
        for prompt, request in zip(prompts, requests, strict=True):
            self._check_length(len(prompt) + request.max_tokens, "prompt and reply")
        rows = [
            _Row(self, request, None if sampling.seed is None else sampling.seed + i, top_log_probs)
            for i, request in enumerate(requests)
        ]
        with self.lock, torch.inference_mode(), _as_model_error("generating"):
            self._decode(prompts, rows, sampling)
        return [row.completion(len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]

    def _decode(self, prompts: list[list[int]], rows: list[_Row], sampling: Sampling) -> None:
        """Prefill what the prompts share once, then the rest as a left-padded batch, then token by token.

        A row of the cache: [shared][padding][own prompt][generated]; the mask hides the padding.
        """
        shared = _shared_prefix(prompts) if len(prompts) > 1 else 0
        shared = shared if shared >= MIN_SHARED_TOKENS else 0
        longest = max(map(len, prompts)) - shared
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            own = prompt[shared:]
            ids[i, longest - len(own) :] = torch.tensor(own)
            mask[i, longest - len(own) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0) + shared
        cache = self._cache(shared + longest + max(row.max_tokens for row in rows))
        if shared:
            beginning = torch.tensor([prompts[0][:shared]], device=self.device)
            self.model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
            mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=-1)
        active, light = rows, isinstance(cache, RollbackCache) and forward.supports(self.model)
        while True:
            if light and ids.shape[1] == 1:
                hidden = torch.zeros(mask.shape).masked_fill_(mask == 0, float("-inf"))[:, None, None]
                attend = partial(forward.one_query_attention, hidden=hidden)
                logits = forward.decoder_forward(self.model, ids, positions, cache, attend)[:, -1]
            else:
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            inputs = _next_inputs(active, logits, sampling)
            going = [i for i, token in enumerate(inputs) if token is not None]
            if not going:
                return
            if len(going) < len(active):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                mask, positions = mask[keep], positions[keep]
                active = [active[i] for i in going]
            ids = torch.tensor([[inputs[i]] for i in going], device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=-1)
            positions = positions[:, -1:] + 1

    def _cache(self, capacity: int) -> Cache:
        """A cache written in place, or transformers' own where the architecture keeps another kind of state."""
        try:
            return rollback_cache(self.model.config, capacity)
        except InvalidInputError:
            return DynamicCache(config=self.model.config)

    # --- scoring --------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        encoded = [self.encoder.encode_scored(turns) for turns in requests]
        for conversation in encoded:
            self._check_length(len(conversation.ids), "conversation to score")
        scores: list[Score | None] = [None] * len(encoded)
        with self.lock, torch.inference_mode(), _as_model_error("scoring"):
            for group in self._groups(encoded):
                members = [encoded[i] for i in group]
                log_probs = self._score_packed(members) if self._may_pack(members) else self._score_padded(members)
                for i, conversation, by_position in zip(group, members, log_probs, strict=True):
                    named = {n: tuple(by_position[p] for p in at) for n, at in conversation.segments.items()}
                    scores[i] = Score(named, Usage(prompt_tokens=len(conversation.ids)))
        return [score for score in scores if score is not None]

    def _groups(self, encoded: Sequence[EncodedConversation]) -> Iterator[list[int]]:
        """Indices of the conversations that share a pass, shortest first so that little is padding."""
        group: list[int] = []
        for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids)):
            if group and sum(len(encoded[j].ids) for j in (*group, i)) > MAX_PACKED_TOKENS:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _may_pack(self, members: Sequence[EncodedConversation]) -> bool:
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window is not None and max(len(member.ids) for member in members) > window:
            return False  # one explicit mask serves all layers, so it must not need to slide
        return len(members) == 1 or (self._can_pack if self._packing == "auto" else self._packing)

    @cached_property
    def _can_pack(self) -> bool:
        """Whether this architecture obeys an explicit mask: a packed probe must equal the same texts alone."""
        if self.model.config._attn_implementation not in ("sdpa", "eager"):
            return False
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.get_text_config().vocab_size
        probes = []
        for length in (5, 9):
            ids = torch.randint(vocabulary // 2, (length,), generator=generator).tolist()
            probes.append(EncodedConversation(ids, {"all": list(range(1, length))}))
        try:
            packed = self._score_packed(probes)
        except (ValueError, TypeError, RuntimeError):
            return False
        alone = [self._score_padded([probe])[0] for probe in probes]
        tolerance = 0.5 if self.quantization else _PACKING_TOLERANCE.get(self.dtype, 0.5)
        return all(abs(a[p] - b[p]) <= tolerance for a, b in zip(packed, alone, strict=True) for p in a)

    def _score_packed(self, members: Sequence[EncodedConversation]) -> list[dict[int, float]]:
        """All conversations in one row: what they have in common at the start stands once, before the rest.

        Row: [shared][own part of 1][own part of 2]... A token sees the shared part and its own conversation
        up to itself; positions continue from the shared part in each. Equal to scoring each alone.
        """
        shared = _shared_prefix([member.ids for member in members]) if len(members) > 1 else 0
        ids, owners, positions, starts = members[0].ids[:shared], [-1] * shared, list(range(shared)), []
        for owner, member in enumerate(members):
            starts.append(len(ids) - shared)  # row index = this + index in the conversation, behind the shared part
            ids = ids + member.ids[shared:]
            owners += [owner] * (len(member.ids) - shared)
            positions += range(shared, len(member.ids))
        wanted = [
            (starts[owner] + p - 1 if p > shared else p - 1, member.ids[p], owner, p)
            for owner, member in enumerate(members)
            for p in sorted(p for at in member.segments.values() for p in at)
        ]
        if not wanted:
            return [{} for _ in members]
        mask = None
        if len(members) > 1:
            owner_of = torch.tensor(owners, device=self.device)
            seen = (owner_of[None, :] == -1) | (owner_of[None, :] == owner_of[:, None])
            seen = seen & torch.ones_like(seen).tril()
            mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[None, None]
        rows = sorted({row for row, *_ in wanted})
        logits = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            attention_mask=mask,
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(rows, device=self.device),
        ).logits[0]
        place = {row: i for i, row in enumerate(rows)}
        values = _log_probs(logits, [place[row] for row, *_ in wanted], [token for _, token, *_ in wanted])
        scored: list[dict[int, float]] = [{} for _ in members]
        for (_, _, owner, position), value in zip(wanted, values, strict=True):
            scored[owner][position] = value
        return scored

    def _score_padded(self, members: Sequence[EncodedConversation]) -> list[dict[int, float]]:
        """A right-padded batch; logits at every position that any conversation wants."""
        longest = max(len(member.ids) for member in members)
        ids = torch.zeros(len(members), longest, dtype=torch.long)
        mask = torch.zeros(len(members), longest, dtype=torch.long)
        for i, member in enumerate(members):
            ids[i, : len(member.ids)] = torch.tensor(member.ids)
            mask[i, : len(member.ids)] = 1
        kept = sorted({p - 1 for member in members for at in member.segments.values() for p in at})
        if not kept:
            return [{} for _ in members]
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=None if len(members) == 1 else mask.to(self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept, device=self.device),
        ).logits
        place = {position: i for i, position in enumerate(kept)}
        scored = []
        for row, member in enumerate(members):
            wanted = sorted(p for at in member.segments.values() for p in at)
            values = _log_probs(logits[row], [place[p - 1] for p in wanted], [member.ids[p] for p in wanted])
            scored.append(dict(zip(wanted, values, strict=True)))
        return scored

    def _check_length(self, tokens: int, what: str) -> None:
        if self.context_window is not None and tokens > self.context_window:
            raise InvalidInputError(
                f"{what} of {tokens} tokens exceed the {self.context_window} positions of {self.name}: shorten the input"
            )


class _Row:
    """One request of a running batch: which stage it is in, what it has written, what must be fed next."""

    def __init__(self, lm: TransformersLM, request: GenerationRequest, seed: int | None, top_log_probs: int) -> None:
        self._lm = lm
        self._stages = deque(request.stages)
        self._top_count = top_log_probs
        self._forced: deque[int] = deque()
        self._parts: list[GeneratedText] = []
        self._sampled = 0
        headers = sum(len(lm.encoder.encode_text(stage.header)) for stage in request.stages[1:])
        self.max_tokens = request.max_tokens + headers + len(request.stages)
        self._begin()
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(lm.device).manual_seed(seed)

    def _begin(self) -> None:
        self._decoder = IncrementalDecoder(self._lm.tokenizer)
        self._log_probs: list[float] = []
        self._top: list[dict[str, float]] = []
        self._stop = StopStrings(self._stages[0].stop, after_visible=True)

    @property
    def forced(self) -> bool:
        return bool(self._forced)

    @property
    def top_count(self) -> int:
        return self._top_count

    def next_forced(self) -> int:
        return self._forced.popleft()

    def take(self, token: int, log_prob: float, top: dict[int, float]) -> int | None:
        """Record a sampled token; return the id to feed next, or ``None`` when the row is done."""
        stage = self._stages[0]
        if self._top_count:
            decode = self._lm.tokenizer.decode
            self._top.append({str(decode([i])): value for i, value in top.items()})
        self._sampled += 1
        if token in self._lm.end_tokens:
            self._decoder.flush()
            return self._end_stage("stop", len(self._decoder.text))
        known = len(self._decoder.text)
        self._decoder.add(token)
        self._log_probs.append(log_prob)
        stop = self._stop.find(self._decoder.text, known)
        if stop is not None:
            return self._end_stage("stop", stop, unfed=self._pending_text(stop))
        if len(self._log_probs) == stage.max_tokens:
            self._decoder.flush()
            return self._end_stage("length", len(self._decoder.text), last=token)
        return token

    def _pending_text(self, stop: int) -> str:
        """Text before the stop string that stands in the token just sampled, which was never fed."""
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
                top_log_probs=tuple(self._top) if self._top_count else None,
            )
        )
        self._stages.popleft()
        if not self._stages:
            return None
        self._begin()
        # What the model reads is the text as kept: the piece before the stop string, then the next header.
        self._forced.extend([] if last is None else [last])
        self._forced.extend(self._lm.encoder.encode_text(unfed + self._stages[0].header))
        return self._forced.popleft()

    def completion(self, prompt_tokens: int) -> Completion:
        return Completion(tuple(self._parts), Usage(prompt_tokens, self._sampled))


def _next_inputs(rows: list[_Row], logits: Tensor, sampling: Sampling) -> list[int | None]:
    """Advance every row by one token; ``logits`` [rows, vocab] are the model's at the last position."""
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


def _log_probs(logits: Tensor, rows: list[int], tokens: list[int]) -> list[float]:
    """Log P of ``tokens[i]`` under ``logits[rows[i]]`` ([positions, vocab]), a bounded number at a time."""
    values: list[float] = []
    for at in range(0, len(rows), SCORED_AT_ONCE):
        some = logits[rows[at : at + SCORED_AT_ONCE]].float()
        ids = torch.tensor(tokens[at : at + SCORED_AT_ONCE], device=some.device)
        values += (some.gather(-1, ids[:, None])[:, 0] - some.logsumexp(-1)).tolist()
    return values


def _shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; the last of each row stays its own."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    for i in range(shortest):
        if any(row[i] != first[i] for row in rows):
            return i
    return max(shortest, 0)


# --- loading --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load reports of transformers on stderr."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _gguf(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    return {"gguf_file": file.name} if file.suffix == ".gguf" else {}


def _check_path(path: str | Path) -> str:
    """``path`` as transformers takes it, refused when it is a local path to nothing."""
    local = Path(path).expanduser()
    text = str(path)
    is_local = isinstance(path, Path) or text.startswith(("/", "./", "../", "~")) or local.suffix == ".gguf"
    if is_local and not local.exists():
        raise ModelNotFoundError(f"no model at {local}: give a model folder, a .gguf file or a hub id")
    if local.is_dir() and not (local / "config.json").exists():
        raise ModelNotFoundError(f"{local} has no config.json: it is not a model folder")
    return str(local.parent if local.suffix == ".gguf" else local if local.exists() else text)


def _load(path: str | Path, tokenizers: Any, dtype: torch.dtype, place: dict[str, Any]) -> tuple[Any, Any]:
    where, extra = _check_path(path), _gguf(path)
    with quiet_transformers():
        try:
            tokenizer = tokenizers.from_pretrained(where, **extra) if tokenizers else None
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra, **place)
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"{path} could not be loaded as a causal language model: {error}") from error
    return model, tokenizer


def load_tokenizer(path: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a ``.gguf`` file or a hub id.

    Raises:
        ModelNotFoundError: None could be loaded from there.
    """
    if isinstance(path, PreTrainedTokenizerBase):
        return path
    local = Path(path).expanduser()
    if isinstance(path, Path) and not local.exists():
        raise ModelNotFoundError(f"no tokenizer at {local}")
    where = local.parent if local.suffix == ".gguf" else local if local.exists() else path
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(str(where), **_gguf(path))
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"no tokenizer could be loaded from {path}: {error}") from error


@contextlib.contextmanager
def _as_model_error(doing: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ModelError(f"out of memory while {doing}: use fewer drafts or shorter passages") from error
