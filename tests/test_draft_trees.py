"""Draft trees: what they are made of, and that verification keeps the target's law."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specrag.models import Sampling, TransformersLM
from specrag.rapid import LongContext, RapidStats
from specrag.rapid.acceptance import KnowledgeTransfer
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.datastore import Datastore
from specrag.rapid.decoding import decode
from specrag.rapid.draft_length import MODEL, DraftLength, FixedLength, Round, Source
from specrag.rapid.draft_tree import DraftTree, draw_branches, merged, recursive_rejection, walk
from specrag.rapid.drawing import Drawing
from specrag.rapid.output import Limits
from specrag.rapid.proposers import ModelProposer
from specrag.rapid.rest import RestProposer
from specrag.rapid.triforce import TriForceProposer
from tests.conftest import tiny_llama
from tests.rapid_parts import DOCUMENT, asked, generator, plain_greedy
from tests.test_acceptance import p_value
from tests.test_datastore import text, words

# --- what trees are made of -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-1, 3), min_size=4, max_size=4), min_size=1, max_size=12),
    nodes=st.integers(1, 12),
)
def test_a_merged_tree_holds_the_commonest_beginnings(rows, nodes):
    """Against counting every beginning."""
    ended = [row[: row.index(-1)] if -1 in row else row for row in rows]
    counts = Counter(tuple(row[:n]) for row in ended for n in range(1, len(row) + 1))
    tokens, parents = merged(rows, nodes)
    assert len(tokens) == min(nodes, len(counts))
    if not tokens:
        return
    tree = DraftTree(tuple(tokens), tuple(parents))
    paths = [tuple(tokens[row - 1] for row in tree.shape.path(node + 1)[1:]) for node in range(len(tokens))]
    assert len(set(paths)) == len(paths) and set(paths) <= set(counts)
    assert sorted(counts[path] for path in paths) == sorted(counts.values())[-len(paths) :]
    first = [tokens[row - 1] for row in tree.longest_from(0)]  # of each node, the commonest branch comes first
    for n in range(1, len(first) + 1):
        assert counts[tuple(first[:n])] == max(
            counts[p] for p in paths if len(p) == n and p[:-1] == tuple(first[: n - 1])
        )


def test_branches_are_drawn_without_replacement_and_are_the_likeliest_at_temperature_0():
    q = torch.tensor([0.1, 0.5, 0.0, 0.4])
    tokens, rows = draw_branches(q, 2, Drawing(Sampling()))
    assert tokens == [1, 3]
    assert torch.allclose(rows, torch.stack([q, torch.tensor([0.2, 0.0, 0.0, 0.8])]))
    tokens, rows = draw_branches(q, 9, Drawing(Sampling(temperature=1.0, seed=0)))
    assert sorted(tokens) == [0, 1, 3] and len(rows) == 3  # what q does not allow is not drawn


# --- the law of a node ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_recursive_rejection_emits_the_law_of_the_target(width, sharpness):
    """By enumeration of every branch that can be drawn and of every verdict."""
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        p, q = ((sharpness * torch.randn(4, generator=random, dtype=torch.float64)).softmax(-1) for _ in range(2))
        if seed == 0:
            q[0], q[1] = q[0] + q[1], 0  # a token that the drafter never draws
        out = torch.zeros(4, dtype=torch.float64)
        for drawn in itertools.permutations(range(4), width):
            rows, left, chance = [], q.clone(), 1.0
            for token in drawn:
                rows.append(left / left.sum() if left.sum() > 0 else left)
                chance *= float(rows[-1][token])
                left = left.clone()
                left[token] = 0
            if not chance:
                continue
            kept, rest = recursive_rejection(p, torch.stack(rows), torch.tensor(drawn))
            for token, keep in zip(drawn, kept.tolist(), strict=True):
                out[token] += chance * keep
                chance *= 1 - keep
            out += chance * rest
        # With three of q's tokens in the tree and a fourth that q lacks, permutations of width 3 are all there are.
        assert torch.allclose(out, p, atol=1e-6), (seed, out, p)


@pytest.mark.parametrize("drawn", [True, False])
def test_the_walk_follows_the_law_of_the_target_down_a_tree(drawn):
    """The law of all emitted tokens against enumeration, over many trees and draws."""
    random = torch.Generator().manual_seed(3)
    after = {(): torch.randn(4, generator=random)}
    after |= {(t,): torch.randn(4, generator=random) for t in range(4)}
    drafted = {key: (logits + torch.randn(4, generator=random)).softmax(-1) for key, logits in after.items()}
    counts = torch.zeros(4, 4)
    drawing = Drawing(Sampling(temperature=1.0, seed=0))
    for _ in range(1500):
        if drawn:
            firsts, rows = draw_branches(drafted[()], 2, drawing)
            seconds, more = draw_branches(drafted[firsts[0],], 2, drawing)
            tree = DraftTree((*firsts, *seconds), (-1, -1, 0, 0), torch.cat([rows, more]))
        else:
            firsts = [1, 3]
            tree = DraftTree((1, 3, 0, 1), (-1, -1, 0, 0))
        ends = [(), *((t,) for t in firsts), *[(firsts[0],)] * 2]  # the rows of seconds are leaves: any law will do
        found = walk(tree, torch.stack([after[end] for end in ends]), drawing)
        made = [*(tree.tokens[row - 1] for row in found.rows[1:]), found.following]
        if len(made) == 1:  # the second token is not decided in this round
            made.append(int(drawing.draw(after[made[0],].softmax(-1))))
        counts[made[0], made[1]] += 1
    law = torch.stack([after[()].softmax(-1)[t] * after[t,].softmax(-1) for t in range(4)])
    assert p_value(counts.flatten(), law.flatten()) > 0.001


# --- the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 1000.0])
def test_rest_is_greedy_exact_at_any_strength(tiny, tmp_path, strength):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(session, "keeper?", 24)
    # What the model writes, with errors: several continuations, some of which are right.
    wrong = [token if i % 4 else 7 for i, token in enumerate(plain, start=1)]
    texts = [tiny.tokenizer.decode(tokens) for tokens in (plain[:10], wrong, wrong[3:], plain[7:])]
    store = Datastore.build(texts, tiny.tokenizer, tmp_path / "store")
    target, logits = asked(session, "keeper?")
    proposer = RestProposer(store, [], target.vocabulary, least=1)
    stats = RapidStats(trace=[])
    transfer = KnowledgeTransfer("rapid", strength)
    pieces = decode(target, logits, proposer, transfer, Sampling(), FixedLength(4), Limits(24), stats=stats)
    assert "".join(pieces) == tiny.tokenizer.decode(plain)
    assert 0 < stats.accepted < stats.candidates < stats.tree_tokens
    written = [t for r in stats.trace for t in (*r.candidates[: r.accepted], r.following)]
    assert written[:24] == plain
    assert all(len(r.candidates) <= 4 for r in stats.trace)


def small_model(seed: int = 1) -> TransformersLM:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "initializer_range": 0.6}
    return TransformersLM(tiny_llama(4, seed=seed, **shape), words(4))


def law_of(target: TransformersLM, prompt: list[int], count: int) -> torch.Tensor:
    """The probability of every continuation of ``count`` tokens, by enumeration."""
    made = list(itertools.product(range(4), repeat=count))
    with torch.inference_mode():
        logits = target.model(torch.tensor([[*prompt, *tokens] for tokens in made])).logits[:, len(prompt) - 1 : -1]
    chances = logits.softmax(-1).gather(-1, torch.tensor(made)[..., None])[..., 0]
    return chances.prod(-1)


class ChangingWidths(DraftLength):
    """Always the same γ, and another width in each round."""

    def __init__(self, candidates: int, widths) -> None:
        self._candidates, self._widths = candidates, itertools.cycle(widths)

    def next(self, source: Source = MODEL) -> int:
        self.width = next(self._widths)
        return self._candidates


def sampled(target: TransformersLM, prompt, make_proposer, transfer, depth: int, runs: int, count: int = 3, widths=()):
    """How often the loop writes each continuation of ``count`` tokens, and the statistics of all runs."""
    cached, counts, stats = CachedModel(target, 64, 4), torch.zeros(4**count), RapidStats()
    logits = cached.prefill(prompt)
    for seed in range(runs):
        cached.rollback_to(len(prompt))
        sampling = Sampling(temperature=1.0, seed=seed)
        length = ChangingWidths(depth, widths[seed % len(widths) :] + widths) if widths else FixedLength(depth)
        pieces = decode(
            cached, logits, make_proposer(), transfer, sampling, length, Limits(count + depth), stats=stats,
            cancelled=lambda: stats.tokens >= count,
        )  # fmt: skip
        index = 0
        for word in "".join(pieces).split()[:count]:
            index = 4 * index + int(word[1:])
        counts[index] += 1
    return counts, stats


@pytest.mark.slow
@pytest.mark.parametrize("transfer", [KnowledgeTransfer("none"), KnowledgeTransfer("rapid", 10.0)])
def test_rest_samples_from_the_target(tmp_path, transfer):
    target, prompt = small_model(), [1, 2, 3, 0]
    tokens = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    store = Datastore.build([text(tokens)], words(4), tmp_path / "store")

    def proposer():
        return RestProposer(store, prompt, 4, width=3, least=1)

    counts, stats = sampled(target, prompt, proposer, transfer, depth=3, runs=400)
    assert stats.accepted > 150 and stats.tree_tokens > stats.candidates
    assert p_value(counts, law_of(target, prompt, 3)) > 0.001


class Recorded(FixedLength):
    """A fixed γ that keeps the rounds it is told of."""

    def __init__(self, candidates: int) -> None:
        super().__init__(candidates)
        self.rounds: list[Round] = []

    def observe(self, done: Round) -> None:
        self.rounds.append(done)


def test_a_round_reports_the_sibling_that_was_taken():
    """Each candidate stands beside all other tokens, so a round ends with its path or with a sibling."""
    target, prompt, length = CachedModel(small_model(), 64, 4), [1, 2, 3, 0], Recorded(2)
    proposer = ModelProposer(CachedModel(small_model(seed=9), 64, 4), prompt, width=4)
    proposer.prepare()
    greedy, none = Sampling(temperature=0.0), KnowledgeTransfer("none")
    logits = target.prefill(prompt)
    list(decode(target, logits, proposer, none, greedy, length, Limits(24)))
    rounds = [done for done in length.rounds if done.candidates == 2]
    assert {done.width for done in rounds} == {4}
    assert {(done.accepted, done.sibling > 0) for done in rounds} == {(1, True), (2, True), (2, False)}


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(), (1, 3, 2)])
def test_trees_of_a_drafter_sample_from_the_target(widths):
    target, prompt, short = small_model(), [1, 2, 3, 0], [3, 0]
    drafter = CachedModel(small_model(seed=2), 64, 4)

    def proposer():
        drafter.rollback_to(0)
        made = ModelProposer(drafter, short, width=3)
        made.prepare()
        return made

    counts, stats = sampled(target, prompt, proposer, KnowledgeTransfer("none"), depth=2, runs=400, widths=widths)
    assert 0 < stats.accepted < stats.candidates < stats.tree_tokens
    assert p_value(counts, law_of(target, prompt, 3)) > 0.001


@pytest.mark.slow
def test_two_levels_sample_from_the_target():
    """And the lower level alone samples from the middle model."""
    target, prompt = small_model(), [1, 2, 3, 0]
    middle, small = (CachedModel(small_model(seed), 64, 4) for seed in (3, 2))

    def proposer():
        for model in (middle, small):
            model.rollback_to(0)
        made = TriForceProposer(ModelProposer(middle, [3, 0]), ModelProposer(small, [0]), candidates=1)
        made.prepare()
        return made

    counts, stats = sampled(target, prompt, proposer, KnowledgeTransfer("none"), depth=3, runs=200)
    assert 0 < stats.accepted < stats.candidates
    assert p_value(counts, law_of(target, prompt, 3)) > 0.001
    written = torch.zeros(4, 4)
    drawing = Drawing(Sampling(temperature=1.0, seed=0))
    for _ in range(200):
        first, second = proposer().propose([], 2, drawing).tokens.tolist()
        written[first, second] += 1
    assert p_value(written.flatten(), law_of(middle.lm, [3, 0], 2)) > 0.001


def test_a_tree_holds_the_drafters_likeliest_tokens_beside_each_candidate(tiny):
    prompt, drawing = [5, 6, 7, 8], Drawing(Sampling())
    chain, tree = (ModelProposer(CachedModel(tiny, 64, 1000), prompt, width) for width in (1, 3))
    for proposer in (chain, tree):
        proposer.prepare()
    for generated in ([9], [9, 11, 12], [9, 11, 12, 40, 41, 42, 43, 44, 45]):
        expected = chain.propose(generated, 4, drawing)
        made = tree.propose(generated, 4, drawing)
        assert made.depth == 4 and len(made.tokens) == 12
        assert made.tokens[:4] == tuple(expected.tokens.tolist())
        for depth in range(4):
            beside = [node for node, parent in enumerate(made.parents) if parent == depth - 1]
            likeliest = expected.probabilities[depth].topk(3).indices.tolist()
            assert [made.tokens[node] for node in beside] == likeliest
    assert made.width == 3 and [made.sibling(row) for row in range(13)] == [0] * 5 + [1, 2] * 4
    asked_for_bonus = tree.propose([9], 4, drawing, bonus=True)
    assert len(asked_for_bonus.tokens) == 4 and len(asked_for_bonus.probabilities) == 5  # no tree
