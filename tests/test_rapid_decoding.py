"""The promises of the decoding loop: exact lengths, clean text, repeatable runs, sums that add up."""

import itertools

import pytest

from specrag.errors import InvalidInputError
from specrag.models import Sampling
from specrag.rapid import LongContext, RapidStats
from specrag.rapid.acceptance import KnowledgeTransfer
from specrag.rapid.cached_model import CachedModel
from specrag.rapid.decoding import decode
from specrag.rapid.draft_length import AdaptiveLength, FixedLength
from specrag.rapid.output import Limits, Output
from specrag.rapid.proposers import HybridProposer, ModelProposer, SuffixMatchProposer
from tests.rapid_parts import DOCUMENT, asked, generator, plain_greedy

NONE = KnowledgeTransfer("none")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_number_of_new_tokens_is_exact(tiny, count):
    out = LongContext(DOCUMENT, generator(tiny, candidates=5)).ask("q", max_tokens=count)
    assert out.stats.tokens == count and out.stats.finish == "length"


def test_pieces_add_up_and_a_stop_string_ends_the_text_without_being_shown(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=5))
    whole = session.ask("q", max_tokens=24).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    pieces = list(session.stream("q", max_tokens=24, stop=[stop]))
    assert "".join(pieces) == whole[: whole.index(stop)]
    for i in range(len(pieces)):
        assert stop not in "".join(pieces[:i])


def test_an_end_token_inside_an_accepted_run_ends_it_there(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=6))
    plain = plain_greedy(session, "q", 12)
    target, logits = asked(session, "q")
    proposer = SuffixMatchProposer([*plain[:2], *plain, 7, 7], target.vocabulary, least=1)
    limits, stats = Limits(12, end_tokens=frozenset([plain[5]])), RapidStats()
    text = "".join(decode(target, logits, proposer, NONE, Sampling(), FixedLength(6), limits, stats=stats))
    first = plain.index(plain[5])
    assert text == tiny.tokenizer.decode(plain[:first]) and stats.finish == "stop" and stats.tokens == first + 1


def test_never_half_a_character_nor_half_a_stop_string(tiny):
    text = "日本語 naïve € and the END of it"
    ids = tiny.encoder.encode_text(text)
    output = Output(tiny.tokenizer, Limits(1000, stop=("ENDING", "ness")))
    pieces = [output.add([token]) for token in ids]
    assert "" in pieces and all("\ufffd" not in piece for piece in pieces)
    for i, piece in enumerate(pieces):
        assert not "".join(pieces[: i + 1]).endswith(("E", "EN", "END")) or piece == ""
    assert "".join(pieces) + output.rest() == text


def test_impossible_limits_are_refused():
    with pytest.raises(InvalidInputError, match="max_tokens must be at least 1"):
        Limits(0)
    with pytest.raises(InvalidInputError, match="stop string must not be empty"):
        Limits(1, stop=("",))


@pytest.mark.parametrize("proposer", ["rag", "hybrid"])
@pytest.mark.parametrize("transfer", ["none", "rapid", "augmented"])
def test_runs_repeat_exactly_under_a_seed_and_a_schedule(tiny, other, transfer, proposer):
    def run(seed, candidates):
        sampling = Sampling(temperature=1.0, seed=seed)
        rapid = generator(tiny, other, sampling=sampling, transfer=transfer, proposer=proposer, candidates=candidates)
        return LongContext(DOCUMENT, rapid).ask("q", max_tokens=12)

    fixed = run(1, 3)
    assert run(1, 3).text == fixed.text
    assert any(run(seed, 3).text != fixed.text for seed in (2, 3))
    automatic = run(1, "auto")
    assert run(1, automatic.stats.schedule or [0]).text == automatic.text


def test_the_sampling_of_a_call_replaces_that_of_the_settings(tiny):
    warm = Sampling(temperature=1.0, seed=5)
    session = LongContext(DOCUMENT, generator(tiny, candidates=3))
    greedy = session.ask("q", max_tokens=12).text
    drawn = session.ask("q", max_tokens=12, sampling=warm).text
    assert drawn != greedy and session.ask("q", max_tokens=12).text == greedy
    assert LongContext(DOCUMENT, generator(tiny, candidates=3, sampling=warm)).ask("q", max_tokens=12).text == drawn
    narrow = Sampling(temperature=1.0, top_k=1, seed=5)
    assert session.ask("q", max_tokens=12, sampling=narrow).text == greedy


def test_cancelling_between_rounds_keeps_what_was_said(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=2))
    whole = session.ask("q", max_tokens=24).text
    calls = itertools.count()
    stats = RapidStats()
    part = "".join(session.stream("q", max_tokens=24, cancelled=lambda: next(calls) >= 2, stats=stats))
    assert whole.startswith(part) and stats.finish == "cancelled" and stats.tokens < 24
    assert session.ask("q", max_tokens=24).text == whole  # the session goes on


def test_statistics_add_up(tiny, other):
    rapid = generator(tiny, other, candidates=4, sampling=Sampling(temperature=1.0, seed=0))
    stats = LongContext(DOCUMENT, rapid).ask("q", max_tokens=30).stats
    assert sum(stats.schedule) == stats.candidates >= stats.accepted
    assert stats.tokens <= 1 + stats.accepted + len(stats.schedule)
    assert 1 <= stats.from_target <= stats.tokens
    assert 0 < stats.forward_seconds <= stats.decode_seconds


def test_what_is_copied_is_no_reason_to_read_a_drafters_prompt(tiny, other, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(session, "q", 16)
    target, logits = asked(session, "q")
    counts = forward_passes(other.model)
    drafter = ModelProposer(CachedModel(other, 64, target.vocabulary), [1, 2, 3])
    proposer = HybridProposer(SuffixMatchProposer(plain, target.vocabulary, least=1), drafter)
    stats = RapidStats()
    text = "".join(decode(target, logits, proposer, NONE, Sampling(), FixedLength(8), Limits(16), stats=stats))
    assert text == tiny.tokenizer.decode(plain) and stats.accepted > 8
    assert not counts and stats.startup_seconds == 0


def test_what_matches_teach_is_kept_by_their_length(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(session, "q", 32)
    target, logits = asked(session, "q")
    store = SuffixMatchProposer([*plain[:16], 7, *plain[16:]], target.vocabulary, least=1)
    length = AdaptiveLength()
    assert "".join(decode(target, logits, store, NONE, Sampling(), length, Limits(32)))
    learned = length.known.sources
    assert len(learned) > 1 and not any(source.drafts for source in learned)
    assert sum(its.judged for its in learned.values()) > 4
