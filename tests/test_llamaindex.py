"""The LlamaIndex adapter: real FAISS, embedder and SmolLM2 end to end; a scripted model where the wiring is the point."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import faiss
import numpy as np
import pytest
from llama_index.core import PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, LogProb
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import Document, NodeWithScore, QueryBundle, TextNode
from llama_index.core.selectors import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.tools import QueryEngineTool
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step
from llama_index.vector_stores.faiss import FaissVectorStore
from pydantic import Field

import specrag
from llamaindex_specrag import (
    MultiPerspectivePostprocessor,
    RapidLLM,
    SpeculativeRAGQueryEngine,
    SpeculativeSynthesizer,
)
from specrag import Passage, Prompts
from specrag.errors import InvalidInputError
from specrag.rapid import RapidGenerator
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder, ScriptedLM


class Embedding(BaseEmbedding):
    """A core embedder as LlamaIndex's; counts what it is asked for."""

    core: Any
    texts: list = Field(default_factory=list)

    def _get_text_embedding(self, text):
        self.texts.append(text)
        return self.core.embed([text])[0].tolist()

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


class FixedRetriever(BaseRetriever):
    def __init__(self, nodes):
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle):
        return self.nodes


def nodes(count: int = 6, **fields) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=f"passage {i}", id_=str(i), **fields), score=1 - i / 10) for i in range(count)
    ]


def scripted(**options) -> ScriptedLM:
    def reply(prompt: str):
        first = prompt.split("passage ")[1].split(" ")[0]
        return (f"Passage {first} says so.", f"answer {first}")

    return ScriptedLM(reply, **options)


def engine_of(drafter=None, found=None, **settings: Any) -> SpeculativeRAGQueryEngine:
    settings.setdefault("embedder", HashEmbedder())
    return SpeculativeRAGQueryEngine.from_args(
        FixedRetriever(nodes() if found is None else found), drafter or scripted(), **settings
    )


# --- end to end -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(minilm, questions):
    embedding = Embedding(core=minilm)
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
    documents = [
        Document(text=p.text, metadata={"title": p.title or ""}) for q in questions[:3] for p in q.passages[:6]
    ]
    made = VectorStoreIndex.from_documents(
        documents, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embedding
    )
    embedding.texts.clear()
    return made, embedding


@pytest.mark.slow
async def test_questions_are_answered_from_a_real_index(index, quick_smollm2, minilm, questions):
    smollm2 = quick_smollm2
    made, embedding = index
    retriever = made.as_retriever(similarity_top_k=6)
    short = {"max_rationale_tokens": 12, "max_answer_tokens": 8}
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


@pytest.mark.slow
def test_rapid_serves_engines_and_chats(index, smollm2, minilm, questions):
    made, _ = index
    llm = RapidLLM(rapid=RapidGenerator(smollm2, temperature=0, embedder=minilm), max_tokens=8)
    engine = made.as_query_engine(llm=llm, similarity_top_k=6)
    response = engine.query(questions[0].question)
    assert str(response) and llm.sessions[-1].tokens > 300  # the template's context part became the session
    chat = CondensePlusContextChatEngine.from_defaults(made.as_retriever(similarity_top_k=3), llm=llm)
    assert str(chat.chat(questions[0].question))
    assert "".join(chat.stream_chat("Tell me more.").response_gen)


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


