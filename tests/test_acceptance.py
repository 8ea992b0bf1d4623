"""RAPID's mathematics: closed forms against enumeration, samplers against closed forms."""

import pytest
import torch
from scipy import stats

from specrag.engine.sampling import to_probabilities
from specrag.errors import InvalidInputError
from specrag.rapid.acceptance import (
    TAILS,
    TRANSFERS,
    accept,
    accept_greedy,
    acceptance_probability,
    augmented_target,
    output_distribution,
    residual,
)

VOCABULARY = 7
# (seed, η): 24 cases, among them no transfer, weak and overwhelming transfer.
CASES = [(seed, strength) for seed in range(8) for strength in (0.0, 2.0, 10.0)]


def case(seed: int, strength: float, tail="drafter"):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(VOCABULARY, generator=generator) * 2
    q = (torch.randn(VOCABULARY, generator=generator) * 2).softmax(-1)
    return z, z.softmax(-1), q, augmented_target(z, q, strength, 1.0, tail)


def enumerated(p, q, p_hat, transfer):
    """The law of the emitted token by going through every candidate and both outcomes, in plain Python."""
    n = len(p)
    p, q, p_hat = p.double().tolist(), q.double().tolist(), p_hat.double().tolist()
    if transfer == "none":
        p_hat = p
    left = {
        "none": [max(p[i] - q[i], 0) for i in range(n)],
        "rapid": [max(p[i] - p_hat[i], p[i] - q[i], 0) for i in range(n)],
        "augmented": [max(p_hat[i] - q[i], 0) for i in range(n)],
    }[transfer]
    mass = sum(left)
    out = [0.0] * n
    for x in range(n):
        keep = min(1.0, p_hat[x] / q[x])
        out[x] += q[x] * keep
        for y in range(n):
            if mass > 0:
                out[y] += q[x] * (1 - keep) * left[y] / mass
    return torch.tensor(out)


def test_the_example_of_the_modules_docstring_holds():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    kept = acceptance_probability(p.expand(2, 2), q.expand(2, 2), torch.tensor([0, 1]))
    assert torch.allclose(kept, torch.tensor([0.5 / 0.8, 1.0])) and torch.equal(
        residual(p, q, p, "none"), torch.eye(2)[1]
    )
    assert torch.allclose(output_distribution(p, q, p, "none"), p)


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_closed_form_equals_enumeration(transfer, tail):
    for seed, strength in CASES:
        _, p, q, p_hat = case(seed, strength, tail)
        made = output_distribution(p, q, p_hat, transfer)
        assert torch.allclose(made, enumerated(p, q, p_hat, transfer).float(), atol=1e-6)
        assert float(made.sum()) == pytest.approx(1, abs=1e-5)


def test_without_transfer_the_output_is_the_target_and_augmented_is_p_hat():
    for seed, strength in CASES:
        _, p, q, p_hat = case(seed, strength)
        assert torch.allclose(output_distribution(p, q, p_hat, "none"), p, atol=1e-6)
        assert torch.allclose(output_distribution(p, q, p_hat, "augmented"), p_hat, atol=1e-6)


def test_rapid_emits_more_than_the_target_exactly_where_drafter_and_augmented_target_do():
    surplus = 0
    for seed, strength in CASES:
        _, p, q, p_hat = case(seed, strength)
        out = output_distribution(p, q, p_hat, "rapid")
        more = out > p + 1e-6
        assert not (more & ~((q > p) & (p_hat > p))).any()
        surplus += int(more.any())
    assert surplus > 5


