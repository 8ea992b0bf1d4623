"""A question-answering encoder: which span of which passage answers a question.

The encoder reads a question beside a passage and gives every token a start logit s and an end logit e (Devlin et al.,
arXiv 1810.04805, section 4.2). A span from token i to token j scores s_i + e_j. That no span answers scores s_0 + e_0,
at the first token. The functions on tensors serve reading and training (``specrag.training.reader``) alike, so both
normalise in the same way: one softmax over the spans of all passages of a question, with "no answer" as one more option
(Clark and Gardner, arXiv 1710.10723, section 3.2). So scores compare across passages.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrag._extras import require
from specrag._files import path_of

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "local", "SpanReader")

import torch
from safetensors import SafetensorError
from torch import Tensor

from specrag._fields import check_whole_numbers
from specrag._unicode import well_formed
from specrag.engine.lora import merge_lora
from specrag.engine.onednn import multiplies_bfloat16
from specrag.engine.tensor_files import load_checked
from specrag.errors import InvalidInputError, ModelNotFoundError, kind_of
from specrag.models.base import Reader, Reading, Span
from specrag.text import check_texts, question_of

#: Stands for minus infinity: sums of two stay finite, and gradients through them are 0.
IMPOSSIBLE = -1e4
# Tokens that a question may have; a longer one is cut, so that the passage keeps most of the window.
_QUESTION_TOKENS = 96
#: The file of an adapter that holds the weights which replace the base's.
ADAPTER_FILE = "reader.safetensors"
# To what batch lengths are rounded up: the CPU makes, and keeps, kernels for every new shape.
_ROUNDED_TO = 32


# --- scores on tensors ----------------------------------------------------------------------------------


def span_scores(
    start_logits: Tensor,  # [rows, tokens]
    end_logits: Tensor,  # [rows, tokens]
    starts: Tensor,  # [rows, tokens], bool: where a span may start
    ends: Tensor,  # [rows, tokens], bool: where a span may end
    longest: int,
) -> Tensor:  # [rows, tokens, longest], float32
    """The score of every span over that of no answer: (s_i + e_j) - (s_0 + e_0).

    Entry [r, i, w] belongs to the span of ``w + 1`` tokens that starts at token i. Spans that start or end where they
    may not are ``IMPOSSIBLE``, or about twice that.
    """
    start_scores = start_logits.float().masked_fill(~starts, IMPOSSIBLE)
    end_scores = end_logits.float().masked_fill(~ends, IMPOSSIBLE)
    by_width = torch.nn.functional.pad(end_scores, (0, longest - 1), value=IMPOSSIBLE).unfold(1, longest, 1)
    no_answer = start_logits[:, 0].float() + end_logits[:, 0].float()
    return start_scores[:, :, None] + by_width - no_answer[:, None, None]


def grouped_logsumexp(
    values: Tensor,  # [items]
    groups: Tensor,  # [items], from 0
    count: int,
) -> Tensor:  # [count]
    """The log-sum-exp of the items of each group; about ``IMPOSSIBLE`` for a group without items."""
    highest = torch.full((count,), IMPOSSIBLE, dtype=values.dtype, device=values.device)
    highest = highest.scatter_reduce(0, groups, values.detach(), "amax")
    sums = torch.zeros_like(highest).index_add(0, groups, (values - highest[groups]).exp())
    return highest + sums.clamp(min=torch.finfo(values.dtype).tiny).log()


def shared_log_normalizer(
    scores: Tensor,  # [rows, tokens, longest], of ``span_scores``
    questions: Tensor,  # [rows], the question of each row, from 0
    count: int,
) -> Tensor:  # [count]
    """log(1 + Σ exp(score)) over the spans of all passages of each question; the 1 is no answer."""
    by_question = grouped_logsumexp(scores.flatten(1).logsumexp(1), questions, count)
    return torch.logaddexp(by_question, torch.zeros_like(by_question))


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """A question beside a part of a passage, as token ids.

    ``offsets``: of each token, in the passage; (0, 0) outside it.
    """

    passage: int
    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    new_from: int  # the end of the window before: a span that ends by then is that window's


class SpanReader(Reader):
    """A question-answering encoder of transformers.

    Args:
        model: A folder or hub id that ``AutoModelForQuestionAnswering`` loads, or a loaded model (then ``tokenizer`` is
            needed).
        tokenizer: A fast tokenizer (character offsets are needed); by default the model's own.
        adapter: A folder with what training changed of the base (``specrag train --reader`` writes one): weights that
            replace the base's, and a LoRA in peft's format, where there is one.
        max_tokens: Question and passage together in one window. Longer passages are read in windows that overlap.
        longest: Tokens that a span may have.
        batch_size: Windows per forward pass.
        device: ``"cpu"``, ``"cuda:0"``, ...; by default a GPU when there is one.
        dtype: Of the products; by default bfloat16 where the device multiplies it, else float32.

    Raises:
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
        InvalidInputError: A slow tokenizer, or settings out of range.

    Example:
        >>> reader = SpanReader("path/or/hub-id")  # doctest: +SKIP
        >>> reading = reader.read("when did it open?", ["The tower opened in 1889."])  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path | Any,
        tokenizer: Any = None,
        *,
        adapter: str | Path | None = None,
        max_tokens: int = 384,
        longest: int = 24,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_whole_numbers(least=1, longest=longest, batch_size=batch_size, max_tokens=max_tokens)
        if max_tokens < _QUESTION_TOKENS + 2 * longest + 8:
            raise InvalidInputError(
                f"max_tokens must be at least {_QUESTION_TOKENS + 2 * longest + 8}: the question, and windows that "
                f"overlap by more than longest={longest}; got {max_tokens}"
            )
        self.name = str(model) if isinstance(model, str | Path) else str(getattr(model, "name_or_path", "reader"))
        if isinstance(model, str | Path):
            model, own = load_encoder(model)
            tokenizer = own if tokenizer is None else tokenizer
        _check_loaded(model, tokenizer)
        if adapter is not None:
            apply_adapter(model, adapter)
            self.name = Path(adapter).name
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(wanted).eval()
        self.tokenizer = tokenizer
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None:  # some architectures (RoBERTa, MPNet) keep the first two for padding
            max_tokens = min(max_tokens, int(positions) - 2)
        self.max_tokens, self.longest, self.batch_size = max_tokens, longest, batch_size
        self.dtype = dtype or (torch.bfloat16 if multiplies_bfloat16(wanted) else torch.float32)
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        return f"SpanReader({self.name!r}, dtype={self.dtype}, device={self.device})"

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device(self.model.device)

    def read(self, question: str, texts: Sequence[str], *, spans_per_passage: int = 8) -> Reading:
        """The likeliest spans of ``texts``, all normalised together.

        Args:
            question: What is asked. One of more than 96 tokens is cut.
            texts: The passages. Empty ones hold no span.
            spans_per_passage: How many spans of each are returned, at most.

        Raises:
            InvalidInputError: An empty question, texts that are no list of texts, or ``spans_per_passage`` below 1.
        """
        check_whole_numbers(least=1, spans_per_passage=spans_per_passage)
        windows = self._windows(question, texts)
        if not windows:
            return Reading((), 0.0, 0)
        found: list[tuple[float, int, int, int]] = []  # score, passage, start, end
        sums: list[Tensor] = []
        for batch, scores in self._scored(windows):
            sums.append(scores.flatten(1).logsumexp(1))
            best = scores.flatten(1).topk(min(spans_per_passage, scores[0].numel()))
            for window, values, places in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                for value, place in zip(values, places, strict=True):
                    first, wider = divmod(place, self.longest)
                    if value > IMPOSSIBLE / 2:
                        found.append(
                            (value, window.passage, window.offsets[first][0], window.offsets[first + wider][1])
                        )
        total = float(torch.logaddexp(torch.cat(sums).logsumexp(0), torch.tensor(0.0)))
        kept: dict[int, int] = {}
        spans = []
        for value, passage, start, end in sorted(found, key=lambda item: -item[0]):
            kept[passage] = kept.get(passage, 0) + 1
            if kept[passage] <= spans_per_passage:
                spans.append(Span(passage, start, end, min(0.0, value - total)))
        return Reading(tuple(spans), -total, sum(len(window.ids) for window in windows))

    def score(self, question: str, texts: Sequence[str], spans: Sequence[tuple[int, int, int]]) -> list[float | None]:
        """Log P of given spans: (number of the text, first character, one past the last).

        A span is mapped to this reader's own tokens: the fewest that cover it. ``None`` where they are more than
        ``longest``, or none.

        Raises:
            InvalidInputError: A span is empty or outside its text.
        """
        check_texts(texts)
        for number, start, end in spans:
            if not 0 <= number < len(texts) or not 0 <= start < end <= len(texts[number]):
                raise InvalidInputError(f"span {(number, start, end)} is empty, or not inside its text")
        sums: list[Tensor] = []
        scored: dict[int, float] = {}
        for batch, scores in self._scored(self._windows(question, texts)):
            sums.append(scores.flatten(1).logsumexp(1))
            for row, window in enumerate(batch):
                for i, (number, start, end) in enumerate(spans):
                    if number == window.passage and (place := _covering(window, start, end, self.longest)):
                        scored[i] = float(scores[row, place[0], place[1]])
        total = float(torch.logaddexp(torch.cat(sums).logsumexp(0), torch.tensor(0.0))) if sums else 0.0
        return [min(0.0, scored[i] - total) if i in scored else None for i in range(len(spans))]

    # --- windows ------------------------------------------------------------------------------------

    def _windows(self, question: str, texts: Sequence[str]) -> list[_Window]:
        question = question_of(question)
        check_texts(texts)
        texts = [well_formed(text, keep_length=True) for text in texts]
        asked = self.tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(asked) > _QUESTION_TOKENS:
            question = question[: asked[_QUESTION_TOKENS - 1][1]]
        shown = [(i, text) for i, text in enumerate(texts) if text.strip()]
        if not shown:
            return []
        encoded = self.tokenizer(
            [question] * len(shown),
            [text for _, text in shown],
            truncation="only_second",
            max_length=self.max_tokens,
            stride=self.longest + 8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: list[_Window] = []
        for row, sample in enumerate(encoded["overflow_to_sample_mapping"]):
            passage = shown[sample][0]
            kinds, offsets = encoded.sequence_ids(row), encoded["offset_mapping"][row]
            inside = [(a, b) if kind == 1 else (0, 0) for kind, (a, b) in zip(kinds, offsets, strict=True)]
            before = windows[-1] if windows and windows[-1].passage == passage else None
            ids = encoded["input_ids"][row]
            types = encoded["token_type_ids"][row] if "token_type_ids" in encoded else [0] * len(ids)
            new_from = max(b for _, b in before.offsets) if before is not None else 0
            windows.append(_Window(passage, ids, types, inside, new_from))
        return windows

    def _scored(self, windows: Sequence[_Window]) -> list[tuple[list[_Window], Tensor]]:
        """The windows in batches of like length, each with its [windows, tokens, longest] scores, on the CPU."""
        ordered = sorted(windows, key=lambda window: len(window.ids))
        made = []
        for at in range(0, len(ordered), self.batch_size):
            batch = ordered[at : at + self.batch_size]
            tokens = min(self.max_tokens, -(-len(batch[-1].ids) // _ROUNDED_TO) * _ROUNDED_TO)
            ids = torch.full((len(batch), tokens), self.tokenizer.pad_token_id or 0)
            types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
            starts = torch.zeros(len(batch), tokens, dtype=torch.bool)
            ends = torch.zeros_like(starts)
            for row, window in enumerate(batch):
                count = len(window.ids)
                ids[row, :count], types[row, :count] = torch.tensor(window.ids), torch.tensor(window.types)
                mask[row, :count] = 1
                starts[row, :count] = torch.tensor([b > a for a, b in window.offsets])
                ends[row, :count] = torch.tensor([b > a and b > window.new_from for a, b in window.offsets])
            inputs = {"input_ids": ids, "attention_mask": mask}
            if "token_type_ids" in self.tokenizer.model_input_names:
                inputs["token_type_ids"] = types
            logits = self._forward({name: tensor.to(self.device) for name, tensor in inputs.items()})
            made.append((batch, span_scores(logits[0].cpu(), logits[1].cpu(), starts, ends, self.longest)))
        return made

    def _forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        low = self.dtype != torch.float32
        precision: Any = torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()
        with self.lock, torch.inference_mode(), precision:
            made = self.model(**inputs)
        return made.start_logits.float(), made.end_logits.float()


def _check_loaded(model: Any, tokenizer: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise InvalidInputError(
            f"model must be a folder, a hub id or a loaded question-answering model, got {kind_of(model)}"
        )
    if tokenizer is None:
        raise InvalidInputError("a loaded model needs its tokenizer: SpanReader(model, tokenizer)")
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidInputError(
            f"{kind_of(tokenizer)} gives no character offsets: load a fast tokenizer (a tokenizer.json file)"
        )


def _covering(window: _Window, start: int, end: int, longest: int) -> tuple[int, int] | None:
    """(first token, width - 1) of the fewest tokens that cover the characters; ``None``: the window has them not."""
    inside = [i for i, (a, b) in enumerate(window.offsets) if b > a and a < end and b > start]
    if not inside or window.offsets[inside[0]][0] > start or window.offsets[inside[-1]][1] < end:
        return None
    if window.offsets[inside[-1]][1] <= window.new_from or len(inside) > longest:
        return None
    return inside[0], inside[-1] - inside[0]


def apply_adapter(model: Any, folder: str | Path) -> None:
    """Put the weights in ``folder`` into ``model``, in place: first the LoRA, then what replaces the base's weights.

    Raises:
        ModelNotFoundError: There is no adapter, or it cannot be read.
        InvalidInputError: It was made for another model, or holds numbers that are not finite.
    """
    folder = path_of(folder)
    try:
        replaced, _ = load_checked(folder / ADAPTER_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotFoundError(f"no reader's weights could be read from {folder}: {error}") from error
    own = dict(model.named_parameters())
    for name, tensor in replaced.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "nothing"
            raise InvalidInputError(
                f"the reader in {folder} was made for another base: {name} is {shape} here, {tuple(tensor.shape)} there"
            )
        if not torch.isfinite(tensor).all():
            raise InvalidInputError(f"the reader in {folder} is damaged: {name} holds numbers that are not finite")
    if (folder / "adapter_config.json").exists():
        merge_lora(model, folder)
    with torch.no_grad():
        for name, tensor in replaced.items():
            own[name].copy_(tensor)


def load_encoder(path: str | Path) -> tuple[Any, Any]:
    """A question-answering model of transformers and its tokenizer. A head that the folder lacks is random.

    Raises:
        ModelNotFoundError: Nothing is there, or it cannot be loaded.
    """
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    from specrag.models._loading import loading, quiet_transformers, source_of

    where, _ = source_of(path, "reader")
    with quiet_transformers(), loading(path, "a question-answering model"):
        return AutoModelForQuestionAnswering.from_pretrained(where), AutoTokenizer.from_pretrained(where)
