"""The decoding engine: exact against plain decoding, for every proposer, with real tokenizer and tiny models; and
with real SmolLM2 where behaviour counts."""

import itertools

import pytest
import torch

from specrag.errors import InvalidInputError, ModelError, ModelNotFoundError
from specrag.models import TransformersLM
from specrag.models.tokenization import IncrementalDecoder, StopStrings
from specrag.rapid import Controller, LongContext, RapidGenerator, RapidStats, proposers
from specrag.rapid.acceptance import output_distribution
from specrag.rapid.decoding import RapidSettings, _Output, decode
from specrag.rapid.draft_length import MODEL, Line, Source
from specrag.rapid.proposers import CachedModel, Drawing, ModelProposer, SuffixMatchProposer, sinks_and_window
from tests.conftest import tiny_llama
from tests.fakes import HashEmbedder
from tests.test_acceptance import p_value

PROPOSERS = ["rag", "sparse", "naive", "window", "match", "hybrid", "hybrid-sparse"]
# A word salad with repetitions: something to retrieve, and something to copy.
DOCUMENT = " ".join(
    f"Note {i}: the {word} of room {i % 7} is kept by keeper {i % 5}."
    for i, word in enumerate(["key", "lamp", "bell"] * 7)
)


@pytest.fixture(scope="module")
def tiny(smollm2) -> TransformersLM:
    size = smollm2.model.config.vocab_size
    return TransformersLM(tiny_llama(size, max_position_embeddings=8192), smollm2.tokenizer)


@pytest.fixture(scope="module")
def other(smollm2) -> TransformersLM:
    """A drafter that mostly disagrees, with a padded vocabulary."""
    size = smollm2.model.config.vocab_size + 64
    return TransformersLM(tiny_llama(size, seed=5, max_position_embeddings=8192), smollm2.tokenizer)


@pytest.fixture(scope="module")
def twin(smollm2) -> TransformersLM:
    """The target's shape with other weights: keys and values that mean nothing to it."""
    size = smollm2.model.config.vocab_size
    return TransformersLM(tiny_llama(size, seed=5, max_position_embeddings=8192), smollm2.tokenizer)


def generator(target, drafter=None, **options) -> RapidGenerator:
    return RapidGenerator(target, drafter, embedder=HashEmbedder(), **({"temperature": 0.0, "seed": 0} | options))


def plain_greedy(lm: TransformersLM, session: LongContext, question: str, count: int) -> list[int]:
    """transformers' own generate on the same tokens."""
    tail = lm.encoder.encode_text(session.tail.replace("\ue0f2", question))
    ids = torch.tensor([[*session._head, *session._context, *tail]])
    with torch.inference_mode():
        made = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
            eos_token_id=sorted(lm.end_tokens),
        )  # fmt: skip
    return made[0, ids.shape[1] :].tolist()


# --- exactness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("candidates", [1, 5, "auto"])
def test_without_transfer_greedy_output_is_the_targets_own(tiny, other, twin, proposer, candidates):
    for drafter in (None, twin if proposer.endswith("sparse") else other):
        rapid = generator(tiny, drafter, transfer="none", proposer=proposer, candidates=candidates)
        session = LongContext(DOCUMENT, rapid)
        out = session.ask("who keeps the bell?", max_new_tokens=16)
        expected = plain_greedy(tiny, session, "who keeps the bell?", 16)
        assert out.text == tiny.tokenizer.decode(expected, skip_special_tokens=True)
        assert out.stats.tokens == len(expected)


@pytest.mark.slow
def test_without_transfer_greedy_output_is_the_targets_own_on_real_weights(smollm2, questions, minilm):
    text = "\n\n".join(p.text for q in questions[:2] for p in q.passages)
    rapid = RapidGenerator(
        smollm2, embedder=minilm, transfer="none", temperature=0.0, candidates=4, transfer_strength=10.0
    )
    session = LongContext(text, rapid)
    for question in questions[:2]:
        out = session.ask(question.question, max_new_tokens=32)
        expected = plain_greedy(smollm2, session, question.question, 32)
        assert out.text == smollm2.tokenizer.decode(expected, skip_special_tokens=True)
    assert out.stats.accepted > 0


