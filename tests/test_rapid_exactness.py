"""What the decoding loop samples: the target's own text without transfer, and the closed form with it."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from specrag.models import Sampling, TransformersLM
from specrag.rapid import LongContext, RapidGenerator, RapidStats
from specrag.rapid.acceptance import KnowledgeTransfer, augmented_target, output_distribution
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.decoding import decode
from specrag.rapid.draft_length import MODEL, Estimates, Experience, FixedLength, Line
from specrag.rapid.drawing import Drawing
from specrag.rapid.output import Limits
from specrag.rapid.proposers import ModelProposer, SuffixMatchProposer
from tests.conftest import tiny_llama
from tests.rapid_parts import DOCUMENT, PROPOSERS, asked, generator, plain_greedy
from tests.test_acceptance import p_value


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("candidates", [1, 5, "auto"])
def test_without_transfer_greedy_output_is_the_targets_own(tiny, other, twin, proposer, candidates):
    for drafter in (None, twin if proposer.endswith("sparse") else other):
        rapid = generator(tiny, drafter, transfer="none", proposer=proposer, candidates=candidates)
        session = LongContext(DOCUMENT, rapid)
        out = session.ask("who keeps the bell?", max_tokens=16)
        expected = plain_greedy(session, "who keeps the bell?", 16)
        assert out.text == tiny.tokenizer.decode(expected, skip_special_tokens=True)
        assert out.stats.tokens == len(expected)


@pytest.mark.parametrize("proposer", [name for name in PROPOSERS if name not in ("match", "rest", "triforce")])
@pytest.mark.parametrize(("candidates", "width"), [(4, 3), ("auto", 3), ("auto", "auto")])
def test_trees_of_a_drafter_leave_greedy_output_the_targets_own(tiny, other, twin, proposer, candidates, width):
    for drafter in (None, twin if proposer.endswith("sparse") else other):
        settings = {"proposer": proposer, "candidates": candidates, "tree_width": width}
        session = LongContext(DOCUMENT, generator(tiny, drafter, transfer="none", **settings))
        out = session.ask("who keeps the bell?", max_tokens=16)
        expected = plain_greedy(session, "who keeps the bell?", 16)
        assert out.text == tiny.tokenizer.decode(expected, skip_special_tokens=True)
    assert candidates == "auto" or out.stats.tree_tokens > out.stats.candidates


@pytest.mark.parametrize("proposer", ["sparse", "hybrid"])
def test_widths_that_are_chosen_leave_greedy_output_the_targets_own(tiny, other, proposer):
    """What was measured before says that siblings are taken often and cost nothing."""
    drafter = None if proposer == "sparse" else other
    settings = {"transfer": "none", "tree_width": "auto", "retrieval_budget": 100}
    session = LongContext(DOCUMENT, generator(tiny, drafter, proposer=proposer, **settings))
    drafted = Experience(0.3, judged=90, sibling=0.9, siblings=90, draft=Line().with_round(2, 0.001), rounds=9)
    session.estimates = Estimates({MODEL: drafted}, plain=9.0, verify=Line().with_round(4, 9.0), startup=0.0)
    session.estimates.plain_rounds = 9
    out = session.ask("who keeps the bell?", max_tokens=24)
    expected = plain_greedy(session, "who keeps the bell?", 24)
    assert out.text == tiny.tokenizer.decode(expected, skip_special_tokens=True)
    assert out.stats.tree_tokens > out.stats.candidates > 0
    assert session.estimates.of(MODEL).siblings > 90  # and what siblings did is learned


@pytest.mark.slow
def test_without_transfer_greedy_output_is_the_targets_own_on_real_weights(smollm2, questions, minilm):
    text = "\n\n".join(p.text for p in questions[0].passages[:3])
    settings = {"transfer": "none", "sampling": Sampling(), "candidates": 4, "retrieval_budget": 300}
    rapid = RapidGenerator(smollm2, settings=settings, embedder=minilm)
    session = LongContext(text, rapid)
    out = session.ask(questions[0].question, max_tokens=16)
    expected = plain_greedy(session, questions[0].question, 16)
    assert out.text == smollm2.tokenizer.decode(expected, skip_special_tokens=True)
    assert out.stats.accepted > 0


def test_suffix_match_is_greedy_exact_at_any_strength(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(session, "keeper?", 24)
    # A datastore that is right in part: some candidates are accepted, some are not.
    store = [token if i % 4 else 7 for i, token in enumerate(plain, start=1)]
    for strength in (0.0, 10.0, 1000.0):
        target, logits = asked(session, "keeper?")
        proposer = SuffixMatchProposer(store, target.vocabulary, least=1)
        transfer, stats = KnowledgeTransfer("rapid", strength), RapidStats()
        pieces = decode(target, logits, proposer, transfer, Sampling(), FixedLength(6), Limits(24), stats=stats)
        assert "".join(pieces) == tiny.tokenizer.decode(plain)
        assert 0 < stats.accepted < stats.candidates


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "rapid", "augmented"])
def test_the_loop_samples_the_second_token_from_the_closed_form(mode):
    """A model of 11 tokens: the law of the token after the first, over many seeds, given that first token.

    Of 2500 seeds those are run that draw the commonest first token.
    """
    torch.manual_seed(0)
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(11)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "initializer_range": 0.6}
    target = TransformersLM(tiny_llama(11, seed=1, **shape), tokenizer)
    drafter = TransformersLM(tiny_llama(11, seed=2, **shape), tokenizer)
    prompt, short = [1, 2, 3, 4, 5], [4, 5]
    transfer = KnowledgeTransfer(mode, strength=3.0)
    main, small = CachedModel(target, 32, 11), CachedModel(drafter, 32, 11)
    logits = main.prefill(prompt)
    small.prefill(short[:-1])
    drawings = {seed: Drawing(Sampling(temperature=1.0, seed=seed)) for seed in range(2500)}
    firsts = {seed: int(drawing.draw(drawing.distribution(logits))) for seed, drawing in drawings.items()}
    first = max(set(firsts.values()), key=list(firsts.values()).count)
    seconds = torch.zeros(11)
    for seed in (seed for seed in firsts if firsts[seed] == first):
        main.rollback_to(len(prompt))
        small.rollback_to(len(short) - 1)
        sampling = Sampling(temperature=1.0, seed=seed)
        proposer, stats = ModelProposer(small, short), RapidStats()
        pieces = decode(
            main, logits, proposer, transfer, sampling, FixedLength(1), Limits(max_tokens=3),
            stats=stats, cancelled=lambda stats=stats: bool(stats.schedule),
        )  # fmt: skip
        drawn, second = (int(t[1:]) for t in "".join(pieces).split()[:2])
        assert drawn == first
        seconds[second] += 1
    with torch.inference_mode():
        z = target.model(torch.tensor([[*prompt, first]])).logits[0, -1]
        q = drafter.model(torch.tensor([[*short, first]])).logits[0, -1].softmax(-1)
    out = output_distribution(z.softmax(-1), q, augmented_target(z, q, 3.0), mode)
    assert seconds.sum() > 300
    assert p_value(seconds, out) > 0.001
