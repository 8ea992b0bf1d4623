"""`specrag batch --ray`: the questions are answered in processes of Ray Data; this process writes the answers.

A block of questions whose process dies is answered again, by Ray Data. This process takes each answer once. So what a
killed run has written is whole, and its repetition asks the rest.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from ray.exceptions import RayError

from specrag import _blocking
from specrag.errors import ModelError, SpecRAGError, said
from specrag.serving.on_ray import cluster, last_error

if TYPE_CHECKING:
    from specrag.retrieval import PassageIndex
    from specrag.speculative.pipeline import SpeculativeRAG

Load = Callable[[], "tuple[SpeculativeRAG, PassageIndex | None]"]
#: ``batch.answer_all`` with its settings.
AnswerAll = Callable[..., Coroutine[Any, Any, None]]


class Answering:
    """Answers blocks of questions in a process of its own. Arguments as of ``answer_on_ray``."""

    def __init__(self, load: Load, answer: AnswerAll) -> None:
        self._rag, self._index = load()
        self._answer = answer

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        """One row per answer (JSON). Where the models fail, a last row says so, and the rest is not asked."""
        rows = [pickle.loads(row) for row in block["row"]]
        made: list[str] = []
        failed = ""
        try:
            work = self._answer(
                self._rag,
                self._index,
                rows,
                append=lambda answer: made.append(json.dumps(answer, ensure_ascii=False)),
                progress=lambda done, total: None,
                before=0,
            )
            _blocking.run(work)
        except SpecRAGError as error:
            failed = said(error)
        rest = [""] if failed else []
        return {"answer": made + rest, "failed": [""] * len(made) + [failed] * len(rest)}


def answer_on_ray(
    load: Load,
    answer: AnswerAll,
    rows: Sequence[Any],
    append: Callable[[Mapping[str, Any]], None],
    progress: Callable[[int, int], None],
    before: int,
    *,
    block: int,
    workers: int,
    gpus: float,
) -> None:
    """Answer ``rows``. Each answer is written as soon as its block is done.

    Args:
        load: Makes the pipeline and its index, in each worker.
        answer: Answers the questions of a block.
        rows: The questions, of ``batch.Row``.
        block: The most questions of a block.
        workers: Processes.
        gpus: Of each process.

    Raises:
        ModelError: The models failed, or the workers cannot start. What is answered is written.
    """
    if not rows:
        return
    size = min(block, math.ceil(len(rows) / workers))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    made = before
    with cluster():
        items = [{"row": pickle.dumps(row)} for row in rows]
        answers = ray.data.from_items(items, override_num_blocks=math.ceil(len(items) / size)).map_batches(
            Answering,
            fn_constructor_args=(load, answer),
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=gpus,
        )
        try:
            for row in answers.iter_rows():
                if row["failed"]:
                    raise ModelError(row["failed"])
                append(json.loads(row["answer"]))
                made += 1
                progress(made, before + len(rows))
        except RayError as error:
            raise ModelError(f"a worker failed: {last_error([str(error)])}") from None