def test_suffix_match_is_greedy_exact_at_any_strength(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(tiny, session, "keeper?", 24)
    # A datastore that is right in part: some candidates are accepted, some are not.
    store = [token if i % 4 else 7 for i, token in enumerate(plain, start=1)]
    target = session._target
    for strength in (0.0, 10.0, 1000.0):
        target.rollback_to(session.tokens)
        logits = target.prefill(tiny.encoder.encode_text(session.tail.replace("\ue0f2", "keeper?")))
        proposer = SuffixMatchProposer(store, target.vocabulary, least=1)
        settings, stats = RapidSettings("rapid", strength, temperature=0.0), RapidStats()
        text = "".join(decode(target, logits, proposer, settings, Controller(6), max_new_tokens=24, stats=stats))
        assert text == tiny.tokenizer.decode(plain)
        assert 0 < stats.accepted < stats.candidates


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["none", "rapid", "augmented"])
def test_the_loop_samples_the_second_token_from_the_closed_form(transfer):
    """A model of 11 tokens: the law of the token after the first, over many seeds, given that first token."""
    torch.manual_seed(0)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(11)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "initializer_range": 0.6}
    target = TransformersLM(tiny_llama(11, seed=1, **shape), tokenizer)
    drafter = TransformersLM(tiny_llama(11, seed=2, **shape), tokenizer)
    prompt, short = [1, 2, 3, 4, 5], [4, 5]
    settings = RapidSettings(transfer=transfer, strength=3.0)
    main, small = CachedModel(target, 32, 11), CachedModel(drafter, 32, 11)
    logits = main.prefill(prompt)
    small.prefill(short[:-1])
    counts: dict[int, torch.Tensor] = {}
    for seed in range(2500):
        main.rollback_to(len(prompt))
        small.rollback_to(len(short) - 1)
        proposer = ModelProposer(small, short)
        text = "".join(decode(main, logits, proposer, settings, Controller(1), max_new_tokens=3, seed=seed)).split()
        first, second = (int(t[1:]) for t in text[:2])
        counts.setdefault(first, torch.zeros(11))[second] += 1
    first = max(counts, key=lambda t: counts[t].sum())
    drawing = Drawing()
    with torch.inference_mode():
        z = target.model(torch.tensor([[*prompt, first]])).logits[0, -1]
        q = drawing.distribution(drafter.model(torch.tensor([[*short, first]])).logits[0, -1])
    from specrag.rapid.acceptance import augmented_target

    p = z.softmax(-1)
    out = output_distribution(p, q, augmented_target(z, q, 3.0), transfer)
    assert counts[first].sum() > 300
    assert p_value(counts[first], out) > 0.001


# --- the loop's promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_number_of_new_tokens_is_exact(tiny, count):
    out = LongContext(DOCUMENT, generator(tiny, candidates=5)).ask("q", max_new_tokens=count)
    assert out.stats.tokens == count and out.stats.finish == "length"


def test_pieces_add_up_and_a_stop_string_ends_the_text_without_being_shown(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=5))
    whole = session.ask("q", max_new_tokens=24).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    pieces = list(session.stream("q", max_new_tokens=24, stop=[stop]))
    assert "".join(pieces) == whole[: whole.index(stop)]
    for i in range(len(pieces)):
        assert stop not in "".join(pieces[:i])


def test_an_end_token_inside_an_accepted_run_ends_it_there(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=6))
    plain = plain_greedy(tiny, session, "q", 12)
    target = session._target
    target.rollback_to(session.tokens)
    logits = target.prefill(tiny.encoder.encode_text(session.tail.replace("\ue0f2", "q")))
    proposer = SuffixMatchProposer([*plain[:2], *plain, 7, 7], target.vocabulary, least=1)
    stats = RapidStats()
    text = "".join(
        decode(target, logits, proposer, RapidSettings("none", temperature=0.0), Controller(6), max_new_tokens=12,
               end_tokens=frozenset([plain[5]]), stats=stats)
    )  # fmt: skip
    first = plain.index(plain[5])
    assert text == tiny.tokenizer.decode(plain[:first]) and stats.finish == "stop" and stats.tokens == first + 1