# --- one core, three doors ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("with_embeddings", [True, False])
def test_core_langchain_and_llamaindex_give_the_same_answer(quick_smollm2, minilm, questions, with_embeddings):
    from langchain_core.documents import Document as LangChainDocument

    from langchain_specrag import SpeculativeRAG

    question, smollm2 = questions[1], quick_smollm2
    vectors = minilm.embed([p.text for p in question.passages]) if with_embeddings else [None] * 10
    settings = {
        "drafts": 3,
        "seed": 5,
        "embedder": minilm,
        "prompts": Prompts.for_small_models(),
        "generation": specrag.Sampling(temperature=0.7, seed=11),
        "max_rationale_tokens": 12,
        "max_answer_tokens": 8,
    }
    core = specrag.SpeculativeRAG(drafter=smollm2, **settings).answer(
        question.question,
        [
            Passage(p.text, title=p.title, id=str(i), embedding=v)
            for i, (p, v) in enumerate(zip(question.passages, vectors, strict=True))
        ],
    )
    expected = [
        (v.draft.text, v.draft.rationale, [p.id for p in v.draft.passages], pytest.approx(v.log_score, abs=1e-3))
        for v in core.verdicts
    ]
    documents = [
        LangChainDocument(p.text, id=str(i), metadata={"title": p.title}) for i, p in enumerate(question.passages)
    ]
    store = (lambda found: [vectors[int(d.id)] for d in found]) if with_embeddings else None
    chain = SpeculativeRAG(drafter=smollm2, vector_store=store, **settings)
    result = chain.invoke({"input": question.question, "context": documents})
    found = [
        NodeWithScore(
            node=TextNode(
                text=p.text, id_=str(i), metadata={"title": p.title}, embedding=None if v is None else v.tolist()
            )
        )
        for i, (p, v) in enumerate(zip(question.passages, vectors, strict=True))
    ]
    response = SpeculativeSynthesizer(smollm2, **settings).synthesize(question.question, found)
    assert [
        (d["answer"], d["rationale"], [str(i) for i in d["documents"]], d["score"]) for d in result["drafts"]
    ] == expected
    assert [(d["answer"], d["rationale"], d["nodes"], d["score"]) for d in response.metadata["drafts"]] == expected
    assert result["answer"] == core.text == str(response)
    source = "passages" if with_embeddings else "embedder"
    assert {core.embedding_source, result["details"]["embedding_source"], response.metadata["embedding_source"]} == {
        source
    }


# --- the synthesizer ------------------------------------------------------------------------------------


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


async def test_engine_parts_can_be_called_one_by_one():
    engine = engine_of()
    bundle = QueryBundle("who discovered radium")
    found = engine.retrieve(bundle)
    response = engine.synthesize(bundle, found, additional_source_nodes=nodes(1))
    assert str(response) == str(await engine.asynthesize(bundle, found)) and len(response.source_nodes) == 3
    other = engine.with_retriever(FixedRetriever(nodes(1)))
    assert isinstance(other, SpeculativeRAGQueryEngine) and str(other.query("q")) == "answer 0"


def test_settings_and_models_are_checked_at_the_door():
    with pytest.raises(InvalidInputError, match="drafter must be a specrag LanguageModel"):
        engine_of("gpt")
    with pytest.raises(InvalidInputError, match="drafts must be a whole number"):
        engine_of(drafts=0)
    with pytest.raises(TypeError, match="dratfs"):
        engine_of(dratfs=1)
    with pytest.raises(InvalidInputError, match="embedder must be"):
        engine_of(embedder="minilm")


# --- LlamaIndex models ----------------------------------------------------------------------------------


class WithLogProbs(CustomLLM):
    """Answers as LlamaIndex's ``OpenAI`` does when asked for log-probabilities."""

    logprobs: bool | None = None
    top_logprobs: int = 0
    asked: list = Field(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True)

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete

    @llm_chat_callback()
    async def achat(self, messages, **kwargs):
        self.asked.append(kwargs)
        texts = ["Yes"] if kwargs["top_logprobs"] > 1 else ["Rationale:", " because", "\n", "Answer:", " Curie"]
        positions = [[LogProb(token="x", logprob=-3), LogProb(token=t, logprob=-0.25)] for t in texts]
        return ChatResponse(
            message=ChatMessage(role="assistant", content="".join(texts)),
            logprobs=positions,
            additional_kwargs={"prompt_tokens": 9, "completion_tokens": len(texts)},
        )


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


# --- instrumentation ------------------------------------------------------------------------------------


class Collecting(BaseEventHandler):
    events: list = Field(default_factory=list)

    @classmethod
    def class_name(cls):
        return "Collecting"

    def handle(self, event, **kwargs):
        self.events.append(event)


@pytest.fixture
def collected():
    root = get_dispatcher()
    events, spans = Collecting(), SimpleSpanHandler()
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield events.events, spans
    root.event_handlers.remove(events)
    root.span_handlers.remove(spans)


