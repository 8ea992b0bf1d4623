"""The number of candidates per round: fixed, replayed, and adaptive against simulated costs."""

import pytest
import torch

from specrag.errors import InvalidInputError
from specrag.rapid.draft_length import (
    MODEL,
    AdaptiveLength,
    Estimates,
    Experience,
    FixedLength,
    Line,
    ReplayedLength,
    Round,
    Source,
    draft_length,
)

# --- fixed and replayed ---------------------------------------------------------------------------------


def test_a_number_stays_and_a_schedule_is_replayed_until_its_last_entry_stays():
    fixed, replayed = draft_length(4), draft_length([3, 0, 5])
    assert isinstance(fixed, FixedLength) and isinstance(replayed, ReplayedLength)
    chosen = []
    for _ in range(5):
        chosen.append((fixed.next(), replayed.next()))
        for length in (fixed, replayed):
            length.observe(Round(length.next(), 0, 1.0, 1.0))
    assert chosen == [(4, 3), (4, 0), (4, 5), (4, 5), (4, 5)]
    assert fixed.may_start(10_000, 1.0, 1) and replayed.may_start(10_000, 1.0, 1)  # they were told to draft


def test_the_adaptive_length_learns_into_the_estimates_that_it_is_given():
    known = Estimates()
    length = draft_length("auto", known)
    assert isinstance(length, AdaptiveLength) and length.next() == 0
    length.observe(Round(0, 0, 0.0, 0.5))
    length.finished(7)
    assert (known.plain, known.plain_rounds, known.tokens) == (0.5, 1, 7.0)


@pytest.mark.parametrize("candidates", [-1, [3, -2], [], True, "many", 2.5])
def test_impossible_numbers_of_candidates_are_refused(candidates):
    with pytest.raises(InvalidInputError, match="candidates must be"):
        draft_length(candidates)


# --- what is measured -----------------------------------------------------------------------------------


def test_candidates_after_the_first_rejection_say_nothing_of_the_acceptance():
    its = Experience(0.5)
    assert its.judging(4, 4).judged == 4 and its.judging(4, 1).judged == 2 and its.judging(0, 0) == its
    assert its.judging(4, 4).acceptance > its.judging(4, 1).acceptance > its.judging(4, 0).acceptance
    assert its.judging(1, 1).acceptance == pytest.approx(0.5 + (1 - 0.5) / 9)  # the prior weighs as eight candidates
    for _ in range(200):
        its = its.judging(2, 1)
    assert its.acceptance == pytest.approx(0.5, abs=0.03)


def test_the_expected_rate_is_the_geometric_sum_over_the_expected_seconds():
    known = Estimates(sources={MODEL: Experience(0.5)}, plain=0.1)
    for count in (2, 4, 2, 4):
        known.verify = known.verify.with_round(count, 0.1 + 0.05 * count)
    assert known.rate(0, MODEL) == pytest.approx(1 / 0.1)
    seconds = known.seconds(3, MODEL)
    assert seconds == pytest.approx(0.25, rel=0.1)
    assert known.rate(3, MODEL) == pytest.approx((1 + 0.5 + 0.25 + 0.125) / seconds)
    assert known.best(MODEL) == max(range(1, 13), key=lambda count: known.rate(count, MODEL))


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


# --- the adaptive length against simulated costs --------------------------------------------------------


def run_length(draft, plain, extra, accept, rounds=400, jump=0.0, candidates="auto", slower=()):
    """(mean γ, tokens per second over those of plain decoding) of a decoder with these costs.

    ``jump``: what a step of several tokens costs beside them. ``slower``: rounds in which the machine is half as fast.
    """
    length, chosen, tokens, seconds, plain_seconds = draft_length(candidates), [], 0, 0.0, 0.0
    random = torch.Generator().manual_seed(0)
    for i in range(rounds):
        count = length.next()
        accepted = 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept:
            accepted += 1
        pace = 2.0 if i in slower else 1.0
        verify = plain + (jump + extra * count if count else 0.0)
        length.observe(Round(count, accepted, pace * draft * count, pace * verify))
        chosen.append(count)
        tokens += accepted + 1
        seconds += pace * (draft * count + verify)
        plain_seconds += pace * plain * (accepted + 1)
    return sum(chosen) / rounds, plain_seconds / seconds


def test_the_adaptive_length_drafts_where_it_pays_and_stops_where_it_does_not():
    mean, speed = run_length(draft=0.02, plain=0.2, extra=0.01, accept=0.8)
    assert mean > 4 and speed > 2
    for accept in (0.1, 0.5):
        mean, speed = run_length(draft=0.2, plain=0.2, extra=0.05, accept=accept)
        assert mean < 0.3 and speed > 0.95


