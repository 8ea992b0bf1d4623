"""A misspelt setting is an error that names it, in every public class of Speculative RAG."""

from __future__ import annotations

import pytest

import langchain_specrag
import llamaindex_specrag
import specrag
from langchain_specrag.tool import QuestionInput
from llamaindex_specrag import events as llamaindex_events
from specrag import schema
from specrag.errors import InvalidInputError
from specrag.models import OpenAIEmbedder, OpenAILM
from specrag.models.base import GenerationRequest, Stage
from specrag.speculative import perspectives, selection, work
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.verification import RawScores, Verification, Verifier
from tests.fakes import HashEmbedder, ScriptedLM
from tests.langchain_parts import FixedRetriever as LangChainRetriever
from tests.langchain_parts import chain_of
from tests.llamaindex_parts import FixedRetriever as LlamaIndexRetriever

LM = ScriptedLM(lambda text: ("because", "42"))
DRAFT = schema.Draft(0, (0,), (), "42", "because")
FAILURE = schema.DraftFailure(0, (0,), "away")
VERDICT = schema.Verdict(DRAFT)
ANSWER = {
    "question": "q", "text": "", "rationale": "", "passages": (), "abstained": True, "verdicts": (), "scores_used": (),
    "embedding_source": "none", "timings": schema.Timings(),
}  # fmt: skip