def test_never_half_a_character_nor_half_a_stop_string(tiny):
    text = "日本語 naïve € and the END of it"
    ids = tiny.encoder.encode_text(text)
    output = _Output(IncrementalDecoder(tiny.tokenizer), StopStrings(["ENDING", "ness"]), frozenset(), limit=1000)
    pieces = [output.add([token]) for token in ids]
    assert "" in pieces and all("\ufffd" not in piece for piece in pieces)
    for i, piece in enumerate(pieces):
        assert not "".join(pieces[: i + 1]).endswith(("E", "EN", "END")) or piece == ""
    assert "".join(pieces) + output.rest() == text


@pytest.mark.parametrize("proposer", ["rag", "hybrid"])
@pytest.mark.parametrize("transfer", ["none", "rapid", "augmented"])
def test_runs_repeat_exactly_under_a_seed_and_a_schedule(tiny, other, transfer, proposer):
    def text(seed, **options):
        rapid = generator(tiny, other, temperature=1.0, transfer=transfer, proposer=proposer, seed=seed, **options)
        return LongContext(DOCUMENT, rapid).ask("q", max_new_tokens=16)

    fixed = text(1, candidates=3)
    assert text(1, candidates=3).text == fixed.text
    assert any(text(seed, candidates=3).text != fixed.text for seed in (2, 3))
    automatic = text(1, candidates="auto")
    assert text(1, candidates=automatic.stats.schedule or [0]).text == automatic.text


def test_cancelling_between_rounds_keeps_what_was_said(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=2))
    whole = session.ask("q", max_new_tokens=24).text
    calls = itertools.count()
    stats = RapidStats()
    part = "".join(session.stream("q", max_new_tokens=24, cancelled=lambda: next(calls) >= 2, stats=stats))
    assert whole.startswith(part) and stats.finish == "cancelled" and stats.tokens < 24
    assert session.ask("q", max_new_tokens=24).text == whole  # the session goes on


def test_statistics_add_up(tiny, other):
    stats = (
        LongContext(DOCUMENT, generator(tiny, other, candidates=4, temperature=1.0)).ask("q", max_new_tokens=30).stats
    )
    assert sum(stats.schedule) == stats.candidates >= stats.accepted
    assert stats.tokens <= 1 + stats.accepted + len(stats.schedule)
    assert 1 <= stats.from_target <= stats.tokens
    assert 0 < stats.forward_seconds <= stats.decode_seconds


# --- proposers and controller ------------------------------------------------------------------------------


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
    hybrid = proposers.HybridProposer(
        SuffixMatchProposer(text, 1000, least=3), ModelProposer(CachedModel(tiny, 64, 1000), [1, 2])
    )
    assert hybrid.source([7, *text[:2]]).drafts and not hybrid.source([7, *text[:3]]).drafts
    assert hybrid.source([7, *text[:3]], bonus=True).drafts  # a match has no distribution behind it


