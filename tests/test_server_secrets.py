"""Keys and passwords are shown nowhere: not in errors, notes, failures or any library's log."""

import json
import logging
import types

import pytest
from langchain_core.documents import Document
from pydantic import SecretStr

from specrag import Passage, SpeculativeRAG
from specrag.cli.served import Served
from specrag.errors import DraftingError, ModelError, ServerError
from specrag.models import GenerationRequest, OpenAIEmbedder, OpenAILM, Stage, Turn
from specrag.models._secrets import redacted, secrets_of
from specrag.models.chat import ChatLM
from tests.fakes import HashEmbedder
from tests.servers import serving

ASK = GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:", 16),))


def echoing(method, path, body, headers):
    """A server that puts everything that it was told into its error."""
    said = {"message": f"bad request from {headers} at {path}"}
    return 401, json.dumps({"error": said}).encode(), {}


@pytest.mark.parametrize("kind", [OpenAILM, OpenAIEmbedder])
def test_a_password_in_an_address_is_sent_and_never_shown(kind, caplog):
    seen = []

    def answer(method, path, body, headers):
        seen.append(headers.get("Authorization"))
        return echoing(method, path, body, headers)

    with serving(answer) as url, caplog.at_level(logging.DEBUG):
        address = url.replace("http://", "http://someone:p%40ss-word@")
        lm = kind("m", address, retries=0) if kind is OpenAILM else kind(address, "m", retries=0)
        with pytest.raises(ServerError) as error:
            lm.generate([ASK]) if kind is OpenAILM else lm.embed(["x"])
    shown = f"{error.value} {error.value!r} {lm!r} {caplog.text} {error.value.__cause__}"
    assert seen[-1] == "Basic c29tZW9uZTpwQHNzLXdvcmQ="
    for secret in ("p%40ss-word", "p@ss-word", "c29tZW9uZTpwQHNzLXdvcmQ"):
        assert secret not in shown


def test_a_secret_header_is_never_shown(caplog):
    with serving(echoing) as url, caplog.at_level(logging.DEBUG), pytest.raises(ServerError) as error:
        OpenAILM("m", url, headers={"api-key": "0f1e2d3c4b"}, retries=0).generate([ASK])
    assert "0f1e2d3c4b" not in str(error.value) + caplog.text and "***" in str(error.value)


def test_the_key_of_another_librarys_model_is_in_no_failure():
    class HostedLM(ChatLM):
        async def reply(self, request):
            raise RuntimeError("401: Incorrect API key provided: topsecret99. Also sk-proj-0123456789abcdef")

    lm = HostedLM("hosted")
    lm.model = types.SimpleNamespace(bound=types.SimpleNamespace(openai_api_key=SecretStr("topsecret99")))
    with pytest.raises(ModelError, match="Incorrect API key") as error:
        lm.generate([ASK])
    with pytest.raises(DraftingError) as lost:
        SpeculativeRAG(drafter=lm, embedder=HashEmbedder()).answer("q", [Passage("x"), Passage("y")])
    for shown in (error, lost):
        assert "topsecret99" not in str(shown.value) and "0123456789abcdef" not in str(shown.value)


def test_a_real_clients_key_is_in_no_failure():
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_specrag import SpeculativeRAGRunnable

    with serving(echoing) as url:
        model = langchain_openai.ChatOpenAI(model="m", api_key="topsecret99", base_url=url, max_retries=0)
        chain = SpeculativeRAGRunnable(drafter=model, embedder=HashEmbedder())
        with pytest.raises(DraftingError, match="401") as error:
            chain.invoke({"input": "q", "context": [Document("x"), Document("y")]})
    assert "topsecret99" not in str(error.value)


def test_secrets_are_found_by_type_and_by_name():
    settings = {
        "openai_api_key": SecretStr("one-secret"),
        "api_key": "two-secret",
        "default_headers": {"Authorization": "Bearer three-secret", "User-Agent": "x"},
        "model": "gpt",
    }
    assert set(secrets_of(settings)) == {"one-secret", "two-secret", "Bearer three-secret"}


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-abcdef0123456789.",
        "Authorization: Bearer abcdef0123456789",
        "http://someone:abcdef0123456789@host/v1 refused",
        "token hf_abcdef0123456789",
    ],
)
def test_what_looks_like_a_key_is_hidden_whoever_wrote_it(text):
    assert "abcdef0123456789" not in redacted(text)


def test_words_of_a_message_stay():
    message = "max_tokens is too large: task-oriented, sk-means, skip; ask key-value at https://host/a@b"
    assert redacted(message, ["abc", ""]) == message


def test_options_that_hold_a_key_do_not_show_it():
    options = {"server": "http://127.0.0.1:9/v1", "api_key": "a-secret-key"}
    assert "a-secret-key" not in repr(Served.of(options)) and Served.of(options).api_key == "a-secret-key"
