"""One call's runs and custom events: perspectives, each draft, each verification."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, adispatch_custom_event
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_async_callback_manager_for_config, patch_config

from langchain_specrag._convert import draft_row
from specrag.schema import DraftDone, DraftFailed, Event, SubsetsChosen, VerdictReady
from specrag.speculative.work import Work

# A stage and the subset of passages that it concerns; perspectives concern none.
_Key = tuple[str, tuple[int, ...]]


class Trace:
    """Turns the core's events into child runs of ``config``'s run. Costs nothing when nobody listens."""

    def __init__(self, config: RunnableConfig, question: str) -> None:
        self._config, self._question = config, question
        self._manager = get_async_callback_manager_for_config(config)
        self._listening = bool(self._manager.handlers)
        self._runs: dict[_Key, list[tuple[int, AsyncCallbackManagerForChainRun]]] = defaultdict(list)

    def config_of(self, work: Work | None) -> RunnableConfig:
        """Where the runs of a model call belong."""
        runs = self._runs.get((work.stage, work.subset)) if work is not None else None
        return patch_config(self._config, callbacks=runs[0][1].get_child()) if runs else self._config

    async def begin(self) -> None:
        """The call begins."""
        if self._listening:
            await self._start(("perspectives", ()), 0, "perspectives", {"question": self._question})

    async def see(self, event: Event) -> None:
        """Something happened in the core."""
        if not self._listening:
            return
        if isinstance(event, SubsetsChosen):
            chosen = {"subsets": [list(s) for s in event.subsets], "embedding_source": event.embedding_source}
            await self._end(("perspectives", ()), chosen)
            await self._dispatch("specrag_subsets", chosen)
            for j, subset in enumerate(event.subsets, start=1):
                inputs = {"question": self._question, "documents": list(subset)}
                await self._start(("draft", subset), j, f"draft {j}", inputs)
        elif isinstance(event, DraftDone):
            draft = event.draft
            shown = {"answer": draft.text, "rationale": draft.rationale, "abstained": draft.abstained}
            j = await self._end(("draft", draft.subset), shown)
            await self._dispatch("specrag_draft", {**shown, "documents": list(draft.subset)})
            if not draft.abstained:
                await self._start(("verify", draft.subset), j, f"verification {j}", shown)
        elif isinstance(event, VerdictReady):
            row = draft_row(event.verdict)
            await self._end(("verify", event.verdict.draft.subset), {k: v for k, v in row.items() if "log_" in k})
            await self._dispatch("specrag_verdict", row)
        elif isinstance(event, DraftFailed):
            subset, error = event.failure.subset, event.failure.error
            for stage in ("verify", "draft"):
                if self._runs[stage, subset]:
                    await self._runs[stage, subset].pop(0)[1].on_chain_error(RuntimeError(error))
                    break
            await self._dispatch("specrag_draft_failed", {"documents": list(subset), "error": error})

    async def close(self, error: BaseException | None = None) -> None:
        """End what is still open: drafts that came after the deadline, or everything after a failure."""
        for _, run in [each for runs in self._runs.values() for each in runs]:
            await (run.on_chain_end({"late": True}) if error is None else run.on_chain_error(error))
        self._runs.clear()

    async def _start(self, key: _Key, number: int, name: str, inputs: dict[str, Any]) -> None:
        self._runs[key].append((number, await self._manager.on_chain_start(None, inputs, name=name)))

    async def _end(self, key: _Key, outputs: dict[str, Any]) -> int:
        if not self._runs[key]:
            return 0
        number, run = self._runs[key].pop(0)
        await run.on_chain_end(outputs)
        return number

    async def _dispatch(self, name: str, data: Any) -> None:
        await adispatch_custom_event(name, data, config=self._config)