def test_the_adaptive_length_finds_the_best_gamma_where_several_tokens_cost_more_than_their_sum():
    """Measured at 16k tokens on two cores: one token 87 ms, two 121, then 14 per candidate, which takes 26 to draft."""
    costs = {"draft": 0.026, "plain": 0.087, "extra": 0.014, "jump": 0.025}
    for accept in (0.85, 0.93):
        _, found = run_length(**costs, accept=accept)
        best = max(run_length(**costs, accept=accept, candidates=count)[1] for count in range(1, 12))
        assert best > 1.15 and found > 0.93 * best
    _, found = run_length(**costs, accept=0.5)
    assert found > 0.96


def test_the_adaptive_length_notices_that_the_machine_changed_its_speed():
    costs = {"draft": 0.05, "plain": 0.1, "extra": 0.02, "jump": 0.02}
    _, calm = run_length(**costs, accept=0.6)
    _, found = run_length(**costs, accept=0.6, slower=range(3, 60))  # a plain step seems dear, then all are cheap
    assert calm > 0.95 and found > 0.9


def test_the_adaptive_length_tries_again_when_drafting_did_not_pay():
    length, random = AdaptiveLength(), torch.Generator().manual_seed(0)
    chosen = []
    for i in range(900):
        count, accepted = length.next(), 0
        while accepted < count and float(torch.rand(1, generator=random)) < (0.1 if i < 100 else 0.95):
            accepted += 1
        length.observe(Round(count, accepted, 0.02 * count, 0.1 + (0.02 + 0.01 * count if count else 0.0)))
        chosen.append(count)
    assert sum(chosen[50:100]) < 10  # seldom while nothing is accepted
    assert sum(chosen[-100:]) > 300  # and often when everything is


def test_every_source_is_judged_by_itself():
    """A source that is nearly always right, one that never is, and a model that is not worth its cost, in turns."""
    good, bad = Source("good", 0.4, drafts=False), Source("bad", 0.9, drafts=False)
    accept, draft = {good: 0.97, bad: 0.0, MODEL: 0.5}, {good: 0.0, bad: 0.0, MODEL: 0.1}
    length, random = AdaptiveLength(), torch.Generator().manual_seed(0)
    chosen: dict = {source: [] for source in accept}
    lost = spent = 0.0
    for i in range(600):
        source = (good, bad, MODEL)[i % 3]
        count, accepted = length.next(source), 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept[source]:
            accepted += 1
        seconds = draft[source] * count, 0.1 + (0.02 + 0.01 * count if count else 0.0)
        length.observe(Round(count, accepted, *seconds, source=source))
        chosen[source].append(count)
        if i >= 100:
            spent += sum(seconds)
            lost += max(0.0, sum(seconds) - 0.1 * (accepted + 1)) if source is not good else 0.0
    assert sum(chosen[good][30:]) > 8 * len(chosen[good][30:])
    assert sum(chosen[bad][30:]) + sum(chosen[MODEL][30:]) < 0.5 * len(chosen[bad][30:])
    assert 0 < lost < 0.03 * spent  # all trials of what does not pay together
    again = length.known.for_another_context()
    assert again.of(good).acceptance > 0.9 and again.of(good).rounds == 0 < length.known.of(good).rounds


def test_a_step_that_was_interrupted_does_not_start_drafting():
    length = AdaptiveLength()
    for count, accepted, seconds in ((0, 0, 0.1), (0, 0, 0.1), (2, 0, 0.2), (2, 0, 0.2)):
        length.observe(Round(count, accepted, 0.1 * count, seconds))
    assert length.next() == 0
    length.observe(Round(0, 0, 0.0, 5.0))
    assert length.known.plain < 0.12


def run_starting(drafter_prompt, answer, *, accept, known=None, limit=256):
    """Seconds of a generation of ``answer`` tokens whose drafter must read its prompt first, over plain decoding's."""
    draft, plain, extra, reading = 0.02, 0.1, 0.005, 0.002
    length = AdaptiveLength(known)
    random = torch.Generator().manual_seed(0)
    tokens, seconds, unread = 0, 0.0, drafter_prompt
    while tokens < answer:
        count = length.next()
        if count and unread and length.may_start(unread, reading, limit - tokens):
            seconds += reading * unread
            length.started(unread, reading * unread)
            unread = 0
        count = 0 if unread else count
        accepted = 0
        while accepted < count and float(torch.rand(1, generator=random)) < accept:
            accepted += 1
        length.observe(Round(count, accepted, draft * count, plain + extra * count))
        tokens += accepted + 1
        seconds += plain + (draft + extra) * count
    length.finished(tokens)
    return seconds / (tokens * plain), unread == 0, length.known


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


# --- the width of trees ---------------------------------------------------------------------------------


