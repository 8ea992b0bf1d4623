"""LangChain's own standard tests, subclassed."""

from __future__ import annotations

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    RetrieversIntegrationTests,
    ToolsIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, ToolsUnitTests

from langchain_specrag import ChatRapid, MultiPerspectiveRetriever, SpeculativeRAGTool, create_speculative_rag_chain
from specrag.models import Sampling
from specrag.rapid import RapidGenerator
from tests.fakes import HashEmbedder, ScriptedLM

TEXTS = [
    "Marie Curie discovered radium in 1898.",
    "Radium glows in the dark.",
    "Paris is the capital of France.",
    "The Seine flows through Paris.",
    "Berlin is the capital of Germany.",
]


class HashEmbeddings(Embeddings):
    """Embeddings without a model."""

    def embed_documents(self, texts):
        return HashEmbedder().embed(texts).tolist()

    def embed_query(self, text):
        return self.embed_documents([text])[0]


def store():
    return InMemoryVectorStore.from_texts(TEXTS, HashEmbeddings())


class _Flags:
    """What SmolLM2-135M is and is not."""

    @property
    def standard_chat_model_params(self):
        return {"temperature": 0, "max_tokens": 100, "stop": []}  # a model in this process has no timeout, no retries

    @property
    def has_tool_calling(self):
        return False  # its chat template knows no tools: bind_tools raises, see test_langchain_rapid

    @property
    def has_tool_choice(self):
        return False  # a local model cannot be forced to call

    @property
    def has_structured_output(self):
        return False  # 135M parameters write no JSON on demand: see test_langchain_rapid for what the parsers do

    @property
    def supports_json_mode(self):
        return False

    @property
    def supports_image_inputs(self):
        return False

    @property
    def model_override_value(self):
        return None  # an instance holds one model's weights

    @property
    def returns_usage_metadata(self):
        return True


class TestChatRapidUnit(_Flags, ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _saved(self, tiny_path):
        type(self).path = str(tiny_path)

    @property
    def chat_model_class(self):
        return ChatRapid

    @property
    def chat_model_params(self):
        return {"model": self.path}

    @pytest.mark.xfail(
        strict=True,
        reason="LangChain loads classes of packages off its own list only when they are named, which this test does "
        "not; test_langchain_rapid.py makes the same comparison with allowed_objects=[ChatRapid]",
    )
    def test_serdes(self, model, snapshot):
        super().test_serdes(model, snapshot)

    @property
    def init_from_env_params(self):
        return {}, {}, {}  # no key, no address: nothing is read from the environment, so the suite skips this one


@pytest.mark.slow
class TestChatRapid(_Flags, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _loaded(self, quick_smollm2, minilm):
        type(self).rapid = RapidGenerator(quick_smollm2, sampling=Sampling(), embedder=minilm)

    @property
    def chat_model_class(self):
        return ChatRapid

    @property
    def chat_model_params(self):
        return {"rapid": self.rapid, "max_tokens": 12}


class TestMultiPerspectiveRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return MultiPerspectiveRetriever

    @property
    def retriever_constructor_params(self):
        return {"retriever": store().as_retriever(search_kwargs={"k": 5}), "embedder": HashEmbedder()}

    @property
    def retriever_query_example(self):
        return "what is the capital of France"

    @property
    def num_results_arg_name(self):
        return "k"


class _Tool:
    @property
    def tool_constructor(self):
        return SpeculativeRAGTool

    @property
    def tool_constructor_params(self):
        drafter = ScriptedLM(lambda prompt: ("Curie discovered it.", "Marie Curie"))
        return {"chain": create_speculative_rag_chain(store().as_retriever(), drafter)}

    @property
    def tool_invoke_params_example(self):
        return {"question": "who discovered radium"}


class TestToolUnit(_Tool, ToolsUnitTests):
    pass


class TestTool(_Tool, ToolsIntegrationTests):
    pass
