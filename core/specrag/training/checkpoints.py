"""Checkpoints of a training run: whose they are, which are whole, and from which one a repeated run goes on.

transformers' Trainer writes a checkpoint file by file. A last file, ``complete.json``, is written here once all others
are on the disk. A checkpoint without it is what a killed run left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from specrag._files import digest, move_into, put, remove, scratch, sync, turn_of, whole, write_text, writing
from specrag.errors import InvalidInputError, SpecRAGError

_RUN = "run.json"
_COMPLETE = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint as complete. It must be the last callback that writes into checkpoints."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sync(folder)
        files = {str(file.relative_to(folder)): digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}
        part = folder / f".{_COMPLETE}.part"
        part.write_text(json.dumps(files), encoding="utf-8")
        put(part, folder / _COMPLETE)


class StopWhenDiverged(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose weights are no numbers any more, before they are written over good ones."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            check_finite((p.detach() for p in model.parameters() if p.requires_grad), "weights", state.global_step)


def check_finite(tensors: Iterable[Tensor], what: str, step: int) -> None:
    """Whether all numbers are finite.

    Raises:
        SpecRAGError: One is not: the training has diverged. Checkpoints stay as they are.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise SpecRAGError(
            f"the training has diverged: at step {step} the {what} became NaN or infinite. The last checkpoint before "
            "it is kept. Train again with a lower learning rate and another output, or look for odd examples"
        )


@contextlib.contextmanager
def claimed(checkpoints: Path, content: bytes) -> Iterator[str | None]:
    """The checkpoint to go on from, while this process alone trains; what a killed run left unfinished is removed.

    Args:
        checkpoints: The folder. It is marked as that of the run with ``content``.
        content: What identifies the run: its settings and examples.

    Raises:
        InvalidInputError: The folder holds another run's checkpoints or other files, or another process trains there.
        SpecRAGError: The disk is full, or writing is not allowed.
    """
    checkpoints = whole(checkpoints)
    busy = f"another process is training with checkpoints in {checkpoints}: wait for it, or choose another output"
    with writing(checkpoints), turn_of(checkpoints, busy=busy):
        _check_owner(checkpoints, content)
        write_text(checkpoints / _RUN, json.dumps({"digest": _run(content)}))
        found = sorted(_checkpoints(checkpoints), key=_step, reverse=True)
        last = next((checkpoint for checkpoint in found if _is_whole(checkpoint)), None)
        for checkpoint in found:
            if last is None or _step(checkpoint) > _step(last) or not (checkpoint / _COMPLETE).exists():
                remove(checkpoint)
        yield None if last is None else str(last)


@contextlib.contextmanager
def results(output: Path, last: str) -> Iterator[Path]:
    """A folder to write the result of a training to; at the end its files go into ``output``, whole.

    Args:
        output: What is in it stays, unless a new file has its name.
        last: How the name of the weights begins: they come after all other files.
    """
    target = whole(output)
    target.mkdir(parents=True, exist_ok=True)
    with scratch(target / "result") as folder:
        yield folder
        move_into(target, folder, last=last)


def _run(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_owner(checkpoints: Path, content: bytes) -> None:
    if not checkpoints.exists():
        return
    if not checkpoints.is_dir():
        raise InvalidInputError(f"{checkpoints} is a file: choose another output")
    mark = checkpoints / _RUN
    if not mark.exists():
        if not all(file.name.startswith(f".{_RUN}.") for file in checkpoints.iterdir()):
            raise InvalidInputError(f"{checkpoints} holds other files: choose another output")
        return
    try:
        owner = json.loads(mark.read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError, TypeError) as error:
        if not _checkpoints(checkpoints):
            return
        raise InvalidInputError(
            f"{mark} is damaged, so whose checkpoints these are is not known: remove {checkpoints}, or choose another "
            "output"
        ) from error
    if owner != _run(content):
        raise InvalidInputError(
            f"{checkpoints} holds the checkpoints of a run with other examples or settings: "
            "remove it or choose another output"
        )


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
        return all(digest(checkpoint / name) == found for name, found in files.items())
    except (OSError, ValueError, AttributeError):
        return False
