"""Embeddings over an OpenAI-compatible endpoint, and the frameworks' forms of any embedder."""

import asyncio
import json
import math

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.unit_tests import EmbeddingsUnitTests
from llama_index.core.embeddings import BaseEmbedding
from pydantic import ValidationError

from langchain_specrag import SpecRAGEmbeddings
from langchain_specrag._convert import as_embedder as of_langchain
from llamaindex_specrag import SpecRAGEmbedding
from llamaindex_specrag._convert import as_embedder as of_llama_index
from specrag import Passage, SpeculativeRAG
from specrag.errors import InvalidInputError, ServerError
from specrag.models import OpenAIEmbedder
from specrag.retrieval import PassageIndex
from tests.fakes import HashEmbedder, ScriptedLM
from tests.servers import serving

TEXTS = ["who got the first prize", "Wilhelm Röntgen got it.", "你好", "It rained.", "who got the first prize"]


class Endpoint:
    """What a server answers: the vectors of ``embedder``, three times as long and in another order."""

    def __init__(self, embedder, change=lambda reply: reply):
        self.embedder, self.change = embedder, change
        self.asked = []

    def __call__(self, method, path, body, headers):
        assert (method, path) == ("POST", "/v1/embeddings")
        self.asked.append((json.loads(body), headers))
        rows = [
            {"object": "embedding", "index": i, "embedding": (3 * vector).tolist()}
            for i, vector in enumerate(self.embedder.embed(self.asked[-1][0]["input"]))
        ]
        return 200, json.dumps(self.change({"data": rows[::-1], "model": "m"})).encode(), {}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_servers_embeddings_are_those_of_its_model_in_the_order_of_the_texts(minilm, batch_size):
    endpoint = Endpoint(minilm)
    with serving(endpoint) as url:
        made = OpenAIEmbedder(url, "minilm", batch_size=batch_size).embed(TEXTS)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, minilm.embed(TEXTS), atol=1e-5)
    assert len(endpoint.asked) == math.ceil(len(TEXTS) / batch_size)
    assert all(body["model"] == "minilm" and len(body["input"]) <= batch_size for body, _ in endpoint.asked)


def test_a_pipeline_and_an_index_take_it(minilm):
    passages = [Passage(text) for text in TEXTS[1:4]]
    drafter = ScriptedLM(lambda prompt: ("why", "that"))
    with serving(Endpoint(minilm)) as url:
        embedder = OpenAIEmbedder(url, "minilm")
        answer = SpeculativeRAG(drafter=drafter, embedder=embedder, drafts=2).answer(TEXTS[0], passages)
        index = PassageIndex(embedder)
        index.add(passages)
        found = index.search(TEXTS[0], 3)
    local = PassageIndex(minilm)
    local.add(passages)
    assert answer.embedding_source == "embedder" and answer.text == "that"
    expected = local.search(TEXTS[0], 3)
    assert [p.score for p in found] == pytest.approx([p.score for p in expected], abs=1e-5)
    assert [Passage(p.text, score=theirs.score) for p, theirs in zip(found, expected, strict=True)] == expected


def test_nothing_is_asked_without_texts():
    endpoint = Endpoint(HashEmbedder())
    with serving(endpoint) as url:
        assert OpenAIEmbedder(url, "m").embed([]).shape == (0, 0)
        assert OpenAIEmbedder(url, "m", dimensions=4).embed([]).shape == (0, 4)
    assert not endpoint.asked


def test_the_number_of_dimensions_is_asked_for_and_checked():
    endpoint = Endpoint(HashEmbedder(4))
    with serving(endpoint) as url:
        assert OpenAIEmbedder(url, "m", dimensions=4).embed(["a"]).shape == (1, 4)
        with pytest.raises(ServerError, match="embeddings of 4 dimensions, 8 were asked for"):
            OpenAIEmbedder(url, "m", dimensions=8).embed(["a"])
        OpenAIEmbedder(url, "m").embed(["a"])
    assert [body.get("dimensions") for body, _ in endpoint.asked] == [4, 8, None]


def with_rows(change):
    def changed(reply):
        return {**reply, "data": change(reply["data"])}

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda reply: {"object": "list"}, "no list of embeddings; its keys: object"),
        (with_rows(lambda rows: rows[:1]), "1 embeddings for 2 texts"),
        (with_rows(lambda rows: [*rows, rows[0]]), "3 embeddings for 2 texts"),
        (with_rows(lambda rows: [{**row, "index": 0} for row in rows]), r"numbers 2 embeddings \[0, 0\]"),
        (with_rows(lambda rows: [rows[0], {**rows[1], "index": None}]), r"numbers 2 embeddings \[1, None\]"),
        (with_rows(lambda rows: [{**rows[0], "embedding": "AAAA"}, rows[1]]), "must be a list of numbers, got 'AAAA'"),
        (with_rows(lambda rows: [{**rows[0], "embedding": []}, rows[1]]), "must be a list of numbers"),
        (with_rows(lambda rows: [{**rows[0], "embedding": [1.0, 2.0]}, rows[1]]), "differ in dimension: 2, 16"),
        (with_rows(lambda rows: [{**row, "embedding": ["x"]} for row in rows]), "holds what is no number"),
        (with_rows(lambda rows: [{**row, "embedding": ["0.5"] * 16} for row in rows]), "what is no number: '0.5'"),
        (with_rows(lambda rows: [{**row, "embedding": [True] * 16} for row in rows]), "what is no number: 'True'"),
        (with_rows(lambda rows: [{**row, "embedding": [10**400] * 16} for row in rows]), "what is no number"),
        (with_rows(lambda rows: [{**row, "embedding": [[1.0, 2.0]]} for row in rows]), "no finite number"),
        (with_rows(lambda rows: [{**rows[0], "embedding": [math.nan] * 16}, rows[1]]), "no finite number"),
        (with_rows(lambda rows: [{**rows[0], "embedding": [None] * 16}, rows[1]]), "no finite number"),
    ],
)
def test_replies_that_cannot_be_used_are_refused(change, message):
    with serving(Endpoint(HashEmbedder(), change)) as url, pytest.raises(ServerError, match=message) as error:
        OpenAIEmbedder(url, "m", backoff=0.01).embed(["a", "b"])
    assert url in str(error.value)


