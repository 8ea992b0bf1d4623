"""What `specrag serve` says to requests that cannot be answered: OpenAI's errors, which name the field."""

from __future__ import annotations

import httpx
import openai
import pytest

from specrag.errors import ModelError
from tests.serving_parts import QUESTION, chat, instant_models, served


@pytest.fixture(scope="module")
def http():
    with served(instant_models(), max_tokens=100) as running, running.client() as client:
        yield client


def refusal(response: httpx.Response, status: int = 400) -> dict:
    """The error of a response, which has OpenAI's shape and nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and isinstance(body["error"]["type"], str)
    return body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "x"}}]}]},
            "messages[0].content[0].file.file_id",
            "invalid_value",
        ),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 101}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 101}, "max_completion_tokens", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_type"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"n": True}, "n", "unsupported_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"logprobs": True}, "logprobs", "unsupported_value"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"mesages": []}, "mesages", "unknown_parameter"),
        ({"specrag": {"index_name": "x"}}, "specrag.index_name", "unknown_parameter"),
        ({"specrag": {"top": 0}}, "specrag.top", "invalid_value"),
        ({"specrag": {"deadline": "soon"}}, "specrag.deadline", "invalid_type"),
        ({"specrag": {"file_ids": ["file-x"]}}, "specrag.file_ids", "unsupported_value"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(http, fields, param, code):
    error = refusal(http.post("/v1/chat/completions", json={**chat(), **fields}))
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def test_a_field_that_is_missing_is_named(http):
    body = chat()
    del body["model"]
    assert refusal(http.post("/v1/chat/completions", json=body))["message"] == "Missing required parameter: 'model'"
    assert refusal(http.post("/v1/completions", json={"model": "speculative-rag"}))["param"] == "prompt"


def test_fields_of_openais_that_change_nothing_are_passed_over(http):
    extra = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "stop": None,
        "seed": -7,
        "temperature": None,
    }
    made = http.post("/v1/chat/completions", json=chat(**extra))
    assert made.status_code == 200 and made.json()["choices"][0]["message"]["content"] == "1898"


@pytest.mark.parametrize("content", [b"{not json", b"", b"[" * 100_000, b"\xff\xfe{}"])
def test_a_body_that_is_no_json_is_refused(http, content):
    refusal(http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}))


def test_a_body_of_another_type_is_refused(http):
    refusal(http.post("/v1/chat/completions", content=b"a=b", headers={"content-type": "text/plain"}))
    refusal(http.post("/v1/chat/completions", json=[1, 2]))


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/chat", "/docs", "/redoc", "/v1/files/x/y", "/..%2f..%2fetc"])
def test_an_unknown_route_is_a_404_of_openais_shape(http, path):
    assert refusal(http.get(path), 404)["code"] == "unknown_url"


def test_a_method_that_a_route_lacks_is_a_405_that_says_which_it_has(http):
    response = http.get("/v1/chat/completions")
    assert refusal(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("model", "param"),
    [
        ("gpt-4o", "model"),
        ("rapid", "model"),
        ("speculative-rag/other", "model"),
        ("speculative-rag/../../etc/passwd", "model"),
    ],
)
def test_an_unknown_model_is_a_404(http, model, param):
    assert refusal(http.post("/v1/chat/completions", json=chat(model=model)), 404)["param"] == param
    refusal(http.get(f"/v1/models/{model}"), 404)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "radium/../radium", "..", "radium\0"])
def test_the_name_of_an_index_is_never_a_path(http, name):
    body = chat(specrag={"index": name})
    assert refusal(http.post("/v1/chat/completions", json=body), 404)["param"] == "specrag.index"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": "x", "dimensions": 7}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({}, "input"),
    ],
)
def test_embeddings_that_cannot_be_made_name_the_field(http, fields, param):
    assert refusal(http.post("/v1/embeddings", json={"model": "embedder", **fields}))["param"] == param


def test_the_official_client_raises_its_own_errors(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**chat(n=3))
        assert caught.value.param == "n" and caught.value.code == "unsupported_value"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**chat(model="gpt-4o"))


def test_models_that_fail_are_a_502_without_what_they_said():
    failing = instant_models(lambda prompt: ModelError("http://10.0.0.7:8000 said: the text of a document"))
    with served(failing) as running, running.client() as http:
        error = refusal(http.post("/v1/chat/completions", json=chat()), 502)
        assert error["code"] == "model_error" and "10.0.0.7" not in error["message"]
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**chat(), stream=True)
            with pytest.raises(openai.APIError, match="the models failed"):
                list(stream)


def test_a_question_that_is_refused_by_the_models_names_its_field(http):
    # The whole conversation reaches the pipeline, which knows what it can read.
    body = chat(QUESTION, specrag={"deadline": 1e-9})
    made = http.post("/v1/chat/completions", json=body).json()
    assert made["specrag"]["abstained"] and "deadline" in " ".join(made["specrag"]["notes"])
