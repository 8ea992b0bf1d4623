"""Checkpoints of a training run: whose they are, and from which one a repeated run goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from specrag.errors import InvalidInputError


def claim_checkpoints(checkpoints: Path, content: bytes) -> str | None:
    """The checkpoint to go on from; the folder is marked as that of the run with ``content`` (examples, settings).

    Raises:
        InvalidInputError: The folder holds another run's checkpoints.
    """
    digest = hashlib.sha256(content).hexdigest()
    mark = checkpoints / "run.json"
    if mark.exists() and json.loads(mark.read_text())["digest"] != digest:
        raise InvalidInputError(
            f"{checkpoints} holds the checkpoints of a run with other examples or settings: "
            "remove it or choose another output"
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"digest": digest}))
    done = [p for p in checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return str(max(done, key=lambda p: int(p.name.split("-")[1]))) if done else None