@pytest.mark.parametrize("door", ["query", "aquery"])
def test_spans_and_events_come_in_order_and_once(collected, door):
    events, spans = collected
    engine = engine_of(WithLogProbs(), drafts=2, scoring=Scoring(scores=("draft", "self_reflect")))
    if door == "query":
        engine.query("q")
    else:
        asyncio.run(engine.aquery("q"))
    names = [event.class_name() for event in events]
    ours = [name for name in names if name in ("PerspectivesEvent", "DraftEvent", "VerdictEvent")]
    assert ours == ["PerspectivesEvent", "DraftEvent", "DraftEvent", "VerdictEvent", "VerdictEvent"]
    for once in (
        "QueryStartEvent",
        "SynthesizeStartEvent",
        "RetrievalStartEvent",
        "SynthesizeEndEvent",
        "QueryEndEvent",
    ):
        assert names.count(once) == 1
    assert names.count("LLMChatStartEvent") == names.count("LLMChatEndEvent") == 4  # two drafts, two verdicts
    assert names.index("SynthesizeStartEvent") < names.index("PerspectivesEvent") < names.index("DraftEvent")
    assert names.index("VerdictEvent") < names.index("SynthesizeEndEvent") < names.index("QueryEndEvent")

    finished = {span.id_: span for span in spans.completed_spans}
    kinds = [span.id_.rsplit("-", 5)[0] for span in spans.completed_spans]
    assert kinds.count("SpeculativeRAG.perspectives") == 1 and not spans.open_spans and not spans.dropped_spans
    assert kinds.count("SpeculativeRAG.draft") == kinds.count("SpeculativeRAG.verify") == 2
    drafts = [span for span in spans.completed_spans if span.id_.startswith("SpeculativeRAG.draft")]
    assert all("synthesize" in span.parent_id for span in drafts)
    calls = [event for event in events if event.class_name() == "LLMChatStartEvent"]
    parents = [finished[event.span_id].parent_id.split("-")[0] for event in calls]
    assert sorted(parents) == ["SpeculativeRAG.draft"] * 2 + ["SpeculativeRAG.verify"] * 2


def test_a_failed_draft_drops_its_span(collected):
    events, spans = collected
    calls = []

    def reply(prompt):
        calls.append(1)
        return RuntimeError("away") if len(calls) == 1 else ("r", "a")

    engine_of(ScriptedLM(reply, batched=False), drafts=2).query("q")
    (failed,) = [event for event in events if event.class_name() == "DraftFailedEvent"]
    assert failed.error == "RuntimeError: away"
    (dropped,) = spans.dropped_spans
    assert dropped.id_.startswith("SpeculativeRAG.draft") and failed.span_id == dropped.id_


def test_the_legacy_callbacks_keep_working():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    engine_of(callback_manager=CallbackManager([debug])).query("q")
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE):
        ((start, end),) = debug.get_event_pairs(kind)
        assert start.payload and end.payload


# --- agents and workflows -------------------------------------------------------------------------------


class ScriptedAgentLLM(FunctionCallingLLM):
    """Calls its first tool, then says what the tool said."""

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True)

    def _prepare_chat_with_tools(self, tools, user_msg=None, chat_history=None, **kwargs):
        return {"messages": [*(chat_history or []), *([user_msg] if user_msg else [])], "tools": tools}

    def get_tool_calls_from_response(self, response, error_on_no_tool_call=True, **kwargs):
        return response.message.additional_kwargs.get("calls", [])

    def _reply(self, messages, tools):
        if messages[-1].role == "tool":
            return ChatResponse(message=ChatMessage(role="assistant", content=f"It says: {messages[-1].content}"))
        call = ToolSelection(tool_id="1", tool_name=tools[0].metadata.name, tool_kwargs={"input": "who?"})
        message = ChatMessage(role="assistant", content="", additional_kwargs={"calls": [call]})
        return ChatResponse(message=message)

    async def achat(self, messages, **kwargs):
        return self._reply(messages, kwargs.get("tools"))

    async def astream_chat(self, messages, **kwargs):
        async def one():
            yield self._reply(messages, kwargs.get("tools"))

        return one()

    def chat(self, messages, **kwargs):
        raise NotImplementedError

    stream_chat = complete = stream_complete = chat
    acomplete = astream_complete = achat


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


# --- what LlamaIndex's integration packages test ---------------------------------------------------------


