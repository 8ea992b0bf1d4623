"""What the tests of RAPID share."""

from __future__ import annotations

import tempfile
from functools import cache

import torch

from specrag.models import Sampling, TransformersLM
from specrag.rapid import LongContext, RapidGenerator
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.datastore import Datastore
from tests.fakes import HashEmbedder

PROPOSERS = ["rag", "sparse", "naive", "window", "match", "hybrid", "hybrid-sparse", "rest", "triforce"]
# A word salad with repetitions: something to retrieve, and something to copy.
DOCUMENT = " ".join(
    f"Note {i}: the {word} of room {i % 7} is kept by keeper {i % 5}."
    for i, word in enumerate(["key", "lamp", "bell"] * 7)
)
GREEDY = Sampling(seed=0)
DATASTORES = tempfile.TemporaryDirectory(prefix="specrag-datastores-")  # goes when Python ends
# Qwen2.5's chat template, shortened: tools stand in the system turn, calls in <tool_call>.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call one inside <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def generator(target, drafter=None, **settings) -> RapidGenerator:
    """Greedy and without a real embedder, unless the settings say otherwise.

    REST looks up ``DOCUMENT``, and the window is smaller than that.
    """
    if settings.get("proposer") == "rest" and "datastore" not in settings:
        settings["datastore"] = str(_datastore(getattr(target, "tokenizer", None)).folder)
    settings = {"window": 32} | settings
    return RapidGenerator(target, drafter, **({"embedder": HashEmbedder(), "sampling": GREEDY} | settings))


@cache
def _datastore(tokenizer) -> Datastore:
    return Datastore.build([DOCUMENT], tokenizer, tempfile.mkdtemp(dir=DATASTORES.name))


def plain_greedy(session: LongContext, question: str, count: int) -> list[int]:
    """What transformers' own ``generate`` writes after the same tokens."""
    return list(_generated(session.rapid.target, (*session.prompt.ids, *session.question_tokens(question)), count))


@cache
def _generated(lm: TransformersLM, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
            eos_token_id=sorted(lm.end_tokens),
        )  # fmt: skip
    return tuple(made[0, ids.shape[1] :].tolist())


def asked(session: LongContext, question: str) -> tuple[CachedModel, torch.Tensor]:
    """The session's target after it has read ``question``, and the logits there."""
    session.model.rollback_to(session.tokens)
    logits = session.model.prefill(session.question_tokens(question))
    assert logits is not None
    return session.model, logits
