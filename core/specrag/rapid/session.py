"""LongContext: a document is read once, then asked many times. RapidGenerator: the models and settings for it.

A prompt is [template up to the document][document][question and the rest of the template]. It is cut into tokens
piece by piece, so that no question can move the boundary behind which the document's cache ends. The drafter reads the
same prompt with the retrieved chunks in place of the document.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from specrag.engine.memory import out_of_memory
from specrag.errors import InvalidInputError, ModelError, ModelNotFoundError
from specrag.models.base import GenerationRequest, Turn
from specrag.models.embedders import Embedder
from specrag.models.tokenization import ConversationEncoder
from specrag.models.transformers import TransformersLM
from specrag.rapid.acceptance import Tail, Transfer
from specrag.rapid.decoding import RapidSettings, RapidStats, decode
from specrag.rapid.draft_length import Controller, Estimates
from specrag.rapid.proposers import (
    CachedModel,
    HybridProposer,
    ModelProposer,
    Progress,
    Proposer,
    SuffixMatchProposer,
    sinks_and_window,
)

SESSION_VERSION = 1
CHUNK_TOKENS = 512
COSINE_THRESHOLD = 0.3
# Room behind the document for a question and its answer, before the cache has to grow.
_SPARE_TOKENS = 1024
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# An embedder reads less than a chunk at once: a chunk is as near as its nearest piece.
_PIECE_TOKENS = 176

ProposerName = Literal["rag", "sparse", "naive", "window", "match", "hybrid", "hybrid-sparse"]


@dataclass(frozen=True)
class RapidOutput:
    """A finished generation."""

    text: str
    stats: RapidStats


class RapidGenerator:
    """Retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330).

    Args:
        target: A ``TransformersLM``, or (model, tokenizer): reads the long context.
        drafter: The same: reads the retrieved context. ``None``: the target itself (self-speculation; the weights are
            shared). It may be smaller, or larger and on another device; its tokenizer must be the target's.
        candidates: γ: a number, a schedule, or ``"auto"`` (see ``Controller``). With ``"rapid"`` γ changes what is
            sampled: for runs that repeat, fix it or give ``stats.schedule`` back.
        transfer_strength: η, or ``"auto"``: 10 scaled by how well the retrieved chunks match the query, from 0 at the
            cosine threshold to 10 at a cosine of 0.7.
        transfer, tail: See ``specrag.rapid.acceptance``.
        temperature, top_k, top_p: Of target and drafter alike.
        seed: Of every draw. ``None``: a new one each time.
        proposer: ``"rag"`` (RAPID: the drafter reads the retrieved chunks), ``"sparse"`` (self-speculation on the target's
            own keys and values of the retrieved chunks: nothing is read again; TriForce, arXiv 2404.11912),
            ``"window"`` (attention sinks and the last tokens: MagicDec; of the target's keys without a drafter),
            ``"naive"`` (the drafter on the whole context), ``"match"`` (suffix match in document, question and
            answer, no model), ``"hybrid"`` and ``"hybrid-sparse"`` (a match of at least three tokens, else rag or sparse).
        embedder: For retrieval; by default the bundled MiniLM.
        retrieval_budget: Tokens of retrieved context; by default max(512, |C|/16) below 32k tokens or on the CPU, else
            max(|C|/24, min(4096, |C|)).

    Raises:
        InvalidInputError: Settings out of range, or models that do not share a tokenizer.
    """

    def __init__(
        self,
        target: TransformersLM | tuple[Any, Any],
        drafter: TransformersLM | tuple[Any, Any] | None = None,
        *,
        candidates: int | Sequence[int] | Literal["auto"] = "auto",
        transfer_strength: float | Literal["auto"] = 10.0,
        transfer: Transfer = "rapid",
        tail: Tail = "drafter",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        proposer: ProposerName = "rag",
        embedder: Embedder | None = None,
        retrieval_budget: int | None = None,
    ) -> None:
        self.target = target if isinstance(target, TransformersLM) else TransformersLM(*target)
        if drafter is None:
            self.drafter = self.target
        else:
            self.drafter = drafter if isinstance(drafter, TransformersLM) else TransformersLM(*drafter)
        self.vocabulary = shared_vocabulary(self.target, self.drafter)
        self.adaptive_strength = transfer_strength == "auto"
        strength = 10.0 if isinstance(transfer_strength, str) else transfer_strength
        if isinstance(transfer_strength, str) and transfer_strength != "auto":
            raise InvalidInputError(f"transfer_strength must be a number or 'auto', got {transfer_strength!r}")
        self.settings = RapidSettings(transfer, strength, tail, temperature, top_k, top_p)
        Controller(candidates)  # validates
        self.candidates = candidates
        self.seed = seed
        if proposer not in get_args(ProposerName):
            raise InvalidInputError(f"proposer must be one of {', '.join(get_args(ProposerName))}, got {proposer!r}")
        self.proposer: ProposerName = proposer
        if proposer.endswith("sparse") and not same_shape(self.target, self.drafter):
            raise InvalidInputError(
                f"proposer={proposer!r} drafts on the target's own keys and values: leave drafter out, or give a quantized copy of the target"
            )
        if retrieval_budget is not None and retrieval_budget < 1:
            raise InvalidInputError(f"retrieval_budget must be at least 1 token, got {retrieval_budget}")
        self.retrieval_budget = retrieval_budget
        self._embedder = embedder
        self.estimates = Estimates()  # of the latest generation: what sessions on other contexts begin with

    @property
    def embedder(self) -> Embedder:
        """What retrieval embeds with; loaded when first needed."""
        if self._embedder is None:
            from specrag.models.bundled import bundled

            self._embedder = bundled("minilm")
        return self._embedder

    def budget(self, context_tokens: int) -> int:
        """Tokens of retrieved context for a document of ``context_tokens``."""
        if self.retrieval_budget is not None:
            return self.retrieval_budget
        if context_tokens < 32_768 or self.target.device.type == "cpu":
            return max(512, context_tokens // 16)
        return max(context_tokens // 24, min(4096, context_tokens))

    def generate(self, messages: Sequence[Mapping[str, str]], **options: Any) -> RapidOutput:
        """Answer a conversation: the last user turn is the query, what stands before it is the context.

        Args:
            messages: ``{"role", "content"}`` mappings, the last of role ``"user"``.
            options: As in ``LongContext.ask``.

        Raises:
            InvalidInputError: No last user turn, or nothing before it.
        """
        if not messages or messages[-1].get("role") != "user":
            raise InvalidInputError("the last message must be the user's: it is the query")
        if len(messages) < 2:
            raise InvalidInputError("there is no context before the query: give earlier messages, or use LongContext")
        turns = [Turn.of(message["role"], message["content"]) for message in messages]  # type: ignore[arg-type]
        session = LongContext.unread(self, *conversation_frame(self.target.encoder, turns))
        session.read()
        return session.ask(messages[-1]["content"], **options)


class LongContext:
    """A document that the target has read, its chunks, and its cache.

    Args:
        text: The document.
        rapid: Models and settings.
        progress: Called with tokens read and tokens in all, during prefill.

    Raises:
        InvalidInputError: The text is empty, or exceeds the target's positions.
        ModelError: Out of memory; nothing is kept.
    """

    def __init__(self, text: str, rapid: RapidGenerator, *, progress: Progress | None = None) -> None:
        if not text.strip():
            raise InvalidInputError("the context is empty")
        self._setup(rapid, *document_frame(rapid.target.encoder, text))
        self.read(progress)

    @classmethod
    def unread(cls, rapid: RapidGenerator, head: str, context: str, tail: str) -> LongContext:
        """A session over a prompt of the caller's own making, before ``read``.

        Args:
            head, context: Rendered text before the context, and the context.
            tail: What follows, with ``QUERY`` where the question stands.
        """
        self = cls.__new__(cls)
        self._setup(rapid, head, context, tail)
        return self

    def _setup(self, rapid: RapidGenerator, head: str, context: str, tail: str) -> None:
        encoder = rapid.target.encoder
        self.rapid = rapid
        self._head = encoder.encode_rendered(head) if head or encoder.template is None else []
        self._context = encoder.encode_text(context)
        self.tail = tail  # with QUERY where the question stands; may change, what the cache holds ends before it
        if not self._context:
            raise InvalidInputError("the context is empty")
        self._prompt_tokens = len(self._head) + len(self._context)
        window = rapid.target.context_window
        if window is not None and self._prompt_tokens >= window:
            raise InvalidInputError(
                f"the context has {self._prompt_tokens} tokens, {rapid.target.name} {window} positions: shorten it, "
                "or configure RoPE scaling in the model's config"
            )
        self._pieces: np.ndarray | None = None
        self._target: CachedModel | None = None
        self._fed: list[int] = []  # the tokens that the cache begins with
        self._read_seconds_a_token = 0.0
        self._estimates = rapid.estimates.for_another_context()

    def shared_with(self, other: LongContext) -> int:
        """Tokens that both prompts begin with, as far as ``other`` has read them."""
        mine = [*self._head, *self._context]
        count = 0
        for a, b in zip(mine, other._fed, strict=False):
            if a != b:
                break
            count += 1
        return count

    def read(self, progress: Progress | None = None, *, reuse: LongContext | None = None) -> None:
        """Prefill the context.

        Args:
            reuse: A session of the same generator that is given up: what both prompts begin with is not read again.
        """
        prompt = [*self._head, *self._context]
        start = time.perf_counter()
        if reuse is not None and reuse._target is not None:
            target, shared = reuse._target, self.shared_with(reuse)
            reuse._target = None
            if reuse._context == self._context:
                self._pieces = reuse._pieces
        else:
            target = CachedModel(self.rapid.target, self._prompt_tokens + _SPARE_TOKENS, self.rapid.vocabulary)
            shared = 0
        target.rollback_to(shared)
        try:
            target.prefill(prompt[shared:], progress)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, ModelError) or not out_of_memory(error):
                raise
            raise ModelError(
                f"out of memory while reading {self._prompt_tokens} tokens: give a shorter text"
            ) from error
        self.prefill_seconds = time.perf_counter() - start
        self._read_seconds_a_token = self.prefill_seconds / max(len(prompt) - shared, 1)
        self._target, self._fed = target, prompt

    @property
    def tokens(self) -> int:
        """Tokens of the prompt up to the end of the document."""
        return self._prompt_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the target's cache."""
        return self._target.cache.nbytes if self._target is not None else 0

    def ask(self, question: str, **options: Any) -> RapidOutput:
        """The answer to ``question``. Takes the options of ``stream``."""
        stats = RapidStats()
        text = "".join(self.stream(question, stats=stats, **options))
        return RapidOutput(text, stats)

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        seed: int | None = None,
        temperature: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        stats: RapidStats | None = None,
    ) -> Iterator[str]:
        """The answer piece by piece. The first token comes from the target, before the drafter reads anything.

        Args:
            max_new_tokens: Exact unless the answer ends before.
            stop: Strings that end the answer; not part of it.
            seed, temperature: In place of the generator's.
            cancelled: Asked between rounds.
            stats: Filled in as the answer is made.

        Raises:
            InvalidInputError: The question is empty, or does not fit into the positions left or the budget.
        """
        rapid, target = self.rapid, self._target
        assert target is not None
        encoder = rapid.target.encoder
        if not question.strip():
            raise InvalidInputError("the question is empty")
        stats = stats if stats is not None else RapidStats()
        tail = encoder.encode_text(self.tail.replace(QUERY, encoder.sanitize(question).strip()))
        budget = rapid.budget(len(self._context))
        if len(tail) > budget and rapid.proposer in ("rag", "hybrid"):
            raise InvalidInputError(f"the question has {len(tail)} tokens, the retrieval budget is {budget}: raise it")
        window = rapid.target.context_window
        if window is not None and self._prompt_tokens + len(tail) + max_new_tokens > window:
            raise InvalidInputError(
                f"context, question and answer need {self._prompt_tokens + len(tail) + max_new_tokens} positions, "
                f"{rapid.target.name} has {window}"
            )
        start = time.perf_counter()
        target.rollback_to(self._prompt_tokens)
        self._fed = self._fed[: self._prompt_tokens]
        logits = target.prefill(tail)
        assert logits is not None
        stats.prefill_seconds = stats.first_token_seconds = time.perf_counter() - start
        if not self._read_seconds_a_token:  # a loaded session has read nothing itself
            self._read_seconds_a_token = stats.prefill_seconds / len(tail)
        stats.prompt_tokens = self._prompt_tokens + len(tail)
        self._fed = [*self._head, *self._context, *tail]
        proposer, strength = self._proposer(question, tail, stats)
        rapid.estimates = self._estimates
        yield from decode(
            target,
            logits,
            proposer,
            replace(
                rapid.settings,
                strength=strength,
                temperature=rapid.settings.temperature if temperature is None else temperature,
            ),
            Controller(rapid.candidates, self._estimates),
            max_new_tokens=max_new_tokens,
            stop=stop,
            end_tokens=rapid.target.end_tokens,
            seed=rapid.seed if seed is None else seed,
            cancelled=cancelled,
            stats=stats,
            startup_seconds=self._startup_seconds(),
        )

    def _startup_seconds(self) -> float:
        """What a token of its own prompt costs the drafter, guessed from what the context cost the target."""
        sizes = []
        for lm in (self.rapid.drafter, self.rapid.target):
            text = lm.model.config.get_text_config()
            sizes.append(text.num_hidden_layers * text.hidden_size * (text.hidden_size + text.intermediate_size))
        return self._read_seconds_a_token * sizes[0] / sizes[1]

    def _proposer(self, question: str, tail: Sequence[int], stats: RapidStats) -> tuple[Proposer | None, float]:
        rapid = self.rapid
        strength = rapid.settings.strength
        if rapid.candidates == 0:
            return None, strength
        if rapid.proposer == "match":
            return SuffixMatchProposer(self._fed, rapid.vocabulary), strength
        if rapid.proposer == "naive":
            shown: Sequence[int] = range(len(self._context))
        elif rapid.proposer == "window":
            shown = sinks_and_window(len(self._context))
        else:
            shown, confidence = self._retrieved(question, stats)
            if rapid.candidates == "auto" and rapid.drafter is rapid.target and len(shown) > 0.75 * len(self._context):
                stats.notes.append("the retrieved context is most of the context: the target decodes alone")
                if rapid.proposer.startswith("hybrid"):
                    return SuffixMatchProposer(self._fed, rapid.vocabulary), strength
                return None, strength
            if rapid.adaptive_strength:
                strength *= confidence
        prompt = [*self._head, *(self._context[i] for i in shown), *tail]
        drafter = CachedModel(rapid.drafter, len(prompt) + _SPARE_TOKENS // 4, rapid.vocabulary)
        if rapid.proposer.endswith("sparse") or (rapid.proposer == "window" and rapid.drafter is rapid.target):
            assert self._target is not None
            end = self._target.length - 1  # the last token is fed with the first proposal
            before = len(self._head)
            kept = [*range(before), *(before + i for i in shown), *range(self._prompt_tokens, end)]
            drafter.keep(self._target, kept, end)
        model = ModelProposer(drafter, prompt)
        if rapid.proposer.startswith("hybrid"):
            # A model knows more of what follows than a match of two tokens does.
            return HybridProposer(SuffixMatchProposer(self._fed, rapid.vocabulary, least=3), model), strength
        return model, strength

    # --- retrieval ------------------------------------------------------------------------------------

    def retrieve(self, question: str, stats: RapidStats | None = None) -> tuple[list[int], float]:
        """The retrieved context's tokens in document order, and the confidence of the retrieval in [0, 1].

        Chunks of 512 tokens with a cosine above 0.3, best first, within the budget; the last one is cut to fill it.
        When none is near enough: the beginning and the end of the document, half the budget each.
        """
        shown, confidence = self._retrieved(question, stats)
        return [self._context[i] for i in shown], confidence

    def _retrieved(self, question: str, stats: RapidStats | None) -> tuple[list[int], float]:
        """The positions in the context, ascending, and the confidence."""
        length, budget = len(self._context), self.rapid.budget(len(self._context))
        similar = self._similarities(question, -(-length // CHUNK_TOKENS))
        order = [int(i) for i in np.argsort(-similar) if similar[i] > COSINE_THRESHOLD]
        if not order:
            if stats is not None:
                stats.notes.append("nothing retrieved: the drafter reads the beginning and the end of the context")
            if length <= budget:
                return list(range(length)), 0.0
            half = budget // 2
            return [*range(budget - half), *range(length - half, length)], 0.0
        taken: list[int] = []
        for i in order:
            chunk = range(i * CHUNK_TOKENS, min((i + 1) * CHUNK_TOKENS, length))
            taken += chunk[: budget - len(taken)]
        confidence = float(np.clip((similar[order[0]] - COSINE_THRESHOLD) / (0.7 - COSINE_THRESHOLD), 0, 1))
        return sorted(taken), confidence

    def _similarities(self, question: str, chunks: int) -> np.ndarray:  # [chunks]
        per_chunk = -(-CHUNK_TOKENS // _PIECE_TOKENS)
        if self._pieces is None:
            decode_text = self.rapid.target.tokenizer.decode
            texts = []
            for at in range(0, len(self._context), CHUNK_TOKENS):
                chunk = self._context[at : at + CHUNK_TOKENS]
                pieces = [chunk[i : i + _PIECE_TOKENS] for i in range(0, CHUNK_TOKENS, _PIECE_TOKENS)]
                texts += [str(decode_text(piece)) if piece else "" for piece in pieces]
            self._pieces = self.rapid.embedder.embed(texts)
            for i, text in enumerate(texts):
                if not text.strip():
                    self._pieces[i] = 0
        asked = self.rapid.embedder.embed([question])[0]
        return (self._pieces @ asked).reshape(chunks, per_chunk).max(axis=1)

    # --- on disk --------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to a safetensors file, which appears whole or not at all."""
        from safetensors.torch import save_file

        assert self._target is not None
        self._target.rollback_to(self._prompt_tokens)
        tensors = {
            "head": torch.tensor(self._head, dtype=torch.long),
            "context": torch.tensor(self._context, dtype=torch.long),
        }
        for i, layer in enumerate(self._target.cache.layers):
            tensors[f"keys.{i}"] = layer.key_buffer[:, :, : layer.length].contiguous().cpu()
            tensors[f"values.{i}"] = layer.value_buffer[:, :, : layer.length].contiguous().cpu()
        if self._pieces is not None:
            tensors["pieces"] = torch.from_numpy(self._pieces)
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        facts = {"version": str(SESSION_VERSION), "model": fingerprint(self.rapid.target), "tail": self.tail}
        save_file(tensors, part, metadata={**facts, "name": self.rapid.target.name})
        part.replace(target)

    @classmethod
    def load(cls, path: str | Path, rapid: RapidGenerator) -> LongContext:
        """A session that ``save`` wrote; it continues with the same logits.

        Raises:
            ModelNotFoundError: There is no such file.
            InvalidInputError: The file is damaged, of another version, or of another target model.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path).expanduser()
        if not file.exists():
            raise ModelNotFoundError(f"no saved session at {file}")
        try:
            with safe_open(file, "pt", device=str(rapid.target.device)) as data:
                facts = data.metadata() or {}
                if facts.get("version") != str(SESSION_VERSION):
                    raise InvalidInputError(
                        f"{file} is a session of version {facts.get('version')}, this is {SESSION_VERSION}: read the text again"
                    )
                if facts.get("model") != fingerprint(rapid.target):
                    raise InvalidInputError(
                        f"{file} was made with {facts.get('name')}, not with these weights of {rapid.target.name}: "
                        "load the same model or read the text again"
                    )
                self = cls.__new__(cls)
                self.rapid, self.tail = rapid, facts["tail"]
                self._read_seconds_a_token, self._estimates = 0.0, rapid.estimates.for_another_context()
                self._head, self._context = data.get_tensor("head").tolist(), data.get_tensor("context").tolist()
                self._prompt_tokens = len(self._head) + len(self._context)
                names = set(data.keys())
                self._pieces = data.get_tensor("pieces").cpu().numpy() if "pieces" in names else None
                cached = CachedModel(rapid.target, self._prompt_tokens + _SPARE_TOKENS, rapid.vocabulary)
                for i, layer in enumerate(cached.cache.layers):
                    layer.update(data.get_tensor(f"keys.{i}"), data.get_tensor(f"values.{i}"))
        except (SafetensorError, KeyError, OSError) as error:
            raise InvalidInputError(f"{file} is not a saved session, or damaged: {error}") from error
        self._target, self.prefill_seconds = cached, 0.0
        self._fed = [*self._head, *self._context]
        return self


# --- prompts --------------------------------------------------------------------------------------------

# Stands for the question in a rendered prompt; private use, so that no text holds it.
QUERY = "\ue0f2"


def document_frame(encoder: ConversationEncoder, text: str) -> tuple[str, str, str]:
    """(what stands before the document, the document, what follows with QUERY for the question)."""
    mark = "\ue0f3"
    request = GenerationRequest((Turn.of("user", f"{mark}\n\n{QUERY}"),))
    head, _, tail = encoder.render_generation(request).partition(mark)
    return head, encoder.sanitize(text).replace(QUERY, "").replace(mark, "").strip(), tail


def conversation_frame(encoder: ConversationEncoder, turns: Sequence[Turn]) -> tuple[str, str, str]:
    """The same for a conversation whose last turn is the question: everything before it is the document."""
    request = GenerationRequest((*turns[:-1], Turn.of("user", QUERY)))
    before, _, after = encoder.render_generation(request).partition(QUERY)
    return "", before, QUERY + after


def shared_vocabulary(target: TransformersLM, drafter: TransformersLM) -> int:
    """Entries of the vocabulary that both models' logits have; their padding beyond is cut off.

    Raises:
        InvalidInputError: The models do not share a tokenizer.
    """
    sizes = [lm.model.config.get_text_config().vocab_size for lm in (target, drafter)]
    if target is drafter:
        return int(sizes[0])
    vocabularies = [lm.tokenizer.get_vocab() for lm in (target, drafter)]
    if (
        vocabularies[0] != vocabularies[1]
        or target.tokenizer.all_special_tokens != drafter.tokenizer.all_special_tokens
    ):
        raise InvalidInputError(
            f"drafter vocabulary has {len(vocabularies[1]):,} entries, target {len(vocabularies[0]):,}, or they differ: "
            "RAPID needs one tokenizer for both; use Speculative RAG to pair different families"
        )
    return int(min(*sizes))


def same_shape(target: TransformersLM, drafter: TransformersLM) -> bool:
    """Whether the drafter can continue the target's keys and values, as the target itself or a copy of it can."""
    if target is drafter:
        return True
    a, b = (lm.model.config.get_text_config().to_dict() for lm in (target, drafter))
    return all(a.get(key) == b.get(key) for key in (*_SHAPE, "intermediate_size", "head_dim", "rope_parameters"))


def fingerprint(lm: TransformersLM) -> str:
    """A digest of a model's architecture and of samples of all its weights."""
    config = lm.model.config.get_text_config()
    digest = hashlib.sha256(json.dumps([str(getattr(config, key, None)) for key in _SHAPE]).encode())
    digest.update(f"{lm.dtype} {lm.quantization}".encode())
    for name, tensor in sorted(lm.model.state_dict().items()):
        flat = tensor.reshape(-1)
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 16)][:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()