def run_widths(widths, *, accept, sibling, extra, rounds=300):
    """(mean γ, mean width of rounds with candidates, tokens per second over those of plain decoding)."""
    draft, plain, jump = 0.02, 0.1, 0.02
    length, random = draft_length("auto", widths=widths), torch.Generator().manual_seed(0)
    counts, chosen, tokens, seconds = [], [], 0, 0.0

    def happens(chance):
        return float(torch.rand(1, generator=random)) < chance

    for _ in range(rounds):
        count = length.next()
        width, path, taken = length.width, 0, 0
        while path < count and happens(accept):
            path += 1
        if path < count:
            taken = next((i for i in range(1, width) if happens(sibling)), 0)
        accepted = path + (taken > 0)
        verify = plain + (jump + extra * count * width if count else 0.0)
        length.observe(Round(count, accepted, draft * count, verify, width=width, sibling=taken))
        counts.append(count)
        chosen += [width] if count else []
        tokens += accepted + 1
        seconds += draft * count + verify
    return sum(counts) / rounds, sum(chosen) / max(len(chosen), 1), tokens * plain / seconds


def test_trees_are_as_wide_as_their_siblings_and_their_rows_are_worth():
    _, width, found = run_widths((1, 2, 3), accept=0.6, sibling=0.6, extra=0.002)
    narrow, wide = (run_widths((w,), accept=0.6, sibling=0.6, extra=0.002)[2] for w in (1, 3))
    assert width > 2 and wide > 1.15 * narrow and found > 0.95 * wide
    _, width, found = run_widths((1, 2, 3), accept=0.8, sibling=0.05, extra=0.02)
    narrow, wide = (run_widths((w,), accept=0.8, sibling=0.05, extra=0.02)[2] for w in (1, 3))
    assert width < 1.3 and narrow > 1.15 * wide and found > 0.95 * narrow
    count, _, found = run_widths((1, 2, 3), accept=0.05, sibling=0.05, extra=0.02)
    assert count < 0.3 and found > 0.95  # no tree pays: plain decoding


def test_siblings_are_judged_one_after_the_other_until_one_is_taken():
    known = Estimates(plain=0.1)
    for _ in range(2):
        known.observe(Round(2, 2, 0.1, 0.1, width=3))  # all of the path was accepted: siblings had no turn
    assert known.of(MODEL).siblings == 0
    known.observe(Round(2, 1, 0.1, 0.1, width=3, sibling=1))
    its = known.of(MODEL)
    assert (its.judged, its.siblings) == (5, 1)  # the path's first candidate was rejected: the sibling is accepted
    known.observe(Round(2, 1, 0.1, 0.1, width=3))
    assert known.of(MODEL).siblings == 3 and known.of(MODEL).sibling < its.sibling
    for _ in range(300):
        known.observe(Round(1, 1, 0.1, 0.1, width=3, sibling=2))
    assert known.of(MODEL).sibling == pytest.approx(0.5, abs=0.05) and known.of(MODEL).acceptance < 0.05


def test_the_rate_of_a_tree_counts_the_token_after_a_taken_sibling():
    known = Estimates(sources={MODEL: Experience(0.5, sibling=0.25)}, plain=0.1)
    for rows in (2, 8, 2, 8):
        known.verify = known.verify.with_round(rows, 0.1 + 0.01 * rows)
    assert known.seconds(2, MODEL, 3) == pytest.approx(known.seconds(6, MODEL))
    tokens = 1 + 0.5 + 0.25 + (1 - 0.25) * (1 - 0.75**2)
    assert known.rate(2, MODEL, 3) == pytest.approx(tokens / known.seconds(2, MODEL, 3))
    assert known.rate(2, MODEL, 1) == pytest.approx(1.75 / known.seconds(2, MODEL))


def test_what_a_model_did_not_draft_is_no_tree():
    length = AdaptiveLength(Estimates(plain=0.1, plain_rounds=2), widths=(2, 3))
    length.next(Source("match", 0.9, drafts=False))
    assert length.width == 1
    length.next(MODEL)
    assert length.width >= 2


@pytest.mark.parametrize(("sibling", "width"), [(0.04, 1), (0.1, 2)])
def test_a_wider_tree_must_be_expected_to_be_three_per_cent_faster(sibling, width):
    """Rows cost nothing here and half of the candidates are accepted: siblings of this chance gain 2 % and 5 %."""
    drafted = Experience(0.5, sibling=sibling, draft=Line().with_round(2, 0.0), rounds=9)
    known = Estimates({MODEL: drafted}, plain=0.1, plain_rounds=9)
    for rows in (2, 8):
        known.verify = known.verify.with_round(rows, 0.13)
    length = AdaptiveLength(known, widths=(1, 2))
    assert length.next(MODEL) > 0 and length.width == width
