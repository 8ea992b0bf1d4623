"""How two models compare: which fit together, what they cost, and which saved session fits which model."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from specrag.errors import InvalidInputError
from specrag.models.transformers import TransformersLM

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def shared_vocabulary(target: TransformersLM, drafter: TransformersLM) -> int:
    """Entries of the vocabulary that both models' logits have. Their padding beyond is cut off.

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
            f"drafter vocabulary has {len(vocabularies[1]):,} entries, target {len(vocabularies[0]):,}, "
            "or they differ: RAPID needs one tokenizer for both; use Speculative RAG to pair different families"
        )
    return int(min(*sizes))


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of what RAPID compares tokenizers by: the tokens with their ids, and the special ones."""
    facts = [sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), tokenizer.all_special_tokens]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def same_shape(target: TransformersLM, drafter: TransformersLM) -> bool:
    """Whether the drafter can continue the target's keys and values: it is the target, or a copy of it."""
    if target is drafter:
        return True
    a, b = (lm.model.config.get_text_config().to_dict() for lm in (target, drafter))
    return all(a.get(key) == b.get(key) for key in (*_SHAPE, "intermediate_size", "head_dim", "rope_parameters"))


def relative_cost(drafter: TransformersLM, target: TransformersLM) -> float:
    """An estimate, from the sizes of both models, of the drafter's cost per token as a share of the target's."""
    sizes = []
    for lm in (drafter, target):
        text = lm.model.config.get_text_config()
        sizes.append(text.num_hidden_layers * text.hidden_size * (text.hidden_size + text.intermediate_size))
    return float(sizes[0] / sizes[1])


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
