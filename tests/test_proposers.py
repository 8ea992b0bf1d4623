"""Where candidates come from: matches, windows, models, and models on the target's own keys."""

import pytest
import torch

from specrag.errors import InvalidInputError
from specrag.models import Sampling
from specrag.rapid import LongContext
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.drawing import Drawing
from specrag.rapid.proposers import HybridProposer, ModelProposer, SuffixMatchProposer, sinks_and_window
from specrag.rapid.triforce import TriForceProposer
from tests.rapid_parts import DOCUMENT, generator

# --- matches --------------------------------------------------------------------------------------------


def test_suffix_match_finds_the_longest_and_then_the_latest():
    def match(generated):
        return SuffixMatchProposer([1, 2, 3, 9, 1, 2, 4, 8, 2, 5], 10, least=1).match(generated)

    assert match([1, 2]) == (6, 2)  # "1 2" stands twice: the later one
    assert match([7, 2]) == (9, 1)  # only "2"
    assert match([6]) == (0, 0)
    assert match([6, 7, 6]) == (11, 1)  # what was generated counts too
    store = SuffixMatchProposer([1, 2, 3, 9, 1, 2, 4, 8, 2, 5], 10, least=1)
    assert store.source([6]) is None and store.propose([6], 3, Drawing()) is None
    proposal = store.propose([6, 3, 9, 1, 2], 3, Drawing())
    assert proposal.tokens.tolist() == [4, 8, 2] and proposal.from_model == (False,) * 3
    assert proposal.probabilities.argmax(-1).tolist() == [4, 8, 2]


@pytest.mark.parametrize(("least", "longest"), [(1, 3), (2, 16), (3, 5)])
def test_suffix_match_agrees_with_a_search_of_everything_while_the_text_grows(least, longest):
    draws = torch.randint(4, (400,), generator=torch.Generator().manual_seed(least)).tolist()
    proposer = SuffixMatchProposer(draws[:100], 4, least=least, longest=longest)
    for count in range(0, 300, 3):
        known = draws[: 100 + count]
        expected = max(
            ((n, end) for n in range(least, longest + 1) for end in range(n, len(known))
             if known[end - n : end] == known[-n:]), default=(0, 0),
        )  # fmt: skip
        assert proposer.match(draws[100 : 100 + count]) == expected[::-1]


def test_impossible_lengths_of_matches_are_refused():
    for least, longest in ((0, 3), (4, 3)):
        with pytest.raises(InvalidInputError, match="least must be from 1 to longest"):
            SuffixMatchProposer([1, 2], 10, least=least, longest=longest)


def test_a_source_is_what_the_match_is_long_or_the_model(tiny):
    text = list(range(100, 120))
    names = {}
    for length in (0, 1, 2, 3, 4, 8, 16):
        match = SuffixMatchProposer(text, 1000, least=2)
        source = match.source([7, *text[:length]])
        names[length] = source and source.name
    assert names[0] is names[1] is None
    assert [names[n] for n in (2, 3, 4, 8, 16)] == [
        "match of 1 or 2", "match of 3", "match of 4 to 7", "match of 8 and more", "match of 8 and more",
    ]  # fmt: skip
    hybrid = HybridProposer(
        SuffixMatchProposer(text, 1000, least=3), ModelProposer(CachedModel(tiny, 64, 1000), [1, 2])
    )
    assert hybrid.source([7, *text[:2]]).drafts and not hybrid.source([7, *text[:3]]).drafts
    assert hybrid.source([7, *text[:3]], bonus=True).drafts  # a match has no distribution behind it


@pytest.mark.parametrize(
    ("proposer", "instead"),
    [("hybrid", "candidates are copied, and no model drafts"), ("rag", "the target decodes alone")],
)
def test_a_target_does_not_draft_for_itself_from_most_of_the_context(tiny, proposer, instead):
    rapid = generator(tiny, proposer=proposer, retrieval_budget=10_000)
    stats = LongContext(DOCUMENT, rapid).ask("who keeps the lamp", max_tokens=12).stats
    assert f"the retrieved context is most of the context: {instead}" in stats.notes
    assert stats.startup_seconds == 0 and (proposer == "hybrid" or stats.candidates == 0)


# --- models ---------------------------------------------------------------------------------------------


def test_a_window_keeps_the_sinks_and_the_end():
    assert sinks_and_window(10, 2, 3) == [0, 1, 7, 8, 9]
    assert sinks_and_window(2, 2, 3) == [0, 1]
    with pytest.raises(InvalidInputError, match="window at least 1"):
        sinks_and_window(1, 2, 0)


def test_drafting_on_the_targets_own_keys_reads_nothing_and_with_all_of_them_is_the_target(tiny, other, forward_passes):
    rapid = generator(tiny, transfer="none", proposer="sparse", candidates=3, retrieval_budget=10_000)
    session = LongContext(DOCUMENT, rapid)
    counts = forward_passes(tiny.model)
    out = session.ask("zzz", max_tokens=12)  # nothing is near: head and tail of the document, here all of it
    assert out.stats.acceptance == 1.0  # the same keys at the same positions: q is p
    assert max(counts[1:]) <= 4  # after the question only candidates are fed
    with pytest.raises(InvalidInputError, match="drafts on the target's own keys"):
        generator(tiny, other, proposer="sparse")