def test_what_is_copied_is_no_reason_to_read_a_drafters_prompt(tiny, other, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(tiny, session, "q", 16)
    target = session._target
    target.rollback_to(session.tokens)
    logits = target.prefill(tiny.encoder.encode_text(session.tail.replace("\ue0f2", "q")))
    counts = forward_passes(other.model)
    drafter = ModelProposer(CachedModel(other, 64, target.vocabulary), [1, 2, 3])
    proposer = proposers.HybridProposer(SuffixMatchProposer(plain, target.vocabulary, least=1), drafter)
    stats = RapidStats()
    settings = RapidSettings("none", temperature=0.0)
    text = "".join(decode(target, logits, proposer, settings, Controller(8), max_new_tokens=16, stats=stats))
    assert text == tiny.tokenizer.decode(plain) and stats.accepted > 8
    assert not counts and stats.startup_seconds == 0


def test_what_matches_teach_is_kept_by_their_length(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    plain = plain_greedy(tiny, session, "q", 32)
    target, controller = session._target, Controller("auto")
    target.rollback_to(session.tokens)
    logits = target.prefill(tiny.encoder.encode_text(session.tail.replace("\ue0f2", "q")))
    store = SuffixMatchProposer([*plain[:16], 7, *plain[16:]], target.vocabulary, least=1)
    settings = RapidSettings("none", temperature=0.0)
    assert "".join(decode(target, logits, store, settings, controller, max_new_tokens=32))
    learned = controller.known.sources
    assert len(learned) > 1 and not any(source.drafts for source in learned)
    assert sum(its.judged for its in learned.values()) > 4


def test_a_window_keeps_the_sinks_and_the_end():
    assert sinks_and_window(10, 2, 3) == [0, 1, 7, 8, 9]
    assert sinks_and_window(2, 2, 3) == [0, 1]
    with pytest.raises(InvalidInputError, match="window at least 1"):
        sinks_and_window(1, 2, 0)


def test_drafting_on_the_targets_own_keys_reads_nothing_and_with_all_of_them_is_the_target(tiny, other, forward_passes):
    rapid = generator(tiny, transfer="none", proposer="sparse", candidates=3, retrieval_budget=10_000)
    session = LongContext(DOCUMENT, rapid)
    counts = forward_passes(tiny.model)
    out = session.ask("zzz", max_new_tokens=12)  # nothing is near: head and tail of the document, here all of it
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


def test_a_drafter_that_catches_up_proposes_what_it_would_have_proposed(tiny, monkeypatch):
    """After plain steps, after a refusal, and where there is nothing to catch up with."""
    prompt, drawing = [5, 6, 7, 8], Drawing(0.0)
    generated = torch.randint(1000, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def drafter():
        model = ModelProposer(CachedModel(tiny, 64, 1000), prompt)
        assert model.propose(generated, 3, drawing) is None  # its prompt was not read: nothing happens
        assert model.model.length == 0
        model.prepare()
        return model

    late = drafter()
    for upto, behind in ((2, False), (9, True), (10, False), (12, False), (30, True)):
        made = late.propose(generated[:upto], 3, drawing)
        assert (made.catch_up_seconds > 0) == behind
        fresh = drafter()  # reads everything with its first candidate
        monkeypatch.setattr(proposers, "_LAG", 1000)
        want = fresh.propose(generated[:upto], 3, drawing)
        monkeypatch.undo()
        assert torch.equal(made.tokens, want.tokens)
        assert torch.allclose(made.probabilities, want.probabilities, atol=1e-5)


def run_controller(draft, plain, extra, accept, rounds=400, jump=0.0, candidates="auto", slower=()):
    """(mean γ, tokens per second over those of plain decoding) of a decoder with these costs.

    ``jump``: what a step of several tokens costs beside them. ``slower``: rounds in which the machine takes twice the time.
    """
    controller, chosen, tokens, seconds, plain_seconds = Controller(candidates), [], 0, 0.0, 0.0
    random = torch.Generator().manual_seed(0)
    for i in range(rounds):
        count = controller.next()
        accepted = 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept:
            accepted += 1
        pace = 2.0 if i in slower else 1.0
        verify = plain + (jump + extra * count if count else 0.0)
        controller.observe(count, accepted, pace * draft * count, pace * verify)
        chosen.append(count)
        tokens += accepted + 1
        seconds += pace * (draft * count + verify)
        plain_seconds += pace * plain * (accepted + 1)
    return sum(chosen) / rounds, plain_seconds / seconds


def test_the_controller_drafts_where_it_pays_and_stops_where_it_does_not():
    mean, speed = run_controller(draft=0.02, plain=0.2, extra=0.01, accept=0.8)
    assert mean > 4 and speed > 2
    for accept in (0.1, 0.5):
        mean, speed = run_controller(draft=0.2, plain=0.2, extra=0.05, accept=accept)
        assert mean < 0.3 and speed > 0.95


def test_the_controller_finds_the_best_gamma_where_several_tokens_cost_more_than_their_sum():
    """Measured at 16k tokens on two cores: one token 87 ms, two 121, and then 14 a candidate, which takes 26 to draft."""
    costs = {"draft": 0.026, "plain": 0.087, "extra": 0.014, "jump": 0.025}
    for accept in (0.85, 0.93):
        _, found = run_controller(**costs, accept=accept)
        best = max(run_controller(**costs, accept=accept, candidates=count)[1] for count in range(1, 12))
        assert best > 1.15 and found > 0.93 * best
    _, found = run_controller(**costs, accept=0.5)
    assert found > 0.96


def test_the_controller_notices_that_the_machine_changed_its_speed():
    costs = {"draft": 0.05, "plain": 0.1, "extra": 0.02, "jump": 0.02}
    _, calm = run_controller(**costs, accept=0.6)
    _, found = run_controller(**costs, accept=0.6, slower=range(3, 60))  # a plain step seems dear, then all are cheap
    assert calm > 0.95 and found > 0.9


def test_the_controller_tries_again_when_drafting_did_not_pay():
    controller, random = Controller("auto"), torch.Generator().manual_seed(0)
    chosen = []
    for i in range(900):
        count, accepted = controller.next(), 0
        while accepted < count and float(torch.rand(1, generator=random)) < (0.1 if i < 100 else 0.95):
            accepted += 1
        controller.observe(count, accepted, 0.02 * count, 0.1 + (0.02 + 0.01 * count if count else 0.0))
        chosen.append(count)
    assert sum(chosen[50:100]) < 10  # seldom while nothing is accepted
    assert sum(chosen[-100:]) > 300  # and often when everything is


def test_every_source_is_judged_by_itself():
    """A source that is nearly always right, one that never is, and a model that is not worth its cost, in turns."""
    good, bad = Source("good", 0.4, drafts=False), Source("bad", 0.9, drafts=False)
    accept, draft = {good: 0.97, bad: 0.0, MODEL: 0.5}, {good: 0.0, bad: 0.0, MODEL: 0.1}
    controller, random = Controller("auto"), torch.Generator().manual_seed(0)
    chosen: dict = {source: [] for source in accept}
    lost = spent = 0.0
    for i in range(600):
        source = (good, bad, MODEL)[i % 3]
        count, accepted = controller.next(source), 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept[source]:
            accepted += 1
        seconds = draft[source] * count, 0.1 + (0.02 + 0.01 * count if count else 0.0)
        controller.observe(count, accepted, *seconds, source=source)
        chosen[source].append(count)
        if i >= 100:
            spent += sum(seconds)
            lost += max(0.0, sum(seconds) - 0.1 * (accepted + 1)) if source is not good else 0.0
    assert sum(chosen[good][30:]) > 8 * len(chosen[good][30:])
    assert sum(chosen[bad][30:]) + sum(chosen[MODEL][30:]) < 0.5 * len(chosen[bad][30:])
    assert 0 < lost < 0.03 * spent  # all trials of what does not pay together
    again = controller.known.for_another_context()
    assert again.of(good).acceptance > 0.9 and again.of(good).rounds == 0 < controller.known.of(good).rounds


def test_a_line_through_rounds_of_one_gamma_begins_at_the_guess():
    line = Line()
    for _ in range(3):
        line = line.with_round(2, 0.14)
    assert line.at(0, 0.1) == pytest.approx(0.1) and line.at(6, 0.1) == pytest.approx(0.22)
    for count in (4, 8, 1, 4, 8, 1) * 8:
        line = line.with_round(count, 0.15 + 0.01 * count)
    assert line.at(6, 0.1) == pytest.approx(0.21, rel=0.02)  # what was measured counts more
    for count in (4, 8, 1, 4, 8, 1) * 8:
        line = line.with_round(count, 0.3 + 0.02 * count)
    assert line.at(6, 0.1) == pytest.approx(0.42, rel=0.03)  # and the latest most


def test_a_step_that_was_interrupted_does_not_start_drafting():
    controller = Controller("auto")
    for count, accepted, seconds in ((0, 0, 0.1), (0, 0, 0.1), (2, 0, 0.2), (2, 0, 0.2)):
        controller.observe(count, accepted, 0.1 * count, seconds)
    assert controller.next() == 0
    controller.observe(0, 0, 0.0, 5.0)
    assert controller.known.plain < 0.12


def run_starting(drafter_prompt, answer, *, accept, known=None, limit=256):
    """Seconds of a generation of ``answer`` tokens whose drafter must read its prompt first, over plain decoding's."""
    draft, plain, extra, reading = 0.02, 0.1, 0.005, 0.002
    controller = Controller("auto", known)
    random = torch.Generator().manual_seed(0)
    tokens, seconds, unread = 0, 0.0, drafter_prompt
    while tokens < answer:
        count = controller.next()
        if count and unread and controller.may_start(unread, reading, limit - tokens):
            seconds += reading * unread
            controller.started(unread, reading * unread)
            unread = 0
        count = 0 if unread else count
        accepted = 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept:
            accepted += 1
        controller.observe(count, accepted, draft * count, plain + extra * count)
        tokens += accepted + 1
        seconds += plain + (draft + extra) * count
    controller.finished(tokens)
    return seconds / (tokens * plain), unread == 0, controller.known


def test_a_drafters_own_prompt_is_weighed_before_it_is_read():
    ratio, started, known = run_starting(512, 128, accept=0.0, limit=128)
    assert not started and ratio == pytest.approx(1.0)  # 1 s of reading for a 12.8 s answer: too dear to try
    ratio, started, known = run_starting(512, 1024, accept=0.0, limit=1024)
    assert started and ratio < 1.05  # tried, and of no use
    ratio, started, _ = run_starting(512, 128, accept=0.0, limit=128, known=known.for_another_context())
    assert not started and ratio == pytest.approx(1.0)  # remembered
    _, started, known = run_starting(512, 1024, accept=0.9, limit=1024)
    ratio, again, _ = run_starting(512, 128, accept=0.9, limit=128, known=known.for_another_context())
    assert started and again and ratio < 0.6  # remembered too


def test_many_short_answers_pay_for_one_trial():
    known, ratios = None, []
    for _ in range(12):
        ratio, _, known = run_starting(512, 64, accept=0.9, limit=64, known=known)
        ratios.append(ratio)
    assert ratios[0] == pytest.approx(1.0) and ratios[-1] < 0.8


@pytest.mark.parametrize("candidates", [-1, [3, -2], [], True])
def test_impossible_numbers_of_candidates_are_refused(candidates):
    with pytest.raises(InvalidInputError, match="candidates must be"):
        Controller(candidates)


# --- sessions -----------------------------------------------------------------------------------------------


def test_the_next_question_pays_for_its_own_tokens_only(tiny, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    counts = forward_passes(tiny.model)
    first = session.ask("who?", max_new_tokens=3).text
    assert max(counts) < 20 < session.tokens
    session.ask("a different and longer question about the lamps?", max_new_tokens=3)
    assert session.ask("who?", max_new_tokens=3).text == first


def test_the_first_token_comes_before_the_drafter_reads(tiny, other, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, other, candidates=3))
    counts = forward_passes(other.model)
    stream = session.stream("who?", max_new_tokens=5)
    next(stream)
    assert counts == []
    list(stream)
    assert counts


def test_a_saved_session_continues_with_identical_logits(tiny, tmp_path):
    session = LongContext(DOCUMENT, generator(tiny, candidates=3))
    session.retrieve("bell")
    session.save(tmp_path / "session.safetensors")
    loaded = LongContext.load(tmp_path / "session.safetensors", generator(tiny, candidates=3))
    ids = tiny.encoder.encode_text("who keeps it?")
    assert torch.equal(session._target.feed(ids), loaded._target.feed(ids))
    assert loaded.ask("who?", max_new_tokens=8).text == session.ask("who?", max_new_tokens=8).text
    assert loaded.retrieve("bell") == session.retrieve("bell")


def test_a_session_of_another_model_version_or_none_at_all_is_refused(tiny, other, tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    LongContext(DOCUMENT, generator(tiny)).save(file)
    with pytest.raises(InvalidInputError, match="was made with"):
        LongContext.load(file, generator(other))
    monkeypatch.setattr("specrag.rapid.session.SESSION_VERSION", 2)
    with pytest.raises(InvalidInputError, match="version 1, this is 2"):
        LongContext.load(file, generator(tiny))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match="damaged"):
        LongContext.load(file, generator(tiny))
    with pytest.raises(ModelNotFoundError, match="no saved session"):
        LongContext.load(tmp_path / "none", generator(tiny))


def test_retrieved_chunks_stand_in_document_order_within_the_budget(smollm2, minilm, questions):
    passages = [p.text for q in questions for p in q.passages]
    rapid = RapidGenerator(smollm2, embedder=minilm, retrieval_budget=700)
    session = LongContext.unread(rapid, "", " ".join(passages[:3]), "\ue0f2")
    session._context = smollm2.encoder.encode_text("\n\n".join(passages))  # retrieval alone: no need to read it all
    gold = questions[3].passages[questions[3].gold[0]].text
    tokens, confidence = session.retrieve(questions[3].question)
    assert len(tokens) <= 700 and 0 < confidence <= 1
    assert gold[:60] in smollm2.tokenizer.decode(tokens)
    positions = [_find(session._context, tokens[at : at + 40]) for at in (0, len(tokens) - 40)]
    assert positions == sorted(positions) and -1 not in positions


def _find(text, piece):
    return next((i for i in range(len(text)) if text[i : i + len(piece)] == piece), -1)


def test_retrieving_nothing_falls_back_to_head_and_tail_and_says_so(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=2, retrieval_budget=100))
    session._pieces = None
    stats = RapidStats()
    session.rapid.embedder.embed = lambda texts: torch.eye(2)[[0] * len(texts) if len(texts) > 1 else [1]].numpy()
    tokens, confidence = session.retrieve("zzz", stats)
    assert tokens == [*session._context[:50], *session._context[-50:]] and confidence == 0
    assert "nothing retrieved" in stats.notes[0]


def test_the_budget_follows_the_design(tiny):
    assert generator(tiny).budget(1000) == 512
    assert generator(tiny).budget(16_000) == 1000
    assert generator(tiny, retrieval_budget=99).budget(16_000) == 99


def test_chat_messages_the_last_user_turn_is_the_query(tiny):
    rapid = generator(tiny, transfer="none", candidates=3)
    messages = [{"role": "user", "content": DOCUMENT}, {"role": "assistant", "content": "Read."}]
    out = rapid.generate([*messages, {"role": "user", "content": "who?"}], max_new_tokens=12)
    rendered = tiny.tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "who?"}], tokenize=False, add_generation_prompt=True
    )
    cut = rendered.rindex("who?")
    ids = torch.tensor([tiny.encoder.encode_text(rendered[:cut]) + tiny.encoder.encode_text(rendered[cut:])])
    with torch.inference_mode():
        made = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert out.text == tiny.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(InvalidInputError, match="last message must be the user's"):
        rapid.generate(messages)
    with pytest.raises(InvalidInputError, match="no context before the query"):
        rapid.generate([{"role": "user", "content": "who?"}])


