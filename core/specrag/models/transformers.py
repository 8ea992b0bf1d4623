"""``TransformersLM``: a language model that runs in this process, with transformers and torch.

How it generates is in ``_generation``, how it scores in ``_scoring``, how it is loaded in ``_loading``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from specrag._abandoned import stop_if_abandoned
from specrag._extras import require
from specrag._files import path_of

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "local", "TransformersLM", otherwise="use OpenAILM with a server")

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specrag.engine.lora import merge_lora
from specrag.engine.memory import out_of_memory
from specrag.engine.onednn import unpack
from specrag.engine.step import NativeDecoder
from specrag.errors import InvalidInputError, ModelError, kind_of
from specrag.models import _generation, _scoring
from specrag.models._loading import load_tokenizer
from specrag.models._stopping import stoppable
from specrag.models._weights import NativeOf, check_quantization, lay_out, load_model
from specrag.models.base import (
    Capabilities,
    Completion,
    GenerationRequest,
    LanguageModel,
    Quantization,
    Sampling,
    Score,
    Turn,
)
from specrag.models.tokenization import ConversationEncoder
from specrag.schema import Usage

# Nats by which a packed row and single ones differ in low precision.
_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_INT8_TOLERANCE = 0.5


class TransformersLM(LanguageModel):
    """A causal language model of transformers, for drafting, verifying, or both.

    On x86 CPUs, the weights of a model that is loaded here are laid out for fast products;
    ``specrag.engine.onednn.unpack`` undoes that for those who train ``.model``. Models of the Llama, Mistral, Qwen2
    and Qwen3 families run in the native engine in bfloat16 and with quantized weights (``specrag.engine.step``), where
    this machine has a C compiler. Float32 layers multiply with oneDNN.

    Args:
        model: A folder, a ``.gguf`` file, a hub id, or a loaded model (then ``tokenizer`` is needed).
        tokenizer: A folder, hub id or fast tokenizer; by default the model's own.
        dtype: A torch dtype; by default float32 on the CPU and bfloat16 elsewhere. On a CPU that multiplies bfloat16,
            that is more than twice as fast.
        device: ``"cpu"``, ``"cuda:0"``, ...; by default a GPU when there is one.
        device_map: Given to ``from_pretrained`` in place of ``device`` (several devices; needs accelerate).
        adapter: A folder with a LoRA adapter in peft's format, merged into the weights (``specrag train`` makes one).
        quantization: What the weights are kept as, on the CPU. ``"gguf"``: the blocks of the ``.gguf`` file, as they
            are. ``"int8"`` and ``"int4"``: rounded, with one scale for every 32 weights; a loaded model is changed in
            place. Decoding reads all weights for every token, so fewer bits are faster.
        chat_template: ``"auto"``: the tokenizer's own where it has one; ``None``: plain prompts; or a template.
        packing: ``"auto"`` packs all scored conversations into one row where the architecture allows it, which is
            checked once against scoring one at a time. ``False`` uses padded batches, ``True`` skips the check.

    Raises:
        MissingExtraError: The extra ``local`` is not installed; raised by the import of this class.
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
        ModelError: The weights need more memory than is free (on Linux and on CUDA). Nothing was loaded.
        InvalidInputError: The arguments do not go together.
    """

    model: Any

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        adapter: str | Path | None = None,
        quantization: Quantization | None = None,
        chat_template: str | None = "auto",
        packing: Literal["auto"] | bool = "auto",
    ) -> None:
        if packing not in ("auto", True, False):
            raise InvalidInputError(f"packing must be 'auto', True or False, got {packing!r}")
        if device is not None and device_map is not None:
            raise InvalidInputError("give device or device_map, not both")
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_quantization(quantization, model, wanted, device_map)
        if quantization == "gguf" and adapter is not None:
            raise InvalidInputError("an adapter cannot be merged into quantization='gguf': use 'int8' or 'int4'")
        if isinstance(model, PreTrainedModel):
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise InvalidInputError("a loaded model needs its tokenizer: TransformersLM(model, tokenizer)")
            self.model, self.name = model, str(getattr(model, "name_or_path", "") or kind_of(model))
            if any(change is not None for change in (dtype, device, adapter, quantization)):
                unpack(self.model)
            if dtype is not None or device is not None:
                self.model = self.model.to(device=device, dtype=dtype)
        else:
            dtype = dtype or (None if wanted.type == "cpu" else torch.bfloat16)
            self.model, self.name = load_model(model, quantization, dtype, wanted, device_map), str(model)
            tokenizer = load_tokenizer(tokenizer or model)
            if device_map is None:
                self.model = self.model.to(wanted)
            self.folder = _folder(model)
        if adapter is not None:
            merge_lora(self.model, adapter)
            self.folder, self.name = _folder(adapter), f"{self.name}+{Path(adapter).name}"
        # A caller's own model keeps its weights in place. One that accelerate dispatched keeps its modules and hooks.
        lay_out(self.model, quantization, loaded_here=not isinstance(model, PreTrainedModel) and device_map is None)
        self.model.eval()
        self._native = NativeOf()
        self.quantization = quantization
        self.tokenizer: Any = tokenizer
        self.encoder = ConversationEncoder(self.tokenizer, chat_template)
        self.lock = threading.RLock()  # held during each use of the model
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

    @property
    def native(self) -> NativeDecoder | None:
        """The model's forward pass in the native engine; ``None`` where torch runs it."""
        return self._native(self.model)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids that end a reply: the tokenizer's, the generation config's, and the one that closes a turn."""
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        known = self.tokenizer.get_added_vocab()
        ids |= {known[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>") if t in known}
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def packs(self) -> bool:
        """Whether scored conversations share one row: as ``packing`` says, or as the check found."""
        if self._packing != "auto":
            return bool(self._packing)
        with self.lock, torch.inference_mode():
            return _scoring.obeys_explicit_masks(self.model, self._tolerance)

    @cached_property
    def _layout(self) -> _generation.Layout:
        """How rows share a batch, as the check found."""
        with self.lock, torch.inference_mode():
            return _generation.batch_layout(self.model, self._tolerance)

    @property
    def _tolerance(self) -> float:
        return _INT8_TOLERANCE if self.quantization else _PACKING_TOLERANCE.get(self.dtype, 0.5)

    def count_tokens(self, text: str) -> int:
        return len(self.encoder.encode_text(text))

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling = Sampling(), *, top_log_probs: int = 0
    ) -> list[Completion]:
        if not requests:
            return []
        rows = []
        for i, request in enumerate(requests):
            generator = None
            if sampling.seed is not None:
                generator = torch.Generator(self.device).manual_seed(sampling.seed + i)
            row = _generation.Row(self.encoder, request, self.end_tokens, generator, top_log_probs)
            self._check_length(len(row.prompt) + request.max_tokens, "prompt and reply")
            rows.append(row)
        native = self.native
        layout = self._layout if len(rows) > 1 and native is None else "shared"
        with self._in_use("generating"):
            _generation.generate(self.model, rows, sampling, layout, native)
        return [row.completion() for row in rows]

    def score(self, requests: Sequence[Sequence[Turn]]) -> list[Score]:
        encoded = [self.encoder.encode_scored(turns) for turns in requests]
        for conversation in encoded:
            self._check_length(len(conversation.ids), "conversation to score")
        scores: dict[int, Score] = {}
        with self._in_use("scoring"):
            for group in _scoring.groups(encoded):
                members = [encoded[i] for i in group]
                packed = _scoring.fits_window(self.model, members) and (len(members) == 1 or self.packs)
                score = _scoring.score_packed if packed else _scoring.score_padded
                with stoppable(self.model):
                    scored = score(self.model, members)
                for i, by_position in zip(group, scored, strict=True):
                    named = {n: tuple(by_position[p] for p in at) for n, at in encoded[i].segments.items()}
                    scores[i] = Score(named, Usage(prompt_tokens=len(encoded[i].ids)))
        return [scores[i] for i in range(len(encoded))]

    @contextlib.contextmanager
    def _in_use(self, doing: str) -> Iterator[None]:
        """The model is ours alone."""
        with self.lock, torch.inference_mode(), _as_model_error(doing):
            stop_if_abandoned()
            yield

    def _check_length(self, tokens: int, what: str) -> None:
        if self.context_window is not None and tokens > self.context_window:
            raise InvalidInputError(
                f"{what} of {tokens} tokens exceed the {self.context_window} positions of {self.name}: "
                "shorten the input"
            )


def _folder(path: str | Path) -> Path | None:
    """``path`` where it is a folder on this machine."""
    local = path_of(path)
    return local if local.is_dir() else None


@contextlib.contextmanager
def _as_model_error(doing: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ModelError(f"out of memory while {doing}: use fewer drafts or shorter passages") from error