def test_class_hierarchy():
    for kind, base in [
        (SpeculativeRAGQueryEngine, BaseQueryEngine),
        (SpeculativeSynthesizer, BaseSynthesizer),
        (MultiPerspectivePostprocessor, BaseNodePostprocessor),
        (RapidLLM, BaseLLM),
    ]:
        assert base.__name__ in [parent.__name__ for parent in kind.__mro__]
    assert RapidLLM.class_name() == "RapidLLM"
    assert MultiPerspectivePostprocessor.class_name() == "MultiPerspectivePostprocessor"


def test_components_are_written_and_read(smollm2_path):
    postprocessor = MultiPerspectivePostprocessor(k=3, embedder=HashEmbedder(), seed=4)
    written = postprocessor.to_dict()
    assert "embedder" not in written and MultiPerspectivePostprocessor.from_dict(written).k == 3
    llm = RapidLLM(model=str(smollm2_path), temperature=0.5, max_tokens=9, stop=["x"])
    written = llm.to_dict()
    assert written["model"] == str(smollm2_path) and len(str(written)) < 2000  # a path, no weights
    read = RapidLLM.from_dict(written)
    assert read.to_dict() == written and read.metadata.context_window == 8192


async def test_one_node_of_each_perspective_stays():
    vectors = [[1.0, 0.0], [0.0, 1.0]]
    found = [NodeWithScore(node=TextNode(text=f"t{i}", id_=str(i), embedding=vectors[i % 2])) for i in range(6)]
    diverse = MultiPerspectivePostprocessor(k=2)
    assert [n.node_id for n in diverse.postprocess_nodes(found, query_str="q")] == ["0", "1"]
    assert [n.node_id for n in await diverse.apostprocess_nodes(found, QueryBundle("q"))] == ["0", "1"]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        MultiPerspectivePostprocessor(k=0)


# --- RapidLLM -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rapid(smollm2, minilm):
    return RapidLLM(rapid=RapidGenerator(smollm2, temperature=0, embedder=minilm), max_tokens=6)


async def test_every_form_of_a_call_gives_the_same_reply_and_its_event_once(rapid, collected):
    events, _ = collected
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Say hello.")]
    whole = rapid.chat(messages)
    assert whole.message.content and whole.additional_kwargs["completion_tokens"] == 6
    assert [e.class_name() for e in events] == ["LLMChatStartEvent", "LLMChatEndEvent"]
    events.clear()
    parts = list(rapid.stream_chat(messages))
    assert "".join(p.delta for p in parts) == whole.message.content == parts[-1].message.content
    assert [e.class_name() for e in events].count("LLMChatEndEvent") == 1
    events.clear()
    assert (await rapid.achat(messages)).message.content == whole.message.content
    assert [e.class_name() for e in events] == ["LLMChatStartEvent", "LLMChatEndEvent"]
    events.clear()
    assert [p async for p in await rapid.astream_chat(messages)][-1].message.content == whole.message.content
    assert [e.class_name() for e in events].count("LLMChatEndEvent") == 1
    completed = rapid.complete("Say hello.")
    assert completed.text == (await rapid.acomplete("Say hello.")).text
    assert "".join(p.delta for p in rapid.stream_complete("Say hello.")) == completed.text
    assert [p async for p in await rapid.astream_complete("Say hello.")][-1].text == completed.text
    assert completed.additional_kwargs["rapid"]["acceptance"] >= 0


def test_options_and_refusals_of_rapid(rapid):
    assert rapid.complete("Say hello.", max_tokens=2).additional_kwargs["completion_tokens"] == 2
    word = rapid.complete("Say hello.").text.split()[1]
    assert word not in rapid.complete("Say hello.", stop=[word]).text
    document = Document(text="The turbine was checked in week seven. " * 20)
    rapid.complete("When?", documents=[document])
    assert rapid.sessions[-1].tokens > 100
    with pytest.raises(InvalidInputError, match="unknown options top_p"):
        rapid.complete("q", top_p=0.5)
    with pytest.raises(InvalidInputError, match="takes system, user and assistant messages, got tool"):
        rapid.chat([ChatMessage(role="tool", content="x")])
    with pytest.raises(InvalidInputError, match="give model="):
        RapidLLM()