# What is made, and settings that it takes: each is tried as it stands and with one more.
SETTINGS = {
    # specrag
    specrag.SpeculativeRAG: {"drafter": LM, "drafts": 3},
    specrag.Scoring: {"threshold": -1.0},
    specrag.Prompts: {"statement": "True?"},
    specrag.Sampling: {"temperature": 1.0},
    specrag.Passage: {"text": "x", "title": "T"},
    specrag.SpeculativeAnswer: ANSWER,
    specrag.Draft: {"index": 0, "subset": (), "passages": (), "text": "x", "rationale": ""},
    specrag.Verdict: {"draft": DRAFT},
    schema.DraftFailure: {"index": 0, "subset": (), "error": "x"},
    schema.Usage: {"prompt_tokens": 1},
    schema.Timings: {"embed": 1.0},
    schema.StageBegan: {"stage": "read", "index": 0, "model": "m"},
    schema.ReadingDone: {"index": 0, "model": "m", "drafts": 2},
    schema.SubsetsChosen: {"subsets": (), "embedding_source": "none"},
    schema.DraftDone: {"draft": DRAFT},
    schema.DraftFailed: {"failure": FAILURE},
    schema.VerdictReady: {"verdict": VERDICT},
    schema.AnswerReady: {"answer": schema.SpeculativeAnswer(**ANSWER)},
    Stage: {"max_tokens": 3},
    GenerationRequest: {"turns": ()},
    perspectives.Perspectives: {"clusters": (), "subsets": ()},
    perspectives.sample_perspectives: {"embeddings": None, "count": 1, "drafts": 1, "passages_per_draft": 1},
    perspectives.select_perspectives: {"question": "q", "passages": ["x"], "count": 1},
    Assignment: {"index": 0, "subset": (), "passages": ()},
    Drafter: {"lm": LM, "max_answer_tokens": 3},
    Verifier: {"lm": LM},
    RawScores: {"self_contain": (-1.0,)},
    Verification: {"outcomes": ()},
    selection.Choice: {"ranked": (), "scores_used": ()},
    work.Work: {"stage": "draft", "index": 0},
    # specrag.models
    OpenAILM: {"model": "m", "base_url": "http://127.0.0.1:9/v1"},
    OpenAIEmbedder: {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
    # langchain_specrag
    langchain_specrag.SpecRAGEmbeddings: {"embedder": HashEmbedder()},
    langchain_specrag.SpeculativeRAGRunnable: {"drafter": LM, "drafts": 3},
    langchain_specrag.create_speculative_rag_chain: {
        "retriever": LangChainRetriever(documents=[]), "drafter": LM, "drafts": 3,
    },
    langchain_specrag.MultiPerspectiveCompressor: {"k": 3, "embedder": HashEmbedder()},
    langchain_specrag.MultiPerspectiveRetriever: {"retriever": LangChainRetriever(documents=[]), "k": 3},
    langchain_specrag.SpeculativeRAGTool: {"chain": chain_of(), "no_answer": "None."},
    langchain_specrag.SpeculativeRAGTool.from_retriever: {
        "retriever": LangChainRetriever(documents=[]), "drafter": LM, "drafts": 3,
    },
    QuestionInput: {"question": "q"},
    # llamaindex_specrag
    llamaindex_specrag.SpecRAGEmbedding: {"embedder": HashEmbedder()},
    llamaindex_specrag.SpeculativeSynthesizer: {"drafter": LM, "drafts": 3},
    llamaindex_specrag.SpeculativeRAGQueryEngine.from_args: {
        "retriever": LlamaIndexRetriever([]), "drafter": LM, "drafts": 3,
    },
    llamaindex_specrag.SpeculativeRAGQueryEngine: {
        "retriever": LlamaIndexRetriever([]), "response_synthesizer": llamaindex_specrag.SpeculativeSynthesizer(LM),
    },
    llamaindex_specrag.MultiPerspectivePostprocessor: {"k": 3, "embedder": HashEmbedder()},
    llamaindex_events.PerspectivesEvent: {"subsets": [[0]], "embedding_source": "none"},
    llamaindex_events.ReadingEvent: {"index": 0, "reader": "m", "drafts": 2, "log_no_answer": None},
    llamaindex_events.DraftEvent: {"index": 0, "answer": "x", "rationale": "", "abstained": False, "subset": [0]},
    llamaindex_events.DraftFailedEvent: {"index": 0, "subset": [0], "error": "x"},
    llamaindex_events.VerdictEvent: {
        "index": 0, "answer": "x", "subset": [0], "log_draft": None, "log_self_contain": None, "log_self_reflect": None,
    },
}  # fmt: skip
# RAPID's classes have the same test in their own modules.
ELSEWHERE = {"ChatRapid", "RapidLLM"}


@pytest.mark.parametrize("make", SETTINGS, ids=lambda make: f"{make.__module__}.{make.__qualname__}")
def test_a_misspelt_setting_is_named(make):
    make(**SETTINGS[make])
    with pytest.raises((TypeError, ValueError), match="dratfs"):
        make(**SETTINGS[make], dratfs=3)


COMPONENTS = [make for make in SETTINGS if hasattr(make, "model_fields") and make.__module__.count("events") == 0]


@pytest.mark.parametrize("make", [make for make in COMPONENTS if make is not QuestionInput])
def test_an_unknown_setting_of_a_frameworks_component_lists_the_known_ones(make):
    own = [name for name in SETTINGS[make] if name in make.model_fields]
    with pytest.raises(ValueError, match=f"unknown settings {own[0]}s: {make.__name__} has .*did you mean {own[0]}"):
        make(**{f"{own[0]}s": 1})


@pytest.mark.parametrize("package", [specrag, langchain_specrag, llamaindex_specrag])
def test_every_public_name_is_tried(package):
    public = [getattr(package, name) for name in package.__all__ if name not in ELSEWHERE]
    untried = [each for each in public if callable(each) and each not in SETTINGS]
    assert untried == ([specrag.SpecRAGError] if package is specrag else [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scoring": {"treshold": -1.0}}, "scoring has no field treshold: there are scores, .*threshold"),
        ({"sampling": {"temprature": 1.0}}, "sampling has no field temprature: there are temperature"),
        ({"prompts": {"drafts": "x"}}, "prompts has no field drafts: there are draft"),
    ],
)
def test_a_misspelt_field_of_a_mapping_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        langchain_specrag.SpeculativeRAGRunnable(drafter=LM, **setting)


def test_a_misspelt_setting_of_the_synthesizer_is_an_error_of_this_package():
    with pytest.raises(InvalidInputError, match="unknown settings dratfs, sed: there are drafter, .*drafts, .*seed"):
        llamaindex_specrag.SpeculativeSynthesizer(LM, dratfs=1, sed=2)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("llm", "drafter=llm"), ("response_mode", "one way to answer"), ("text_qa_template", "prompts=Prompts"),
        ("use_async", "await aquery"), ("similarity_top_k", "to the retriever"), ("embed_model", "embedder="),
    ],
)  # fmt: skip
def test_what_llamaindex_users_type_first_says_what_to_use_instead(name, instead):
    for make in (
        lambda: llamaindex_specrag.SpeculativeRAGQueryEngine.from_args(LlamaIndexRetriever([]), **{name: LM}),
        lambda: llamaindex_specrag.SpeculativeSynthesizer(LM, **{name: LM}),
        lambda: llamaindex_specrag.SpeculativeRAGQueryEngine(LlamaIndexRetriever([]), **{name: LM}),
    ):
        with pytest.raises(InvalidInputError, match=f"{name}: .*{instead}") as caught:
            make()
        assert "__init__" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("llm", "drafter=llm"), ("prompt", "prompts=Prompts"), ("return_source_documents", "context and citations")],
)
def test_what_langchain_users_type_first_says_what_to_use_instead(name, instead):
    with pytest.raises(InvalidInputError, match=f"{name}: .*{instead}"):
        langchain_specrag.create_speculative_rag_chain(LangChainRetriever(documents=[]), LM, **{name: LM})


def test_a_misspelt_option_of_a_call_is_an_error():
    chain = langchain_specrag.SpeculativeRAGRunnable(drafter=LM)
    inputs = {"input": "q", "context": []}
    with pytest.raises(TypeError, match="dratfs"):
        chain.invoke(inputs, dratfs=1)
    with pytest.raises(TypeError, match="dratfs"):
        list(chain.stream(inputs, dratfs=1))
    retriever = langchain_specrag.MultiPerspectiveRetriever(retriever=LangChainRetriever(documents=[]))
    with pytest.raises(TypeError, match="kk"):
        retriever.invoke("q", kk=1)
    with pytest.raises(ValueError, match="dratfs"):
        langchain_specrag.SpeculativeRAGTool(chain=chain_of()).invoke({"question": "q", "dratfs": 1})
