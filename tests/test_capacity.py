"""The capacity model of docs/scaling.md, and its simulation, against what is known in closed form."""

import random
from statistics import mean

import pytest

pytest.importorskip("simpy", reason="benchmarks/_capacity.py simulates with simpy: make .venv/.dev")

from benchmarks._capacity import Part, Simulation, capacity

RETRIEVAL = Part("retrieval", 1, 1, [0.01])
DRAFTERS = Part("drafters", 2, 5, [0.3, 0.5])
VERIFIERS = Part("verifiers", 1, 5, [0.1])


def test_the_part_with_the_smallest_capacity_saturates_first():
    assert RETRIEVAL.capacity == pytest.approx(100)
    assert DRAFTERS.capacity == pytest.approx(2 / (5 * 0.4)) and VERIFIERS.capacity == pytest.approx(2)
    assert capacity([RETRIEVAL, DRAFTERS, VERIFIERS]) == (pytest.approx(1.0), DRAFTERS)


def test_devices_are_counted_up():
    assert DRAFTERS.devices_for(rate=1.0, busy=1.0) == 2
    assert DRAFTERS.devices_for(rate=1.0, busy=0.7) == 3
    assert RETRIEVAL.devices_for(rate=0.001, busy=0.7) == 1


def test_below_the_capacity_every_question_is_answered_and_devices_are_busy_as_the_model_says():
    seen = Simulation(RETRIEVAL, DRAFTERS, VERIFIERS, rate=0.5, horizon=3000).run()
    assert seen.per_second == pytest.approx(0.5, rel=0.05)
    assert seen.busy == pytest.approx({"retrieval": 0.005, "drafters": 0.5, "verifiers": 0.25}, rel=0.05)
    assert min(seen.seconds) > 0.01 + 0.9 + 0.1 - 1e-6  # one of the two drafters makes three drafts


def test_beyond_the_capacity_it_answers_what_the_model_says():
    seen = Simulation(RETRIEVAL, DRAFTERS, VERIFIERS, rate=1.5, horizon=1500).run()
    assert seen.per_second == pytest.approx(1.0, rel=0.05)
    assert seen.busy["drafters"] > 0.99 and seen.busy["verifiers"] == pytest.approx(0.5, rel=0.05)


def test_one_device_with_exponential_times_waits_as_queueing_theory_says():
    """M/M/1: a question takes 1 / (1 - 0.6) of its service time on average."""
    drawn = random.Random(0)
    times = [drawn.expovariate(1.0) for _ in range(5000)]
    average = mean(times)
    times = [one / average for one in times]
    seen = Simulation(
        Part("retrieval", 1, 1, [1e-9]),
        Part("drafters", 1, 1, times),
        Part("verifiers", 1, 0, [1.0]),
        rate=0.6,
        horizon=20_000,
    ).run()
    assert mean(seen.seconds) == pytest.approx(2.5, rel=0.1)
