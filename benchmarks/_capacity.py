"""A model of the capacity of drafters, verifiers and retrieval, and a simulation to check it.

The model: one question needs m drafts and m verifications, and one retrieval. A part with n devices, of which each does
r jobs per second, takes n · r / (jobs per question) questions per second. The smallest of these is the capacity, and
that part saturates first. The share of the time that a part is busy is the rate of the questions over its own capacity.

The simulation: questions come at random moments (a Poisson process). Each waits for its retrieval; its drafts go to the
least busy drafter, and each draft, when it is made, to the least busy verifier. How long a job takes is drawn from
measured service times. It knows nothing of the model.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import simpy


@dataclass(frozen=True)
class Part:
    """Devices that do the same work.

    Args:
        name: Of the part.
        devices: How many there are.
        jobs: How many jobs of it a question needs.
        seconds: Measured service times of a job on one device that does nothing else.
    """

    name: str
    devices: int
    jobs: int
    seconds: Sequence[float]

    @property
    def capacity(self) -> float:
        """Questions per second."""
        return self.devices / (self.jobs * mean(self.seconds))

    def devices_for(self, rate: float, busy: float) -> int:
        """How many devices serve ``rate`` questions per second while each is busy for this share of the time."""
        return max(1, -int(-(rate * self.jobs * mean(self.seconds) / busy) // 1))


def capacity(parts: Sequence[Part]) -> tuple[float, Part]:
    """Questions per second, and the part that saturates first."""
    first = min(parts, key=lambda part: part.capacity)
    return first.capacity, first


@dataclass
class Simulated:
    """What a simulation saw.

    Attributes:
        seconds: Of each question that came after the first tenth of the time and was answered, from its coming on.
        per_second: Questions answered per second after the first tenth.
        busy: By part, the share of the time that its devices were busy.
    """

    seconds: list[float] = field(default_factory=list)
    per_second: float = 0.0
    busy: Mapping[str, float] = field(default_factory=dict)


class Simulation:
    """Retrieval, drafters and verifiers under load.

    Args:
        retrieval, drafters, verifiers: The parts.
        rate: Questions per second.
        horizon: Seconds that are simulated.
        seed: Of the arrivals and the service times.
    """

    def __init__(
        self, retrieval: Part, drafters: Part, verifiers: Part, *, rate: float, horizon: float, seed: int = 0
    ) -> None:
        self._parts = retrieval, drafters, verifiers
        self._rate, self._horizon, self._warm = rate, horizon, horizon / 10
        self._random = random.Random(seed)
        self._now = simpy.Environment()
        self._devices = {part.name: [simpy.Resource(self._now) for _ in range(part.devices)] for part in self._parts}
        self._busy = {part.name: 0.0 for part in self._parts}
        self._ends: list[tuple[float, float]] = []  # of answered questions: when each came, and its end

    def run(self) -> Simulated:
        """Run it to its horizon."""
        self._now.process(self._arrivals())
        self._now.run(until=self._horizon)
        counted = [(came, end) for came, end in self._ends if end >= self._warm]
        return Simulated(
            [end - came for came, end in counted if came >= self._warm],
            len(counted) / (self._horizon - self._warm),
            {part.name: self._busy[part.name] / (part.devices * self._horizon) for part in self._parts},
        )

    def _arrivals(self) -> Generator[Any, Any, None]:
        while True:
            yield self._now.timeout(self._random.expovariate(self._rate))
            self._now.process(self._question())

    def _question(self) -> Generator[Any, Any, None]:
        came = self._now.now
        retrieval, drafters, _ = self._parts
        yield from self._work(retrieval)
        yield simpy.AllOf(self._now, [self._now.process(self._draft()) for _ in range(drafters.jobs)])
        self._ends.append((came, self._now.now))

    def _draft(self) -> Generator[Any, Any, None]:
        _, drafters, verifiers = self._parts
        yield from self._work(drafters)
        if verifiers.jobs:
            yield from self._work(verifiers)

    def _work(self, part: Part) -> Generator[Any, Any, None]:
        """One job, on the device with the fewest jobs."""
        device = min(self._devices[part.name], key=lambda one: one.count + len(one.queue))
        with device.request() as turn:
            yield turn
            seconds = self._random.choice(part.seconds)
            self._busy[part.name] += min(seconds, max(0.0, self._horizon - self._now.now))
            yield self._now.timeout(seconds)
