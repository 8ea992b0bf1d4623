"""The LlamaIndex query engine: with real FAISS, embedder and SmolLM2, then with scripted models."""

from __future__ import annotations

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import QueryBundle
from llama_index.core.selectors import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step

from llamaindex_specrag import MultiPerspectivePostprocessor, SpeculativeRAGQueryEngine, SpeculativeSynthesizer
from specrag import Prompts
from tests.llamaindex_parts import FixedRetriever, ScriptedAgentLLM, engine_of, nodes, real_index


@pytest.fixture(scope="module")
def index(minilm, questions):
    return real_index(minilm, questions)


@pytest.mark.slow
async def test_questions_are_answered_from_a_real_index(index, quick_smollm2, minilm, questions):
    smollm2 = quick_smollm2
    made, embedding = index
    retriever = made.as_retriever(similarity_top_k=6)
    short = {"max_rationale_tokens": 6, "max_answer_tokens": 6}
    settings = {"drafts": 2, "prompts": Prompts.for_small_models(), "embedder": embedding, **short}
    engine = SpeculativeRAGQueryEngine.from_args(retriever, smollm2, **settings)
    embedding.texts.clear()
    asked = questions[0].question
    response = engine.query(asked)
    assert len(embedding.texts) == 1 + 6  # the question, and every passage once beside the question
    assert str(response) and not response.metadata["abstained"]
    assert [node.node_id for node in response.source_nodes] == response.metadata["drafts"][0]["nodes"]
    assert len(response.metadata["drafts"]) == 2
    again = await engine.aquery(asked)
    assert str(again) == str(response)

    cut = SpeculativeRAGQueryEngine.from_args(
        retriever, smollm2, node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=2.0)], **settings
    ).query(asked)
    assert str(cut) == "The passages do not answer this question." and cut.metadata["abstained"]
    diverse = MultiPerspectivePostprocessor(k=2, embedder=minilm)
    assert len(diverse.postprocess_nodes(retriever.retrieve(asked), query_str=asked)) == 2

    synthesizer = SpeculativeSynthesizer(smollm2, streaming=True, **settings)
    streamed = RetrieverQueryEngine(retriever, response_synthesizer=synthesizer).query(asked)
    assert "".join(streamed.response_gen) == str(response) and streamed.source_nodes
    later = await RetrieverQueryEngine(retriever, response_synthesizer=synthesizer).aquery(asked)
    assert "".join([piece async for piece in later.response_gen]) == str(response)


class First(BaseSelector):
    def _get_prompts(self):
        return {}

    def _update_prompts(self, prompts):
        pass

    def _select(self, choices, query):
        return SelectorResult(selections=[SingleSelection(index=0, reason="it is the only one")])

    async def _aselect(self, choices, query):
        return self._select(choices, query)


def test_a_router_has_the_engine_as_a_tool():
    tool = QueryEngineTool.from_defaults(engine_of(), name="physics", description="About physics.")
    router = RouterQueryEngine(selector=First(), query_engine_tools=[tool], llm=MockLLM())
    assert str(router.query("who discovered radium")).startswith("answer ")


async def test_engine_parts_can_be_called_one_by_one():
    engine = engine_of()
    bundle = QueryBundle("who discovered radium")
    found = engine.retrieve(bundle)
    response = engine.synthesize(bundle, found, additional_source_nodes=nodes(1))
    assert str(response) == str(await engine.asynthesize(bundle, found)) and len(response.source_nodes) == 3
    other = engine.with_retriever(FixedRetriever(nodes(1)))
    assert isinstance(other, SpeculativeRAGQueryEngine) and str(other.query("q")) == "answer 0"


@pytest.mark.parametrize("workflow", [False, True])
async def test_a_function_agent_calls_the_engine_and_uses_its_answer(workflow):
    tool = QueryEngineTool.from_defaults(engine_of(), name="physics", description="About physics.")
    agent = FunctionAgent(name="asker", description="Asks.", tools=[tool], llm=ScriptedAgentLLM())
    runner = AgentWorkflow(agents=[agent], root_agent="asker") if workflow else agent
    result = await runner.run(user_msg="who discovered radium?")
    assert str(result).startswith("It says: answer ")
    (call,) = result.tool_calls
    assert len(call.tool_output.raw_output.metadata["drafts"]) == 5


async def test_the_engine_is_a_step_of_a_workflow():
    class Asking(Workflow):
        @step
        async def ask(self, event: StartEvent) -> StopEvent:
            return StopEvent(result=await engine_of().aquery(event.question))

    assert str(await Asking().run(question="who?")).startswith("answer ")


def test_class_hierarchy():
    for kind, base in [(SpeculativeRAGQueryEngine, BaseQueryEngine), (SpeculativeSynthesizer, BaseSynthesizer)]:
        assert base.__name__ in [parent.__name__ for parent in kind.__mro__]