def test_kept_keys_stay_at_their_positions(tiny):
    """Against stock transformers with a mask over everything that is left out."""
    ids = torch.randint(1000, (1, 40), generator=torch.Generator().manual_seed(0))
    whole = CachedModel(tiny, 64, 1000)
    whole.prefill(ids[0, :38].tolist())
    kept = [*range(3), *range(10, 20), *range(35, 38)]
    some = CachedModel(tiny, 64, 1000)
    some.keep(whole, kept, 38)
    made = some.feed(ids[0, 38:])
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    hidden = [i for i in range(38) if i not in kept]
    causal[38:, hidden] = False
    with torch.inference_mode():
        stock = tiny.model(ids, attention_mask=causal[None, None]).logits[0, 38:, :1000]
    assert torch.allclose(made, stock, atol=1e-3)
    assert (some.length, some.skipped) == (18, 22)


def test_a_drafter_that_catches_up_proposes_what_it_would_have_proposed(tiny):
    """After plain steps, after a rejection, and where there is nothing to catch up with."""
    prompt, drawing = [5, 6, 7, 8], Drawing(Sampling())
    generated = torch.randint(1000, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def reading_everything(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates and distributions of a model that reads the whole sequence at once."""
        model, rows = CachedModel(tiny, 64, 1000), []
        logits = model.prefill(tokens)
        for _ in range(3):
            rows.append(logits.softmax(-1))
            logits = model.feed(logits.argmax(-1)[None])[-1]
        return torch.stack(rows).argmax(-1), torch.stack(rows)

    drafter = ModelProposer(CachedModel(tiny, 64, 1000), prompt)
    assert drafter.propose(generated, 3, drawing) is None  # its prompt was not read: nothing happens
    assert drafter.model.length == 0
    drafter.prepare()
    for upto, behind in ((2, False), (9, True), (10, False), (12, False), (30, True)):
        made = drafter.propose(generated[:upto], 3, drawing)
        assert (made.catch_up_seconds > 0) == behind
        tokens, probabilities = reading_everything([*prompt, *generated[:upto]])
        assert torch.equal(made.tokens, tokens)
        assert torch.allclose(made.probabilities, probabilities, atol=1e-5)


# --- two levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [1, 2, 7])
def test_two_levels_propose_what_the_middle_model_writes_alone(tiny, other, candidates):
    """Greedily: whatever the small drafter proposes, the candidates and their distributions are the middle model's."""
    prompt, drawing = [5, 6, 7, 8], Drawing(Sampling())
    alone = ModelProposer(CachedModel(tiny, 64, 1000), prompt)
    for small in (tiny, other):
        middle, below = (ModelProposer(CachedModel(lm, 64, 1000), prompt) for lm in (tiny, small))
        proposer = TriForceProposer(middle, below, candidates=2)
        assert proposer.propose([], candidates, drawing) is None  # the prompts were not read
        assert proposer.startup_tokens == 6
        for one in (proposer, alone):
            one.prepare()
        # The target accepts all, rejects at different places, and writes on alone.
        for generated in ([9], [9, 11, 12], [9, 11, 40], [9, 11, 40, *range(50, 60)]):
            expected = alone.propose(generated, candidates, drawing, bonus=True)
            made = proposer.propose(generated, candidates, drawing, bonus=True)
            assert made.tokens.tolist() == expected.tokens.tolist()
            assert torch.allclose(made.probabilities, expected.probabilities, atol=1e-5)
            assert proposer.propose(generated, candidates, drawing).probabilities.shape == (candidates, 1000)
        assert proposer.forward_seconds > middle.forward_seconds > 0
    with pytest.raises(InvalidInputError, match="at least 1 candidate, got 0"):
        TriForceProposer(middle, below, candidates=0)


def test_a_window_that_is_not_smaller_than_the_context_is_refused(tiny):
    session = LongContext(DOCUMENT, generator(tiny, proposer="triforce", window=10_000))
    tokens = len(session.prompt.context)
    message = (
        f"triforce' needs a window smaller than the context: that has {tokens} tokens, the window 10000 after 4 si"
    )
    with pytest.raises(InvalidInputError, match=message):
        session.ask("keeper?")
    session.rapid = generator(tiny, proposer="triforce", window=tokens - 5, candidates=3)
    assert session.ask("keeper?", max_tokens=4).stats.tokens == 4
    with pytest.raises(InvalidInputError, match="window must be at least 1, got 0"):
        generator(tiny, window=0)
    with pytest.raises(InvalidInputError, match="proposer='triforce' makes no trees"):
        generator(tiny, proposer="triforce", transfer="none", tree_width=2)