def test_vectors_without_numbers_are_in_the_order_of_the_texts():
    def unnumbered(rows):
        return [{"embedding": row["embedding"]} for row in rows[::-1]]

    with serving(Endpoint(HashEmbedder(), with_rows(unnumbered))) as url:
        made = OpenAIEmbedder(url, "m").embed(["a", "b"])
    np.testing.assert_allclose(made, HashEmbedder().embed(["a", "b"]), atol=1e-6)


def test_batches_of_different_dimensions_are_refused():
    sizes = iter([4, 8])

    def answer(method, path, body, headers):
        return Endpoint(HashEmbedder(next(sizes)))(method, path, body, headers)

    with serving(answer) as url, pytest.raises(ServerError, match="embeddings of 4, 8 dimensions"):
        OpenAIEmbedder(url, "m", batch_size=1, max_concurrency=1).embed(["a", "b"])


def test_passing_failures_are_retried_and_the_key_is_sent_and_never_shown():
    endpoint, statuses = Endpoint(HashEmbedder()), [503, 429]

    def answer(method, path, body, headers):
        return (statuses.pop(), b"{}", {}) if statuses else endpoint(method, path, body, headers)

    with serving(answer) as url:
        embedder = OpenAIEmbedder(url, "m", "sk-secret", backoff=0.01)
        assert embedder.embed(["a"]).shape == (1, 16)
    assert endpoint.asked[0][1]["Authorization"] == "Bearer sk-secret"
    assert repr(embedder) == f"OpenAIEmbedder(['{url}'], 'm')"


def test_a_text_that_the_server_refuses_says_why():
    def answer(method, path, body, headers):
        return 400, b'{"error": {"message": "input is too long"}}', {}

    with serving(answer) as url, pytest.raises(ServerError, match="input is too long"):
        OpenAIEmbedder(url, "m").embed(["a" * 9999])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "minilm", "model": "http://127.0.0.1:9/v1"}, "base_url must begin with http"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dimensions": 0}, "dimensions must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
    ],
)
def test_settings_are_checked_at_construction(options, message):
    with pytest.raises(InvalidInputError, match=message):
        OpenAIEmbedder(**({"base_url": "http://127.0.0.1:9/v1", "model": "m"} | options))


# --- LangChain and LlamaIndex -------------------------------------------------------------------------


class TestLangChainStandard(EmbeddingsUnitTests):
    @property
    def embeddings_class(self):
        return SpecRAGEmbeddings

    @property
    def embedding_model_params(self):
        return {"embedder": HashEmbedder()}


@pytest.fixture(params=[SpecRAGEmbeddings, SpecRAGEmbedding])
def adapter(request):
    return request.param


def vectors(model, texts):
    if isinstance(model, Embeddings):
        return model.embed_documents(texts), asyncio.run(model.aembed_documents(texts))
    return model.get_text_embedding_batch(texts), asyncio.run(model.aget_text_embedding_batch(texts))


def query_vectors(model, text):
    if isinstance(model, Embeddings):
        return model.embed_query(text), asyncio.run(model.aembed_query(text))
    return model.get_query_embedding(text), asyncio.run(model.aget_query_embedding(text))


def test_an_adapter_gives_the_embedders_vectors(adapter):
    embedder = HashEmbedder()
    model, expected = adapter(embedder=embedder), embedder.embed(TEXTS)
    for made in vectors(model, TEXTS):
        assert made == expected.tolist()
        assert all(type(value) is float for value in made[0])
    for made in query_vectors(model, TEXTS[0]):
        assert made == expected[0].tolist()


def test_the_bundled_embedder_is_the_default(adapter, minilm):
    np.testing.assert_allclose(vectors(adapter(), TEXTS[:2])[0], minilm.embed(TEXTS[:2]), atol=1e-5)


def test_unknown_fields_and_what_is_no_embedder_are_refused(adapter):
    with pytest.raises(ValidationError, match="typo"):
        adapter(embedder=HashEmbedder(), typo=1)
    with pytest.raises(ValidationError, match="Embedder"):
        adapter(embedder="minilm")


def test_an_adapter_handed_back_to_the_core_is_the_embedder_itself():
    embedder = HashEmbedder()
    assert of_langchain(SpecRAGEmbeddings(embedder=embedder)) is embedder
    assert of_llama_index(SpecRAGEmbedding(embedder=embedder)) is embedder


def test_llama_index_sees_its_fields_described_and_saves_no_embedder():
    model = SpecRAGEmbedding(embedder=HashEmbedder())
    assert isinstance(model, BaseEmbedding) and model.model_name == "hash"
    assert all(SpecRAGEmbedding.model_fields[name].description for name in SpecRAGEmbedding.__annotations__)
    assert "embedder" not in model.to_dict()
