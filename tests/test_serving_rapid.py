"""RAPID over uploaded files through `specrag serve`."""

from __future__ import annotations

import time

import openai
import pytest

from specrag.models import Sampling
from specrag.rapid import Message, RapidChat
from specrag.serving.keys import Owner
from tests.rapid_parts import DOCUMENT
from tests.serving_parts import chat, rapid_models, served
from tests.test_serving_requests import refusal

ASKED = "who keeps the lamp of room 3"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def server(tiny):
    with served(rapid_models(tiny, transfer="none")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def file(client) -> str:
    return client.files.create(file=("notes.txt", DOCUMENT.encode()), purpose="user_data").id


def in_process(server, documents=(DOCUMENT,), **options) -> str:
    rapid = server.server.serving.models.rapid
    return RapidChat(rapid).complete([Message("user", ASKED)], documents=documents, sampling=GREEDY, **options)[0]


def test_an_uploaded_file_is_answered_from_as_in_this_process(server, client, file):
    part = {"type": "file", "file": {"file_id": file}}
    asked = {"model": "rapid", "temperature": 0, "max_tokens": 12}
    by_part = client.chat.completions.create(
        messages=[{"role": "user", "content": [part, {"type": "text", "text": ASKED}]}], **asked
    )
    by_field = client.chat.completions.create(
        messages=[{"role": "user", "content": ASKED}], extra_body={"specrag": {"file_ids": [file]}}, **asked
    )
    expected = in_process(server, max_tokens=12)
    assert by_part.choices[0].message.content == by_field.choices[0].message.content == expected
    assert by_part.choices[0].finish_reason == "length" and by_part.usage.completion_tokens == 12
    told = by_part.model_extra["specrag"]
    assert told["file_ids"] == [file] and 0 <= told["acceptance"] <= 1 and told["timings"]["total"] > 0


def test_the_reply_is_streamed_with_usage(server, client, file):
    stream = client.chat.completions.create(
        **chat(ASKED, "rapid", temperature=0, max_tokens=12, stream_options={"include_usage": True}),
        stream=True,
        extra_body={"specrag": {"file_ids": [file]}},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == in_process(server, max_tokens=12) and len(pieces) > 1
    assert chunks[-1].usage.completion_tokens == 12


def test_stop_strings_end_the_reply(server, client, file):
    whole = in_process(server, max_tokens=12)
    stop = whole[4:7]
    made = client.chat.completions.create(
        **chat(ASKED, "rapid", temperature=0, max_tokens=12, stop=[stop]), extra_body={"specrag": {"file_ids": [file]}}
    )
    assert made.choices[0].message.content == whole[: whole.index(stop)] and made.choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_reply(client, file):
    def reply(seed):
        asked = chat(ASKED, "rapid", temperature=1.0, max_tokens=12, seed=seed)
        made = client.chat.completions.create(**asked, extra_body={"specrag": {"file_ids": [file]}})
        return made.choices[0].message.content

    assert reply(-5) == reply(-5) != reply(6)


def test_a_conversation_without_files_is_read_too(client):
    made = client.chat.completions.create(
        model="rapid",
        temperature=0,
        max_tokens=4,
        messages=[
            {"role": "user", "content": DOCUMENT},
            {"role": "assistant", "content": "I have read it."},
            {"role": "user", "content": ASKED},
        ],
    )
    assert made.usage.completion_tokens == 4 and made.usage.prompt_tokens > 300


def test_files_are_listed_shown_and_deleted(client):
    made = client.files.create(file=("../a b.md", b"# Notes\n\nThe lamp is blue."), purpose="assistants")
    assert made.id.startswith("file-") and made.filename == "a b.md" and made.bytes == 26 and made.status == "processed"
    assert made.id in [file.id for file in client.files.list()]
    assert client.files.retrieve(made.id).purpose == "assistants"
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_texts_of_other_encodings_and_html_are_read(http, server):
    def text(name, raw):
        made = http.post("/v1/files", files={"file": (name, raw)}).json()
        return server.server.serving.files.get(Owner(), made["id"]).text, made["specrag"]["notes"]

    assert text("a.txt", "Müller".encode("utf-16"))[0] == "Müller"
    assert "lamp" in text("a.html", b"<html><body><script>x()</script><p>the lamp</p></body></html>")[0]
    guessed, notes = text("b.txt", "Die Straße führt über die Brücke nach München.".encode("cp1252"))
    assert "Straße" in guessed and notes


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "photo.png"),
        ("empty.txt", b"  \n ", "holds no text"),
        ("broken.pdf", b"%PDF-1.4 broken", "could not be read as PDF"),
    ],
)
def test_an_upload_that_is_no_text_says_so(http, name, raw, said):
    error = refusal(http.post("/v1/files", files={"file": (name, raw)}))
    assert said in error["message"] and error["param"] == "file" and error["code"] == "invalid_file"
    assert "/tmp" not in error["message"]