def draws_of(p, q, p_hat, transfer, count=20_000, seed=0):
    """``count`` emitted tokens of the real sampler, in rounds of eight candidates; bonus tokens are not counted.

    Every emitted token follows the closed form whether a round ends with it or not, so they are independent draws.
    """
    torch.manual_seed(seed)
    rounds = torch.multinomial(q, 8 * count, replacement=True).view(count, 8)
    run = torch.func.vmap(
        lambda candidates: accept(p.expand(9, -1), q.expand(8, -1), p_hat.expand(8, -1), candidates, transfer),
        randomness="different",
    )
    accepted, following = run(rounds)
    emitted = torch.cat([rounds, following[:, None]], dim=1).scatter(1, accepted[:, None], following[:, None])
    ends = torch.where(accepted < 8, accepted, 7)[:, None]  # the last position of the round that counts
    return torch.bincount(emitted[torch.arange(9) <= ends][:count], minlength=len(p)).float()


def draws_with_residual(wrong, p, q, p_hat, count=20_000, seed=0):
    """``count`` tokens of a sampler that draws what replaces a rejected candidate from ``wrong``."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.multinomial(q, count, replacement=True, generator=generator)
    kept = torch.rand(count, generator=generator) < acceptance_probability(
        p_hat.expand(count, -1), q.expand(count, -1), candidates
    )
    following = torch.multinomial(wrong, count, replacement=True, generator=generator)
    return torch.bincount(torch.where(kept, candidates, following), minlength=len(p)).float()


def p_value(counts, expected):
    expected = expected.double() / expected.double().sum() * counts.sum().double()
    enough = expected >= 5  # the chi-square approximation's usual demand; the rest is pooled
    observed = torch.cat([counts.double()[enough], counts.double()[~enough].sum()[None]])
    wanted = torch.cat([expected[enough], expected[~enough].sum()[None]])
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return stats.chisquare(observed.numpy(), wanted.numpy()).pvalue


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_the_sampler_draws_from_the_closed_form(transfer):
    for seed, strength in CASES:
        _, p, q, p_hat = case(seed, strength)
        counts = draws_of(p, q, p_hat, transfer, seed=seed)
        assert p_value(counts, output_distribution(p, q, p_hat, transfer)) > 0.001, (seed, strength)


@pytest.mark.parametrize(("transfer", "wrong"), [("rapid", "none"), ("augmented", "rapid"), ("none", "target")])
def test_the_same_test_notices_a_wrong_residual(transfer, wrong):
    noticed = 0
    for seed in range(8):
        _, p, q, p_hat = case(seed, 10.0)
        p_hat = p if transfer == "none" else p_hat
        bad = p if wrong == "target" else residual(p, q, p_hat, wrong)
        counts = draws_with_residual(bad, p, q, p_hat, seed=seed)
        noticed += p_value(counts, output_distribution(p, q, p_hat, transfer)) < 1e-6
    assert noticed >= 6


def test_a_run_of_candidates_is_accepted_from_the_left():
    p = torch.eye(4)[[0, 1, 2, 3]]  # the target is certain of 0, 1, 2 and then 3
    q = torch.full((3, 4), 0.25)
    for candidates, accepted, following in (([0, 1, 2], 3, 3), ([0, 3, 2], 1, 1), ([2, 1, 2], 0, 0)):
        for made in (
            accept(p, q, p[:-1], torch.tensor(candidates), "none"),
            accept_greedy(p, p[:-1], torch.tensor(candidates)),
        ):
            assert (int(made[0]), int(made[1])) == (accepted, following)


def test_the_bonus_token_comes_from_where_it_is_asked_to():
    p = torch.eye(3)[[0, 1]]
    bonus = torch.tensor([0.0, 0.0, 1.0])
    made = accept(p, torch.full((1, 3), 1 / 3), p[:-1], torch.tensor([0]), "augmented", bonus)
    assert (int(made[0]), int(made[1])) == (1, 2)


def test_candidates_without_a_model_leave_the_targets_distribution_unchanged():
    for seed in range(4):
        _, p, _, _ = case(seed, 0.0)
        for candidate in (int(p.argmin()), int(p.argmax())):
            q = torch.eye(VOCABULARY)[candidate]
            # For a one-hot q no knowledge is transferred, whatever η: p̂ = p.
            for transfer in TRANSFERS:
                assert torch.allclose(output_distribution(p, q, p, transfer), p, atol=1e-6)
            counts = draws_of(p, q, p, "rapid", seed=seed)
            assert p_value(counts, p) > 0.001


def test_with_a_one_hot_drafter_transfer_would_copy_blindly():
    z = torch.tensor([9.0, 0.0, 0.0])  # the reason for η = 0 there: the target holds the candidate at 1e-4
    q = torch.tensor([0.0, 1.0, 0.0])
    p_hat = augmented_target(z, q, 10.0, 1.0)
    assert float(acceptance_probability(p_hat, q, torch.tensor(1))) > 0.3
    assert float(acceptance_probability(z.softmax(-1), q, torch.tensor(1))) < 2e-4


def test_augmentation_follows_the_formula_of_each_tail():
    z, p, q, _ = case(3, 0.0)
    temperature, strength = 0.7, 4.0
    p = (z / temperature).softmax(-1)
    shifted = ((z + strength * temperature * (q - p)) / temperature).softmax(-1)
    assert torch.allclose(augmented_target(z, q, strength, temperature, "none"), shifted, atol=1e-6)
    literal = torch.where(shifted < 0.1 * shifted.max(), p, shifted)
    assert torch.allclose(augmented_target(z, q, strength, temperature, "target"), literal / literal.sum(), atol=1e-6)
    only = torch.where(q >= 0.1 * q.max(), strength * (q - p), 0.0)
    expected = (z / temperature + only).softmax(-1)
    assert torch.allclose(augmented_target(z, q, strength, temperature, "drafter"), expected, atol=1e-6)


def test_no_strength_changes_nothing_and_strength_moves_towards_the_drafter():
    for seed in range(6):
        z, p, q, _ = case(seed, 0.0)
        for tail in TAILS:
            assert torch.allclose(augmented_target(z, q, 0.0, 1.0, tail), p, atol=1e-6)
        distances = [float((augmented_target(z, q, s, 1.0, "none") - q).abs().sum()) for s in (0.0, 0.5, 1.0)]
        assert distances == sorted(distances, reverse=True)


def test_tokens_that_were_ruled_out_stay_out():
    z, _, q, _ = case(1, 0.0)
    z = z.masked_fill(z < z.median(), float("-inf"))
    p_hat = augmented_target(z, q, 10.0, 1.0)
    assert torch.isfinite(p_hat).all() and (p_hat[z == float("-inf")] == 0).all()


def test_batches_equal_single_positions_and_low_precision_is_computed_in_float32():
    cases = [case(seed, 5.0) for seed in range(4)]
    z, q = torch.stack([c[0] for c in cases]), torch.stack([c[2] for c in cases])
    assert torch.allclose(augmented_target(z, q, 5.0), torch.stack([c[3] for c in cases]))
    assert augmented_target(z.bfloat16(), q.bfloat16(), 5.0).dtype == torch.float32


@pytest.mark.parametrize(("top_k", "top_p"), [(2, 1.0), (0, 0.6), (3, 0.5), (100, 1.0)])
def test_top_k_and_top_p_keep_the_fewest_likeliest_tokens(top_k, top_p):
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    kept = (to_probabilities(logits, 1.0, top_k, top_p) > 0).tolist()
    expected = {(2, 1.0): 2, (0, 0.6): 2, (3, 0.5): 2, (100, 1.0): 4}[top_k, top_p]
    assert kept == [i < expected for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": -1.0}, "transfer strength must be 0 or more"),
        ({"strength": float("nan")}, "transfer strength"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"tail": "fat"}, "tail must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    z, _, q, _ = case(0, 0.0)
    with pytest.raises(InvalidInputError, match=message):
        augmented_target(z, q, **({"strength": 1.0} | changes))
    with pytest.raises(InvalidInputError, match="transfer must be one of"):
        residual(q, q, q, "all")
