"""What a model replies to many requests, kept in a file of JSON lines as it is written.

A run that was killed continues where it stopped. A request is sent again when it or the model's name changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from specrag import _blocking
from specrag._files import writing
from specrag.errors import ModelError
from specrag.models.base import GenerationRequest, LanguageModel

Progress = Callable[[int, int], None]


def replies_of(
    requests: Mapping[str, GenerationRequest],
    lm: LanguageModel,
    cache: str | Path,
    batch: int,
    progress: Progress,
    *,
    version: str = "",
) -> dict[str, list[str]]:
    """What the LM wrote in the stages of each request, by the request's name; only what ``cache`` lacks is asked for.

    Args:
        requests: By a name of the caller's.
        cache: File of the LM's replies; it is created if it does not exist.
        batch: Requests per call of a batching LM.
        progress: Called with the number of replies written and of those that were missing.
        version: Tells models of the same name apart.

    Raises:
        ModelError: The model failed; finished replies are kept.
    """
    file = Path(cache)
    done: dict[str, list[str]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                key, reply = row["key"], row["reply"]
            except (ValueError, KeyError, TypeError):
                continue  # a killed run left half a line
            if isinstance(key, str) and isinstance(reply, list) and all(isinstance(text, str) for text in reply):
                done[key] = reply
    keys = {name: _key(request, f"{lm.name}{version}") for name, request in requests.items()}
    missing = [name for name, key in keys.items() if key not in done]
    missing.sort(key=lambda name: sum(len(turn.text) for turn in requests[name].turns))  # as slow as its longest
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file), file.open("a", encoding="utf-8") as out:
        if file.stat().st_size:
            out.write("\n")  # after a line that a killed run left unfinished
        for at in range(0, len(missing), batch):
            group = missing[at : at + batch]
            for name, reply in zip(group, _blocking.run(_written(lm, [requests[n] for n in group])), strict=True):
                done[keys[name]] = reply
                out.write(json.dumps({"key": keys[name], "reply": reply}) + "\n")
            out.flush()
            progress(min(at + batch, len(missing)), len(missing))
    return {name: done[key] for name, key in keys.items()}


def _key(request: GenerationRequest, model: str) -> str:
    turns = [turn.text for turn in request.turns]
    asked = [model, *turns, *(f"{stage.header}\n{stage.max_tokens}" for stage in request.stages)]
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]


async def _written(lm: LanguageModel, requests: Sequence[GenerationRequest]) -> list[list[str]]:
    if lm.capabilities.batched:
        completions = await lm.agenerate(list(requests))
    else:
        completions = [c for (c,) in await asyncio.gather(*(lm.agenerate([request]) for request in requests))]
    replies = [[part.text.strip() for part in completion.parts] for completion in completions]
    if not any(map(any, replies)):
        raise ModelError(f"{lm.name} replied nothing to {len(replies)} requests in a row")
    return replies