def test_a_form_without_a_file_or_with_two_is_refused(http):
    assert refusal(http.post("/v1/files", data={"purpose": "x"}))["param"] == "file"
    form = {"file": (None, "text without a name")}
    assert refusal(http.post("/v1/files", files=form))["param"] == "file"
    two = [("file", ("a.txt", b"a")), ("file", ("b.txt", b"b"))]
    assert refusal(http.post("/v1/files", files=two))["code"] == "invalid_form"
    assert refusal(http.post("/v1/files", json={"file": "x"}))["code"] == "invalid_type"


def test_a_document_that_is_too_long_names_its_field(http):
    made = http.post("/v1/files", files={"file": ("long.txt", "word " * 20_000)}).json()
    error = refusal(http.post("/v1/chat/completions", json=chat(ASKED, "rapid", specrag={"file_ids": [made["id"]]})))
    assert error["param"] == "specrag.file_ids" and error["code"] == "context_length_exceeded"


def test_a_file_that_is_not_there_names_its_field(http):
    error = refusal(http.post("/v1/chat/completions", json=chat(ASKED, "rapid", specrag={"file_ids": ["file-x"]})), 404)
    assert error["param"] == "specrag.file_ids" and error["code"] == "file_not_found"


def test_files_are_forgotten_when_their_time_is_over(tiny):
    with served(rapid_models(tiny), file_seconds=0.5) as running, running.client() as http:
        made = http.post("/v1/files", files={"file": ("a.txt", b"a text")}).json()
        assert made["expires_at"] >= made["created_at"]
        time.sleep(1.1)
        refusal(http.get(f"/v1/files/{made['id']}"), 404)
        assert http.get("/v1/files").json()["data"] == []


def test_the_sessions_of_all_keys_have_one_limit(tiny):
    with served(rapid_models(tiny), sessions=1) as running, running.client() as http:
        for text in ("The lamp is blue. ", "The bell is red. "):
            made = http.post("/v1/files", files={"file": ("a.txt", (text * 40).encode())}).json()
            asked = chat("what colour is it", "rapid", max_tokens=2, specrag={"file_ids": [made["id"]]})
            assert http.post("/v1/chat/completions", json=asked).status_code == 200
        assert running.server.serving.rapid.kept == {"": 1}


def test_metrics_tell_what_rapid_accepted(http, file):
    http.post("/v1/chat/completions", json=chat(ASKED, "rapid", max_tokens=8, specrag={"file_ids": [file]}))
    text = http.get("/metrics").text
    assert 'specrag_rapid_candidates_total{outcome="accepted"}' in text
    assert 'specrag_stage_seconds_bucket{le="+Inf",model="rapid",stage="verify"}' in text


@pytest.mark.slow
def test_a_real_model_answers_from_an_upload(quick_smollm2):
    text = "The lighthouse of Oddny was built in 1871. Its keeper was Halvard Lie. " * 12
    with served(rapid_models(quick_smollm2)) as running, running.client() as http:
        made = http.post("/v1/files", files={"file": ("notes.txt", text)}).json()
        asked = chat("Who was the keeper?", "rapid", temperature=0, max_tokens=24, specrag={"file_ids": [made["id"]]})
        reply = http.post("/v1/chat/completions", json=asked).json()
        assert "Halvard" in reply["choices"][0]["message"]["content"]
