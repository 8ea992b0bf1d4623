"""What the scripts of a page read: examples as plain values, with everything counted from 1 as the page shows it.

An example is a question with its passages, and a row per system:

    {"id", "question", "gold": [...], "unanswerable", "flags": [...], "rows": [...],
     "passages": [{"number", "title", "text", "score", "gold"}]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from specrag._page.document import write
from specrag._page.scores import SCORES

_SOURCES = {"passages": "the passages’ embeddings", "embedder": "the embedder"}


def answer_page(made: Mapping[str, Any]) -> str:
    """The page of one answer, from ``SpeculativeAnswer.to_dict``."""
    drafts = [{**verdict, **verdict["draft"], "verified": True} for verdict in made["verdicts"]]
    drafts += [{**draft, "verified": False} for draft in made["unverified"]]
    cited: Sequence[int] = ()
    if not made["abstained"]:
        cited = made["read"] if made["read"] is not None else drafts[0]["subset"]
    answered = {
        "system": "answer",
        "text": made["text"],
        "seconds": made["timings"]["total"],
        "confidence": made["confidence"],
        "timings": made["timings"],
        "usage": {side: made[f"{side}_usage"] for side in ("drafter", "verifier")},
        "answer": {
            **made,
            "subset": cited,
            "drafts": [{**draft, "answer": draft["text"], "score": draft.get("log_score")} for draft in drafts],
        },
    }
    read = dict(zip(cited, made["passages"], strict=False))
    for draft in drafts:
        read.update(zip(draft["subset"], draft["passages"], strict=False))
    example = {
        "id": "",
        "question": made["question"],
        "gold": [],
        "passages": [passage(position, read[position]) for position in sorted(read)],
        "flags": [],
        "rows": [row(answered, "abstained" if made["abstained"] else "answered")],
    }
    data = {"single": True, "systems": ["answer"], "scores": SCORES, "examples": [example]}
    return write(data, title=made["question"], kicker="specrag: one answer")


def passage(position: int, given: Mapping[str, Any], *, gold: bool = False) -> dict[str, Any]:
    """A passage as the page shows it; ``position`` counts from 0."""
    return {
        "number": position + 1,
        "title": given.get("title"),
        "text": given.get("text") or "",
        "score": given.get("score"),
        "gold": gold,
    }


def row(answered: Mapping[str, Any], outcome: str) -> dict[str, Any]:
    """What one system says to a question, as the page shows it.

    Args:
        answered: A row of ``answers.jsonl``: ``system``, ``text``, ``seconds``, and how it was made in ``answer`` or
            ``rapid``; see ``specrag.evaluation.runs``.
        outcome: "right", "wrong", "abstained", "abstained_rightly", "failed", or "answered" where nobody knows.
    """
    made = answered.get("answer") or {}
    rapid = answered.get("rapid") or {}
    drafts = [_draft(draft) for draft in made.get("drafts") or ()]
    if drafts and outcome in ("right", "wrong", "answered") and not made.get("escalated"):
        drafts[0]["state"] = "chosen"
    drafts += [_draft({**lost, "failed": lost.get("error") or "failed"}) for lost in made.get("failures") or ()]
    counting = [f"log_{name}" for name in made.get("scores_used") or ()]
    facts = {
        "escalated": made.get("escalated") and f"the verifier answered itself ({made['escalated']})",
        "perspectives from": _SOURCES.get(made.get("embedding_source") or "", ""),
        "drafter": ", ".join(dict.fromkeys(draft["drafter"] for draft in drafts if draft["drafter"])),
        **_figures(rapid),
    }
    return {
        **{name: answered.get(name) for name in ("system", "text", "seconds", "confidence", "error")},
        "outcome": outcome,
        "rationale": made.get("rationale") or None,
        "reason": made.get("reason"),
        "notes": list(made.get("notes") or ()),
        "passages": [position + 1 for position in made.get("subset") or ()],
        "timings": {name: used for name, used in (answered.get("timings") or {}).items() if used and name != "total"},
        "tokens": [
            [role, used.get("prompt_tokens", 0), used.get("completion_tokens", 0)]
            for role, used in (answered.get("usage") or {}).items()
            if any(used.values())
        ],
        "metrics": dict(answered.get("metrics") or {}),
        "facts": [[name, value] for name, value in facts.items() if value],
        "counting": counting,
        "drafts": drafts,
        "critiques": [_critique(critique) for critique in made.get("critiques") or ()],
        "pieces": list(rapid.get("pieces") or ()),
        "flags": [],
    }


def _draft(draft: Mapping[str, Any]) -> dict[str, Any]:
    """A draft from ``details_of`` (``specrag.evaluation.runs``), or one that failed."""
    abstained, verified = bool(draft.get("abstained")), draft.get("verified", True)
    scores = {**draft, "log_score": draft.get("score")}
    state = "failed" if "failed" in draft else "abstained" if abstained else "" if verified else "unverified"
    return {
        "number": draft.get("index", 0) + 1,
        "answer": draft.get("failed") or draft.get("answer") or "",
        "rationale": draft.get("rationale") or "",
        "passages": [position + 1 for position in draft.get("subset") or ()],
        "scores": {name: scores[name] for name in SCORES if scores.get(name) is not None},
        "state": state,
        "right": None if abstained else draft.get("right"),
        "same": [index + 1 for index in draft.get("same") or ()],
        "drafter": _name(draft.get("drafter") or ""),
    }


def _critique(critique: Mapping[str, Any]) -> dict[str, Any]:
    """What a system judged of a passage, counted from 1, or of something else (``None``)."""
    at = critique.get("passage")
    return {**critique, "passage": at + 1 if isinstance(at, int) else at}


def _name(model: str) -> str:
    """A model's name; of one that is named by its path, the last part."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if re.match(r"[/~\\]|[A-Za-z]:", model) else model


def _figures(rapid: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of RAPID's decoding, each as a text."""
    return {
        name.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in rapid.items()
        if isinstance(value, int | float | str)
    }
