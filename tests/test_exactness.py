"""``exact=True``: greedy text is that of plain decoding, where a pass over several tokens rounds otherwise."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.engine.onednn import multiplies_bfloat16
from specrag.engine.trees import chain
from specrag.errors import InvalidInputError
from specrag.models import Sampling, TransformersLM
from specrag.rapid import LongContext, RapidStats
from specrag.rapid.acceptance import KnowledgeTransfer
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.decoding import decode
from specrag.rapid.draft_length import FixedLength
from specrag.rapid.output import Limits
from specrag.rapid.proposers import ModelProposer
from tests.conftest import tiny_llama
from tests.rapid_parts import DOCUMENT, generator
from tests.test_cache_and_attention import model_of
from tests.test_datastore import words
from tests.test_token_trees import shapes

VOCABULARY = 97
FORMATS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization": "int8"},
}


@cache
def lm_of(name: str) -> TransformersLM:
    """A model whose heads are too small for the native engine: torch runs it."""
    if name == "bfloat16" and not multiplies_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bfloat16")
    lm = TransformersLM(tiny_llama(VOCABULARY, initializer_range=0.3), words(VOCABULARY), **FORMATS[name])
    assert lm.native is None
    return lm


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=6, deadline=None)
@given(shape=shapes(), before=st.integers(1, 60), seed=st.integers(0, 999))
def test_a_tree_can_be_fed_with_the_bits_of_single_steps(name, shape, before, seed):
    lm, prompt, tokens = lm_of(name), random_tokens(before, seed), random_tokens(len(shape.parents), seed + 1)
    together, alone = (CachedModel(lm, 100, VOCABULARY) for _ in range(2))
    assert together.repeats_single_steps
    for model in (together, alone):
        model.prefill(prompt)
    made = together.feed_tree(tokens, shape, exact=True)
    for row in range(len(tokens)):
        path = shape.path(row)
        alone.rollback_to(before)
        expected = torch.cat([alone.feed([tokens[i]]) for i in path])
        assert torch.equal(made[path], expected)
    together.keep_path(before, path)
    assert torch.equal(together.feed([5]), alone.feed([5]))  # keys and values have the same bits too


def written(lm: TransformersLM, prompt: list[int], width: int, *, exact: bool) -> tuple[str, RapidStats]:
    """What the loop writes after ``prompt``; with a width of 0, one token after the other."""
    target, stats = CachedModel(lm, 100, VOCABULARY), RapidStats()
    logits = target.prefill(prompt)
    proposer = None
    if width:  # the target itself, on the keys of the second half of the prompt
        drafter = CachedModel(lm, 100, VOCABULARY)
        drafter.keep(target, range(len(prompt) // 2, len(prompt) - 1), len(prompt) - 1)
        proposer = ModelProposer(drafter, prompt[len(prompt) // 2 :], width)
    transfer, limits = KnowledgeTransfer("none"), Limits(12)
    pieces = decode(target, logits, proposer, transfer, Sampling(), FixedLength(4), limits, stats=stats, exact=exact)
    return "".join(pieces), stats


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_twenty_prompts_get_the_text_of_plain_decoding(name):
    lm, accepted, differ = lm_of(name), 0, 0
    for seed in range(20):
        prompt, width = random_tokens(30, seed), 1 + 2 * (seed % 2)
        plain, _ = written(lm, prompt, 0, exact=False)
        text, stats = written(lm, prompt, width, exact=True)
        assert text == plain, (seed, width)
        accepted += stats.accepted
        differ += name == "bfloat16" and written(lm, prompt, width, exact=False)[0] != plain
    assert accepted > 40
    assert name != "bfloat16" or differ > 0  # without it some texts are others: there was something to do


@pytest.mark.parametrize("proposer", ["match", "sparse", "rest"])
def test_a_session_is_asked_with_exactness(tiny, proposer):
    lm = TransformersLM(tiny.model, tiny.tokenizer)
    texts = [
        LongContext(DOCUMENT, generator(lm, transfer="none", proposer=proposer, **settings))
        .ask("who keeps the bell?", max_tokens=8).text
        for settings in ({"candidates": 0}, {"candidates": 4, "exact": True})
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_target_that_cannot_repeat_single_steps_decodes_alone_and_says_so():
    sliding = TransformersLM(copy.deepcopy(model_of("mistral-sliding")), words(VOCABULARY))
    rapid = generator(sliding, transfer="none", proposer="naive", candidates=4, exact=True)
    session = LongContext("t1 t2 t3 t4 t1 t2 t3 t4", rapid)
    out = session.ask("t1 t2", max_tokens=6)
    assert out.stats.candidates == 0 and any("it decodes alone" in note for note in out.stats.notes)
    sampled = session.ask("t1 t2", max_tokens=6, sampling=Sampling(temperature=1.0, seed=0))
    assert sampled.stats.candidates > 0 and not sampled.stats.notes  # exactness is of greedy text
    with pytest.raises(InvalidInputError, match="does not repeat single steps"):
        session.model.feed_tree([1, 2], chain(2), exact=True)


def test_exactness_with_transfer_or_without_room_is_refused(tiny):
    with pytest.raises(InvalidInputError, match="exact=True needs transfer='none', got 'rapid'"):
        generator(tiny, exact=True)
    with pytest.raises(InvalidInputError, match="a tree of 64 x 1 candidates is wider than"):
        generator(tiny, transfer="none", exact=True, candidates=64)
    for value in ("yes", None, 1):
        with pytest.raises(InvalidInputError, match="exact must be True or False, got"):
            generator(tiny, transfer="none", exact=value)
