"""A model and the cache of one conversation: what target and drafters run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from specrag._abandoned import stop_if_abandoned
from specrag.engine import forward, graphs
from specrag.engine.attention import attend, check_supported, packed_attention
from specrag.engine.kv_cache import rollback_cache, token_bytes
from specrag.engine.memory import check_room, out_of_memory
from specrag.engine.trees import TreeShape
from specrag.errors import InvalidInputError, ModelError
from specrag.models.transformers import TransformersLM

#: Tokens of one prefill pass. Memory holds their activations and their mask, beside weights and cache.
PREFILL_CHUNK = 512

Progress = Callable[[int, int], None]


class CachedModel:
    """A model and the cache of one conversation: feed tokens, read logits, roll back.

    Args:
        lm: The model. Its lock is held during each forward pass, so it may be shared.
        capacity: Tokens to make room for. The cache grows when it is full.
        vocabulary: The number of logits to keep; the rest is padding of the vocabulary.

    Attributes:
        native: The model's forward pass in the native engine, where it has one.
        graphs: Steps of a few tokens on a GPU, where they can be recorded.
        light: Whether steps of a few tokens take ``specrag.engine.forward`` in place of transformers' forward pass.
        skipped: Tokens before the next one that the cache leaves out (see ``keep``).
        forward_seconds: Seconds inside forward passes so far.

    Raises:
        InvalidInputError: The architecture is not supported.
        ModelError: The keys and values of ``capacity`` tokens need more memory than is free.
    """

    def __init__(self, lm: TransformersLM, capacity: int, vocabulary: int) -> None:
        check_supported(lm.model.config)
        self.lm, self.vocabulary = lm, vocabulary
        self.native = lm.native
        self._check_room(capacity)
        self.cache = rollback_cache(lm.model.config, capacity) if self.native is None else self.native.cache(capacity)
        self.graphs = graphs.StepGraphs(lm.model, self.cache) if graphs.supports(lm.model) else None
        self.light = forward.supports(lm.model)
        self.skipped = 0
        self.forward_seconds = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.lm.dtype if self.native is None else torch.bfloat16

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.length

    def feed(self, tokens: Sequence[int] | Tensor) -> Tensor:  # [tokens, vocabulary], the model's dtype
        """The logits after each of ``tokens``, which the cache then holds."""
        ids = torch.as_tensor(tokens, device=self.lm.device)[None]
        return self._forward(ids, ids.shape[1])[:, : self.vocabulary]

    @property
    def repeats_single_steps(self) -> bool:
        """Whether ``feed_tree(..., exact=True)`` is possible."""
        return self.native is not None or self.light

    def feed_tree(  # [tokens, vocabulary], the model's dtype
        self, tokens: Sequence[int], shape: TreeShape, *, exact: bool = False
    ) -> Tensor:
        """The logits after each node of a tree, which the cache then holds one beside the other; see ``keep_path``.

        Args:
            tokens: Per row of ``shape``.
            shape: Which row follows which.
            exact: Logits, keys and values have the bits of steps over a single token. In the native engine they always
                have; elsewhere it takes longer, and ``repeats_single_steps`` says whether it is possible.

        Raises:
            InvalidInputError: There are more or fewer tokens than rows, or ``exact`` is not possible.
            ModelError: There is no memory for the tree. The cache is as it was.
        """
        if exact and not self.repeats_single_steps:
            raise InvalidInputError(
                f"{self.lm.name} does not repeat single steps: its forward pass is transformers' own"
            )
        if len(tokens) != len(shape.parents):
            raise InvalidInputError(f"a tree of {len(shape.parents)} rows got {len(tokens)} tokens")
        if shape.is_chain and (self.native is not None or not exact):
            return self.feed(tokens)
        before = self.length
        try:
            ids = torch.as_tensor(tokens, device=self.lm.device)[None]
            return self._forward(ids, len(tokens), shape, exact=exact)[:, : self.vocabulary]
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, ModelError) or not out_of_memory(error):
                raise
            for layer in self.cache.layers:
                layer.rollback(max(0, layer.length - before))
            raise ModelError(
                f"out of memory for a tree of {len(tokens)} tokens after {before}: lower candidates or tree_width"
            ) from error

    def keep_path(self, before: int, rows: Sequence[int]) -> None:
        """Keep those rows of a tree that was fed after ``before`` tokens, from the root on, and forget the others."""
        self.cache.keep_places(before, [before + row for row in rows])

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> Tensor | None:  # [vocabulary]
        """Feed many tokens in chunks of bounded memory.

        When a chunk fails, the cache is what it was before the call.

        Args:
            tokens: What to read.
            progress: Called after each chunk, with the tokens read so far and in all.

        Returns:
            The logits after the last token; ``None`` without tokens.

        Raises:
            ModelError: Memory ran out, or it is known before any token is read that it will.
        """
        start, logits = self.length, None
        self._check_room(start + len(tokens) - self.cache.capacity)
        try:
            for at in range(0, len(tokens), PREFILL_CHUNK):
                stop_if_abandoned()
                chunk = tokens[at : at + PREFILL_CHUNK]
                logits = self._forward(torch.tensor([list(chunk)], device=self.lm.device), 1)
                if progress is not None:
                    progress(at + len(chunk), len(tokens))
        except BaseException as error:
            for layer in self.cache.layers:  # layers may differ: the failure came in the middle of a pass
                layer.rollback(max(0, layer.length - start))
            if isinstance(error, ModelError) or not out_of_memory(error):
                raise
            raise ModelError(f"out of memory while reading {len(tokens)} tokens: give a shorter text") from error
        return None if logits is None else logits[-1, : self.vocabulary]

    def keep(self, other: CachedModel, positions: Sequence[int], end: int) -> None:
        """Begin with the keys and values that ``other`` holds at ``positions``. The next token stands at ``end``.

        ``other`` runs the same model, or a copy with weights of less precision.
        """
        kept = torch.tensor(positions)
        for own, its in zip(self.cache.layers, other.cache.layers, strict=True):
            kept = kept.to(its.key_buffer.device)
            own.update(*(b[:, :, kept].to(self.lm.device, self.dtype) for b in (its.key_buffer, its.value_buffer)))
        self.skipped = end - len(positions)

    def rollback_to(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""
        self.cache.rollback_to(length)

    def _check_room(self, tokens: int) -> None:
        """Check that there is memory for the keys and values of ``tokens`` more tokens. 0 and less are always allowed.

        A model on several devices has its cache there too, in parts that are not known here.
        """
        if tokens > 0 and len(set(getattr(self.lm.model, "hf_device_map", {}).values())) < 2:
            needed = tokens * token_bytes(self.lm.model.config, self.dtype)
            what = f"the keys and values of {tokens} tokens"
            check_room(needed, self.lm.device, what, "give a shorter text, or a smaller model")

    def _forward(self, ids: Tensor, keep: int, tree: TreeShape | None = None, *, exact: bool = False) -> Tensor:
        model: nn.Module = self.lm.model
        with self.lm.lock, torch.inference_mode(), packed_attention(model, tree):
            start = time.perf_counter()
            first, rows = self.length + self.skipped, ids.shape[1]
            if tree is None:
                at = torch.arange(first, first + rows, device=ids.device)[None]
            else:
                at = first + torch.tensor([tree.depths], device=ids.device)
            if self.native is not None:
                wanted = range(rows - keep, rows)
                logits = self.native(ids[0], at[0], self.cache, wanted=wanted, tree=tree)
            elif self.graphs is not None and self.length and keep == rows <= self.graphs.most_tokens:
                logits = self.graphs(ids, first, tree)
            elif exact and self.light and tree is not None:
                logits = forward.decoder_forward_by_rows(model, ids, at, self.cache, attend, tree)[0]
            elif self.light and self.length and rows <= forward.MAX_TOKENS:
                attending = attend if tree is None else partial(attend, tree=tree)
                logits = forward.decoder_forward(model, ids, at, self.cache, attending)[0, -keep:]
            else:
                logits = model(
                    input_ids=ids, position_ids=at, past_key_values=self.cache, use_cache=True, logits_to_keep=keep
                ).logits[0]
            if logits.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
            self.forward_seconds += time.perf_counter() - start
        return logits
