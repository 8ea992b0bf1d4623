"""`specrag serve` and the clients that people have: OpenAI's own, LangChain's, LlamaIndex's, and plain HTTP."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from specrag.serving.speculative import ABSTENTION
from tests.serving_parts import QUESTION, chat, real_models, served


@pytest.fixture(scope="module")
def server():
    with served(real_models()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        yield made


def test_the_official_client_gets_an_answer_with_its_citations(client):
    made = client.chat.completions.create(model="speculative-rag", messages=[{"role": "user", "content": QUESTION}])
    assert made.choices[0].message.content == "December 1898"
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.prompt_tokens > 0 and made.usage.total_tokens == made.usage.prompt_tokens
    told = made.model_extra["specrag"]
    assert told["citations"][0]["id"] == "passage-0" and "1898" in told["citations"][0]["text"]
    assert told["drafts"][0]["answer"] == "December 1898" and told["drafts"][0]["score"] < 0
    assert 0.25 < told["confidence"] < 1 and not told["abstained"]
    assert told["timings"]["total"] > told["timings"]["draft"] > 0


def test_the_official_client_streams_text_usage_and_the_extension(client):
    stream = client.chat.completions.create(
        model="speculative-rag",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "December 1898"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens > 0
    assert len({c.id for c in chunks}) == 1
    extended = [c.model_extra["specrag"] for c in chunks if c.model_extra.get("specrag")]
    assert len(extended) == 1 and extended[0]["citations"]


def test_drafts_and_verdicts_arrive_before_the_text_when_they_are_asked_for(client):
    stream = client.chat.completions.create(
        model="speculative-rag",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        extra_body={"specrag": {"events": True}},
    )
    seen = []
    for chunk in stream:
        told = (chunk.model_extra or {}).get("specrag") or {}
        if "event" in told:
            seen.append(told["event"]["type"])
        elif chunk.choices[0].delta.content:
            seen.append("text")
    assert seen[0] == "passages" and seen.index("draft") < seen.index("verdict") < seen.index("text")


def test_completions_answer_and_stream(client):
    made = client.completions.create(model="speculative-rag", prompt=QUESTION)
    assert made.choices[0].text == "December 1898" and made.object == "text_completion"
    stream = client.completions.create(model="speculative-rag", prompt=QUESTION, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "December 1898"


def test_models_are_listed_and_each_index_has_its_own(client):
    names = [model.id for model in client.models.list()]
    assert names == ["speculative-rag", "speculative-rag/radium", "speculative-rag/tower", "embedder"]
    assert client.models.retrieve("speculative-rag/tower").id == "speculative-rag/tower"
    made = client.chat.completions.create(
        model="speculative-rag/tower", messages=[{"role": "user", "content": "who designed the eiffel tower"}]
    )
    assert made.choices[0].message.content == "Maurice Koechlin"
    assert made.model_extra["specrag"]["index"] == "tower"


def test_an_index_may_be_named_in_the_extension_field(client):
    made = client.chat.completions.create(
        model="speculative-rag",
        messages=[{"role": "user", "content": "who designed the eiffel tower"}],
        extra_body={"specrag": {"index": "tower", "top": 1}},
    )
    assert made.choices[0].message.content == "Maurice Koechlin"
    assert len(made.model_extra["specrag"]["passages"]) == 1


def test_an_abstention_is_an_answer_that_says_so(client):
    made = client.chat.completions.create(
        model="speculative-rag", messages=[{"role": "user", "content": "who won the cricket world cup of 2011"}]
    )
    assert made.choices[0].message.content.startswith(ABSTENTION)
    told = made.model_extra["specrag"]
    assert told["abstained"] and told["reason"] and told["citations"] == []


def test_stop_strings_and_a_limit_of_words_cut_a_copied_answer(client):
    def answer(**options):
        messages = [{"role": "user", "content": QUESTION}]
        choice = client.chat.completions.create(model="speculative-rag", messages=messages, **options).choices[0]
        return choice.message.content, choice.finish_reason

    assert answer(stop=" 18") == ("December", "stop")
    assert answer(max_tokens=1) == ("December", "length")
    assert answer(max_completion_tokens=2) == ("December 1898", "stop")


def test_embeddings_are_the_embedders(client):
    texts = ["radium", "a tower in Paris"]
    made = client.embeddings.create(model="embedder", input=texts)
    expected = real_models().embedder.embed(texts)
    np.testing.assert_allclose([row.embedding for row in made.data], expected, atol=1e-6)
    plain = client.embeddings.create(model="embedder", input="radium", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, expected[0], atol=1e-6)


async def test_the_official_clients_asynchronous_form(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        made = await client.chat.completions.create(**chat())
        assert made.choices[0].message.content == "December 1898"


def test_langchain_invokes_streams_and_embeds(server):
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="speculative-rag", temperature=0)
    reply = model.invoke(QUESTION)
    assert reply.content == "December 1898" and reply.usage_metadata["input_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == "December 1898"
    embeddings = OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="embedder", check_embedding_ctx_length=False
    )
    np.testing.assert_allclose(embeddings.embed_query("radium"), real_models().embedder.embed(["radium"])[0], atol=1e-6)


def test_llamaindex_completes_chats_and_streams(server, request):
    python = request.config.getoption("--openai-like-python")
    if python is None:
        pytest.skip("llama-index-llms-openai needs openai<3, not ours: give --openai-like-python (CONTRIBUTING.md)")
    script = Path(__file__).with_name("openai_like.py")
    command = [python, str(script), f"{server.url}/v1", QUESTION]
    # The other environment must not see this one's packages.
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True)
    got = json.loads(done.stdout)
    assert got == dict.fromkeys(("complete", "stream_complete", "chat", "stream_chat", "acomplete"), "December 1898")


def test_plain_http_streams_server_sent_events(server):
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=chat(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"


def test_plain_http_gets_base64_and_a_request_id_back(server):
    with server.client() as http:
        made = http.post(
            "/v1/embeddings",
            json={"model": "embedder", "input": "radium", "encoding_format": "base64"},
            headers={"X-Request-Id": "trace-42"},
        )
        assert made.headers["x-request-id"] == "trace-42"
        vector = np.frombuffer(base64.b64decode(made.json()["data"][0]["embedding"]), dtype="<f4")
        assert vector.shape == (384,)
        odd = http.get("/health", headers={"X-Request-Id": "two\twords"})
        assert odd.headers["x-request-id"].startswith("req-")


def test_a_conversation_is_told_that_its_last_message_is_the_question(client):
    made = client.chat.completions.create(
        model="speculative-rag",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
    )
    assert made.choices[0].message.content == "December 1898"
    assert "3 messages before it were not read" in " ".join(made.model_extra["specrag"]["notes"])


def test_requests_in_parallel_get_each_their_own_answer(server):
    from concurrent.futures import ThreadPoolExecutor

    asked = [("radium", QUESTION, "December 1898"), ("tower", "who designed the eiffel tower", "Maurice Koechlin")] * 6

    def answer(item):
        index, question, _ = item
        with server.client() as http:
            made = http.post("/v1/chat/completions", json=chat(question, f"speculative-rag/{index}")).json()
        return made["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, asked)) == [right for *_, right in asked]
