"""LangChain chat models as drafters and verifiers."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from pydantic import Field

from langchain_specrag import SpeculativeRAGRunnable
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder
from tests.langchain_parts import documents


class WithLogProbs(GenericFakeChatModel):
    """Answers as ``ChatOpenAI`` does when asked for log-probabilities."""

    logprobs: bool | None = None
    top_logprobs: int | None = None
    temperature: float | None = None
    asked: list[dict] = Field(default_factory=list)
    messages: Any = iter(())

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.asked.append(kwargs)
        texts = ["Yes"] if kwargs.get("top_logprobs") else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        content = [
            {"token": t, "bytes": list(t.encode()), "logprob": -0.25, "top_logprobs": [{"token": t, "logprob": -0.25}]}
            for t in texts
        ]
        message = AIMessage(
            "".join(texts),
            response_metadata={"logprobs": {"content": content}, "finish_reason": "stop"},
            usage_metadata={"input_tokens": 9, "output_tokens": len(texts), "total_tokens": 9 + len(texts)},
        )
        return _result(message)


def _result(message):
    from langchain_core.outputs import ChatGeneration, ChatResult

    return ChatResult(generations=[ChatGeneration(message=message)])


def test_a_chat_models_log_probabilities_are_used_and_the_verifiers_yes_is_the_substitute():
    model = WithLogProbs()
    result = SpeculativeRAGRunnable(drafter=model, embedder=HashEmbedder(), drafts=2).invoke(
        {"input": "who discovered radium", "context": documents()}
    )
    best = result["drafts"][0]
    assert (best["answer"], best["rationale"]) == ("Curie", "because")
    assert best["log_draft"] == pytest.approx(np.logaddexp(-0.25, -0.5))  # one token of one, two of the other
    assert best["log_self_reflect"] == pytest.approx(-0.25) and best["log_self_contain"] is None
    assert result["details"]["scores_used"] == ["draft", "self_reflect"]
    assert result["details"]["drafter_usage"] == {"prompt_tokens": 18, "completion_tokens": 10}
    assert {"logprobs", "temperature"} <= set(model.asked[0]) and "max_tokens" not in model.asked[0]


def test_a_chat_model_without_log_probabilities_serves_by_agreement():
    model = FakeListChatModel(responses=["Rationale: r\nAnswer: Curie", "Rationale: r\nAnswer: Curie", "Answer: Bohr"])
    rag = SpeculativeRAGRunnable(drafter=model, embedder=HashEmbedder(), drafts=3, scoring=Scoring(scores=("draft",)))
    result = rag.invoke({"input": "q", "context": documents()})
    assert result["answer"] == "Curie" and result["details"]["scores_used"] == []
    assert any("agreement among drafts" in note for note in result["details"]["notes"])


async def test_max_concurrency_reaches_the_models():
    running, most = 0, 0

    class Slow(FakeListChatModel):
        async def _agenerate(self, *args, **kwargs):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            return self._generate(*args, **kwargs)

    rag = SpeculativeRAGRunnable(drafter=Slow(responses=["Answer: a"]), embedder=HashEmbedder(), drafts=5)
    await rag.ainvoke({"input": "q", "context": documents()}, {"max_concurrency": 2})
    assert most == 2
