"""Traces of one call as LangChain shows them: child runs for the stages of each draft, and custom events."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, adispatch_custom_event
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_async_callback_manager_for_config, patch_config

from langchain_specrag._convert import draft_row
from specrag.schema import (
    Draft,
    DraftDone,
    DraftFailed,
    Event,
    ReadingDone,
    SpeculativeAnswer,
    SubsetsChosen,
    Verdict,
    VerdictReady,
)
from specrag.speculative.work import Ended, Failed, Started, Step, Work, WorkTracker


class Trace:
    """Shows the core's events as child runs of ``config``'s run. Costs nothing when nobody listens."""

    def __init__(self, config: RunnableConfig, question: str, *, readers: bool = False) -> None:
        self._config, self._question = config, question
        self._manager = get_async_callback_manager_for_config(config)
        self._listening = bool(self._manager.handlers)
        self._tracker = WorkTracker(readers=readers)
        self._runs: dict[Work, AsyncCallbackManagerForChainRun] = {}

    def config_of(self, work: Work | None) -> RunnableConfig:
        """The config below which the runs of a model call belong."""
        run = self._runs.get(work) if work is not None else None
        return patch_config(self._config, callbacks=run.get_child()) if run is not None else self._config

    async def begin(self) -> None:
        """The call begins."""
        await self._show(self._tracker.begin())

    async def see(self, event: Event) -> None:
        """Show what happened in the core."""
        if self._listening and (told := _custom_event(event)) is not None:
            await adispatch_custom_event(*told, config=self._config)
        await self._show(self._tracker.see(event))

    async def close(self, error: BaseException | None = None) -> None:
        """End what is still open: drafts that came after the deadline, or everything after a failure."""
        await self._show(self._tracker.close(error))

    async def _show(self, steps: list[Step]) -> None:
        if not self._listening:
            return
        for step in steps:
            if isinstance(step, Started):
                inputs = _inputs(self._question, step)
                self._runs[step.work] = await self._manager.on_chain_start(None, inputs, name=_name(step))
            elif isinstance(step, Ended):
                await self._runs.pop(step.work).on_chain_end(_outputs(step))
            elif isinstance(step, Failed):
                await self._runs.pop(step.work).on_chain_error(step.error)


def _name(step: Started) -> str:
    """``perspectives``, ``draft 1``, ``verification 1``, ``reading: minilm-reader``: people count from 1."""
    work = step.work
    if work.stage in ("read", "escalate"):
        return f"{'reading' if work.stage == 'read' else 'escalation'}: {step.model}"
    if work.index is None:
        return work.stage
    return f"{'draft' if work.stage == 'draft' else 'verification'} {work.index + 1}"


def _inputs(question: str, step: Started) -> dict[str, Any]:
    if isinstance(step.given, Draft):
        return _shown(step.given)
    return {"question": question} if step.given is None else {"question": question, "documents": list(step.given)}


def _outputs(step: Ended) -> dict[str, Any]:
    if isinstance(step.made, SubsetsChosen):
        return _chosen(step.made)
    if isinstance(step.made, ReadingDone):
        return _read(step.made)
    if isinstance(step.made, SpeculativeAnswer):
        return {"answer": step.made.text, "abstained": step.made.abstained, "documents": list(step.made.read or ())}
    if isinstance(step.made, Draft):
        return _shown(step.made)
    if isinstance(step.made, Verdict):
        scores = draft_row(step.made).items()
        return {name: value for name, value in scores if name.startswith("log_") and value is not None}
    return {"late": True}


def _custom_event(event: Event) -> tuple[str, dict[str, Any]] | None:
    if isinstance(event, SubsetsChosen):
        return "specrag_subsets", _chosen(event)
    if isinstance(event, ReadingDone):
        return "specrag_reading", _read(event)
    if isinstance(event, DraftDone):
        draft = event.draft
        return "specrag_draft", {"index": draft.index, **_shown(draft), "documents": list(draft.subset)}
    if isinstance(event, VerdictReady):
        return "specrag_verdict", draft_row(event.verdict)
    if isinstance(event, DraftFailed):
        lost = event.failure
        return "specrag_draft_failed", {"index": lost.index, "documents": list(lost.subset), "error": lost.error}
    return None


def _chosen(event: SubsetsChosen) -> dict[str, Any]:
    return {"subsets": [list(subset) for subset in event.subsets], "embedding_source": event.embedding_source}


def _read(event: ReadingDone) -> dict[str, Any]:
    return {"reader": event.model, "drafts": event.drafts, "log_no_answer": event.log_no_answer}


def _shown(draft: Draft) -> dict[str, Any]:
    return {"answer": draft.text, "rationale": draft.rationale, "abstained": draft.abstained}