# --- bad input ------------------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused(tiny, wordpiece_lm):
    with pytest.raises(InvalidInputError, match="RAPID needs one tokenizer for both"):
        RapidGenerator(tiny, wordpiece_lm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transfer_strength": -1.0}, "transfer strength must be 0 or more"),
        ({"transfer_strength": "much"}, "a number or 'auto'"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"candidates": -1}, "candidates must be 0 or more"),
        ({"transfer": "all"}, "transfer must be one of"),
        ({"tail": "fat"}, "tail must be one of"),
        ({"top_p": 0.0}, "top_p in"),
        ({"proposer": "oracle"}, "proposer must be"),
        ({"retrieval_budget": 0}, "retrieval_budget must be at least 1"),
    ],
)
def test_settings_are_checked_at_construction(tiny, options, message):
    with pytest.raises(InvalidInputError, match=message):
        generator(tiny, **options)


def test_unusable_texts_and_questions_are_refused(tiny):
    rapid = generator(tiny, retrieval_budget=40)
    with pytest.raises(InvalidInputError, match="context is empty"):
        LongContext(" \n", rapid)
    with pytest.raises(InvalidInputError, match=r"the context has \d+ tokens, .* 8192 positions.*RoPE scaling"):
        LongContext("word " * 9000, rapid)
    session = LongContext(DOCUMENT, rapid)
    for question, options, message in (
        (" ", {}, "question is empty"),
        ("why " * 60, {}, "the retrieval budget is 40"),
        ("who?", {"max_new_tokens": 8000}, "has 8192"),
        ("who?", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("who?", {"stop": [""]}, "stop string must not be empty"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            session.ask(question, **options)
    assert session.ask("who?", max_new_tokens=2).stats.tokens == 2


def test_out_of_memory_during_prefill_is_said_and_the_generator_stays_usable(tiny, monkeypatch):
    rapid = generator(tiny, candidates=0)
    real, calls = CachedModel._forward, itertools.count()

    def failing(self, ids, keep):
        if next(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, ids, keep)

    monkeypatch.setattr(CachedModel, "_forward", failing)
    with pytest.raises(ModelError, match="out of memory while reading"):
        LongContext(DOCUMENT * 4, rapid)  # several chunks: the second fails
    assert LongContext("A short text.", rapid).ask("who?", max_new_tokens=2).stats.tokens == 2


def test_a_failed_chunk_leaves_the_cache_as_it_was(tiny):
    model = CachedModel(tiny, 64, 100)
    model.prefill([1, 2, 3])

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.prefill([4, 5], progress=fail)
    assert model.length == 3
