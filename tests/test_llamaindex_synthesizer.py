"""The LlamaIndex synthesizer: settings, prompts, abstention, and LlamaIndex LLMs as drafters."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from llama_index.core import PromptTemplate
from llama_index.core.llms import MockLLM

from specrag import Prompts
from specrag.errors import InvalidInputError
from specrag.speculative.verification import Scoring
from tests.fakes import ScriptedLM
from tests.llamaindex_parts import WithLogProbs, engine_of, nodes


def test_nothing_touches_the_default_llm():
    """In a process of its own: with no OpenAI package there, any use of `Settings.llm` would fail."""
    code = """
import sys; sys.path[:0] = ["tests/..", "."]
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core import Settings
from llamaindex_specrag import SpeculativeSynthesizer
from tests.fakes import HashEmbedder, ScriptedLM
s = SpeculativeSynthesizer(ScriptedLM(lambda p: ("r", "a")), embedder=HashEmbedder())
print(s.synthesize("q", [NodeWithScore(node=TextNode(text=f"t{i}")) for i in range(4)]), s.get_response("q", ["t"]))
assert Settings._llm is None and "llama_index.llms.openai" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "a a", done.stderr


def test_an_abstention_is_a_sentence_with_its_reason():
    engine = engine_of(ScriptedLM(lambda prompt: ("The passages do not say.", Prompts().abstention)))
    response = engine.query("q")
    assert str(response) == "The passages do not answer this question." and response.source_nodes == []
    assert response.metadata["abstained"] and "every draft says" in response.metadata["reason"]
    assert str(engine_of(found=[], no_answer="Unknown.").query("q")) == "Unknown."
    with pytest.raises(InvalidInputError, match="no_answer must not be empty"):
        engine_of(no_answer=" ")


def test_prompts_are_read_and_changed_through_llamaindex():
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return ("r", "a")

    engine = engine_of(ScriptedLM(reply))
    prompts = engine.get_prompts()
    assert prompts["response_synthesizer:draft"].get_template() == Prompts().draft
    changed = PromptTemplate("Read: {passages}\nAnswer: {question}")
    engine.update_prompts({"response_synthesizer:draft": changed})
    engine.query("why")
    assert asked[0].startswith("Read: [1] passage") and asked[0].endswith("Answer: why")
    with pytest.raises(InvalidInputError, match="lacks {passages}"):
        engine.update_prompts({"response_synthesizer:draft": PromptTemplate("only {question}")})


def test_metadata_modes_are_respected():
    seen = []

    def reply(prompt):
        seen.append(prompt)
        return ("r", "a")

    found = nodes(2, metadata={"title": "Radium", "file": "a.txt", "year": 1898}, excluded_llm_metadata_keys=["file"])
    engine_of(ScriptedLM(reply), found).query("q")
    assert "Radium: year: 1898" in seen[0] and "a.txt" not in seen[0]


def test_settings_and_models_are_checked_at_the_door():
    with pytest.raises(InvalidInputError, match="drafter must be a specrag LanguageModel"):
        engine_of("gpt")
    with pytest.raises(InvalidInputError, match="drafts must be at least 1, got 0"):
        engine_of(drafts=0)
    with pytest.raises(InvalidInputError, match="unknown settings dratfs: there are drafter, .*passages_per_draft"):
        engine_of(dratfs=1)
    with pytest.raises(InvalidInputError, match="embedder must be"):
        engine_of(embedder="minilm")


def test_an_llms_log_probabilities_are_used():
    response = engine_of(WithLogProbs(), drafts=2).query("who discovered radium")
    best = response.metadata["drafts"][0]
    assert (best["answer"], best["rationale"]) == ("Curie", "because")
    assert best["log_draft"] == pytest.approx(np.logaddexp(-0.25, -0.5))  # one token of one, two of the other
    assert best["log_self_reflect"] == pytest.approx(-0.25)
    assert response.metadata["drafter_usage"] == {"prompt_tokens": 18, "completion_tokens": 10}


def test_an_llm_without_log_probabilities_serves_by_agreement():
    engine = engine_of(MockLLM(), drafts=2, scoring=Scoring(scores=("draft",)))
    response = engine.query("q")
    assert response.metadata["scores_used"] == [] and any("agreement" in n for n in response.metadata["notes"])
