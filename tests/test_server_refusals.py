"""What a server refuses, and what that teaches: about one request, one option, one endpoint, or all of it."""

import asyncio
import email.utils
import gzip
import json
import socket
import threading
import time
import zlib
from datetime import datetime, timedelta, timezone

import pytest

from langchain_specrag._convert import LangChainLM
from specrag import Passage, SpeculativeRAG
from specrag.errors import InvalidInputError, LogProbsUnavailableError, ModelError, ServerError
from specrag.models import GenerationRequest, OpenAILM, Sampling, Segment, Stage, Turn, _http
from specrag.models.chat import ChatLM, ChatReply
from tests.fakes import HashEmbedder
from tests.servers import serving

ASK = GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:", 16),))
SCORED = (Turn.of("user", "hi"), Turn("assistant", (Segment("Yes", "reflect"),)))


def refusal(message, **more):
    return json.dumps({"error": {"message": message, **more}}).encode()


CHAT = json.dumps({"choices": [{"message": {"content": "Answer: 42"}, "finish_reason": "stop"}]}).encode()
COMPLETION = json.dumps({"choices": [{"text": " 42", "finish_reason": "stop"}]}).encode()
ECHO = json.dumps(
    {"choices": [{"text": "", "logprobs": {"tokens": ["hi\n\n", "Yes", "."], "token_logprobs": [None, -0.5, -1.0]}}]}
).encode()


class Server:
    """Answers requests for a reply as ``answer(path, body)`` says: a status and a content."""

    def __init__(self, answer, seconds=lambda path: 0.0):
        self.answer, self.seconds = answer, seconds
        self.bodies, self.paths, self.headers = [], [], []

    def __call__(self, method, path, body, headers):
        if method == "GET":
            return 200, b'{"data": []}', {}
        own = json.loads(body)  # requests come side by side: the newest in the list may be another's
        self.bodies.append(own)
        self.paths.append(path)
        self.headers.append(headers)
        time.sleep(self.seconds(path))
        return *self.answer(path, own), {}


# --- scoring -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422])
def test_a_scoring_request_that_is_refused_says_nothing_of_the_next_one(status):
    answers = [(status, refusal("This model's maximum context length is 4096 tokens")), (200, ECHO)]
    with serving(Server(lambda path, body: answers.pop(0))) as url:
        lm = OpenAILM("m", url, retries=0)
        with pytest.raises(ServerError, match="maximum context length"):
            lm.score([SCORED])
        assert lm.capabilities.prompt_log_probs is None
        assert lm.score([SCORED])[0].log_probs == {"reflect": (-0.5,)}
        assert lm.capabilities.prompt_log_probs is True


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "Not Found"),
        (405, "Method Not Allowed"),
        (400, "echo is not supported"),
        (422, "Unrecognized request argument supplied: logprobs"),
        (400, "You are not allowed to request log_probs"),
    ],
)
def test_an_answer_that_names_what_is_missing_is_believed(status, message):
    server = Server(lambda path, body: (status, refusal(message)))
    with serving(server) as url:
        lm = OpenAILM("echo-model", url, retries=0)
        for _ in range(2):
            with pytest.raises(LogProbsUnavailableError):
                lm.score([SCORED])
    assert len(server.paths) == 1 and lm.capabilities.prompt_log_probs is False


def test_the_name_of_a_server_or_model_is_not_what_it_says():
    server = Server(lambda path, body: (400, refusal("too long")))
    with serving(server) as url:
        lm = OpenAILM("logprobs-echo", url.replace("/v1", "/echo/v1"), retries=0)
        with pytest.raises(ServerError, match="too long") as error:
            lm.score([SCORED])
    assert not isinstance(error.value, LogProbsUnavailableError)


# --- options -------------------------------------------------------------------------------------------------


def refusing(name, message, replacement=None):
    def answer(path, body):
        return (400, refusal(message)) if name in body else (200, CHAT if "chat" in path else COMPLETION)

    return Server(answer)


def test_a_limit_with_a_new_name_is_sent_under_it():
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server = refusing("max_tokens", message)
    with serving(server) as url:
        lm = OpenAILM("m", url)
        first, second = lm.generate([ASK])[0], lm.generate([ASK])[0]
    limit = server.bodies[0]["max_tokens"]
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, limit, limit]
    assert first.notes == second.notes == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
        ("top_k", "Unrecognized request argument supplied: top_k"),
        ("seed", "extra fields not permitted: seed"),
    ],
)
def test_an_option_that_is_refused_is_dropped_once_and_noted(name, message):
    server = refusing(name, message)
    with serving(server) as url:
        lm = OpenAILM("m", url)
        made = [lm.generate([ASK], Sampling(top_k=5, seed=1))[0] for _ in range(2)]
    assert [name in body for body in server.bodies] == [True, False, False]
    assert all(name in " ".join(completion.notes) for completion in made)


def test_a_limit_that_is_too_large_is_no_option_that_is_missing():
    server = Server(lambda path, body: (400, refusal("max_tokens is too large: 9000. This model supports 4096")))
    with serving(server) as url, pytest.raises(ServerError, match="too large"):
        OpenAILM("m", url).generate([ASK])
    assert len(server.bodies) == 1


def test_fewer_likely_tokens_are_asked_for_where_a_server_lists_fewer():
    message = "Requested sample logprobs of 20, which is greater than max allowed: 5"

    def answer(path, body):
        return (400, refusal(message)) if (body.get("logprobs") or 0) > 5 else (200, COMPLETION)

    server = Server(answer)
    with serving(server) as url:
        lm = OpenAILM("m", url, api="completions")
        lm.generate([ASK], top_log_probs=20)
        lm.generate([ASK], top_log_probs=20)
    assert [body.get("logprobs") for body in server.bodies] == [20, 5, None]  # it gave none, so none is asked for


def test_extra_fields_headers_and_room_for_thinking_are_sent():
    server = Server(lambda path, body: (200, CHAT))
    with serving(server) as url:
        plain = OpenAILM("m", url)
        plain.generate([ASK])
        lm = OpenAILM(
            "m",
            url,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
            headers={"X-Tenant": "t1"},
            thinking_tokens=2000,
        )
        lm.generate([ASK])
    assert server.bodies[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert server.headers[1]["X-Tenant"] == "t1"
    assert server.bodies[1]["max_tokens"] == server.bodies[0]["max_tokens"] + 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headers": {"X": 1}}, "headers must map names to strings"),
        ({"headers": {"X": "a\nb"}}, "the header X must be printable"),
        ({"api_key": "sk-ключ"}, "api_key must be printable ASCII"),
        ({"thinking_tokens": -1}, "thinking_tokens must be at least 0"),
        ({"base_url": "http://h/v1?api-key=topsecret"}, "has a query"),
        ({"base_url": "http://h:port/v1"}, "is no URL"),
        ({"base_url": "http:///v1"}, "names no host"),
    ],
)
def test_settings_are_checked_at_construction(options, message):
    with pytest.raises(InvalidInputError, match=message) as error:
        OpenAILM(**({"model": "m", "base_url": "http://127.0.0.1:9/v1"} | options))
    assert "topsecret" not in str(error.value)


class HostedLM(ChatLM):
    """A model of another library that refuses some options."""

    def __init__(self, refuses, error=ValueError):
        super().__init__("hosted")
        self.refuses, self.error, self.asked = dict(refuses), error, []

    async def reply(self, request):
        sent = {"temperature", "max_tokens"} | ({"logprobs", "top_logprobs"} if request.log_probs else set())
        sent -= request.without
        self.asked.append(sent)
        for name, message in self.refuses.items():
            if name in sent:
                raise self.error(message)
        return ChatReply("Answer: 42")


@pytest.mark.parametrize(
    ("refuses", "error"),
    [
        ({"logprobs": "logprobs is not supported with this model"}, ValueError),
        ({"top_logprobs": "Completions.create() got an unexpected keyword argument 'top_logprobs'"}, TypeError),
        ({"temperature": "'temperature' does not support 0", "max_tokens": "max_tokens unsupported"}, ValueError),
    ],
)
def test_a_model_of_another_library_is_asked_without_what_it_refuses(refuses, error):
    lm = HostedLM(refuses, error)
    assert [completion.text for completion in lm.generate([ASK] * 3)] == ["Answer: 42"] * 3
    asked = len(lm.asked)
    lm.generate([ASK])
    assert len(lm.asked) == asked + 1 and not lm.asked[-1] & set(refuses)


def test_a_failure_of_a_model_of_another_library_is_not_taken_for_a_refusal():
    class BusyError(Exception):
        status_code = 429

    lm = HostedLM({"max_tokens": "temperature and max_tokens: not allowed now"}, BusyError)
    with pytest.raises(ModelError, match="BusyError"):
        lm.generate([ASK])
    assert len(lm.asked) == 1


def test_a_real_chat_model_is_asked_without_what_its_server_refuses():
    """As newer hosted models do: no log-probabilities, no temperature but their own."""
    langchain_openai = pytest.importorskip("langchain_openai")
    refused = {
        "logprobs": "logprobs is not supported with this model",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    }

    def answer(path, body):
        for name, message in refused.items():
            if body.get(name) is not None:
                return 400, refusal(message)
        message = {"role": "assistant", "content": "Rationale: It is.\nAnswer: 42"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        return 200, json.dumps(reply).encode()

    server = Server(answer)
    with serving(server) as url:
        model = langchain_openai.ChatOpenAI(model="m", api_key="sk-0123456789abcdef", base_url=url, max_retries=0)
        lm = LangChainLM(model)
        rag = SpeculativeRAG(drafter=lm, embedder=HashEmbedder(), drafts=3)
        first = rag.answer("q", [Passage(f"passage {i}") for i in range(6)])
        asked = len(server.bodies)
        rag.answer("q", [Passage(f"passage {i}") for i in range(6)])
    assert first.text == "42" and not first.failures and any("temperature" in note for note in first.notes)
    assert all(not set(refused) & {k for k, v in body.items() if v is not None} for body in server.bodies[asked:])


@pytest.mark.parametrize(
    ("own", "sampling", "sent"),
    [(None, Sampling(), 0.0), (0.7, Sampling(), 0.7), (0.7, Sampling(temperature=0.3), 0.3)],
)
def test_a_temperature_that_the_user_set_on_the_model_is_respected(own, sampling, sent):
    langchain_openai = pytest.importorskip("langchain_openai")
    server = Server(lambda path, body: (400, refusal("seen")))
    with serving(server) as url:
        model = langchain_openai.ChatOpenAI(model="m", api_key="k", base_url=url, temperature=own, max_retries=0)
        with pytest.raises(ModelError, match="seen"):
            LangChainLM(model).generate([ASK], sampling)
    assert server.bodies[0]["temperature"] == sent


# --- endpoints, addresses, accounts ----------------------------------------------------------------------------


def test_requests_that_find_a_missing_endpoint_at_different_times_agree(smollm2):
    """The first finds it out, is answered by the other endpoint, and the rest find it out after that."""
    delays = iter([0.0, 0.3, 0.6])

    def seconds(path):
        return 0.0 if "chat" in path else next(delays, 0.0)

    def answer(path, body):
        return (200, CHAT) if "chat" in path else (404, b'{"detail": "Not Found"}')

    server = Server(answer, seconds)
    with serving(server) as url:
        lm = OpenAILM("m", url, tokenizer=smollm2.tokenizer, retries=0)

        async def ask():
            return await asyncio.gather(*(lm.agenerate([ASK]) for _ in range(3)))

        assert [made[0].text for made in asyncio.run(ask())] == ["Answer: 42"] * 3
        lm.generate([ASK])
    assert server.paths.count("/v1/completions") == 3  # it is not asked again


def test_a_server_with_neither_endpoint_is_said_to_have_neither():
    with serving(Server(lambda path, body: (404, b"Not Found"))) as url:
        for _ in range(2):
            with pytest.raises(ServerError, match="neither /completions nor /chat/completions"):
                OpenAILM("m", url, retries=0).generate([ASK] * 2)


def test_a_server_that_answers_every_path_with_a_chat_message_has_no_completions(smollm2):
    server = Server(lambda path, body: (200, CHAT))
    with serving(server) as url:
        lm = OpenAILM("m", url, tokenizer=smollm2.tokenizer)
        assert lm.generate([ASK])[0].text == "Answer: 42" and not lm.capabilities.prefill
        with pytest.raises(LogProbsUnavailableError, match="no log-probabilities of a prompt"):
            lm.score([SCORED])
        assert lm.capabilities.prompt_log_probs is False
        with pytest.raises(ServerError, match="has no /completions endpoint"):
            OpenAILM("m", url, api="completions").generate([ASK])
    assert server.paths.count("/v1/completions") == 3  # each of the requests was sent once


def test_one_server_of_a_pool_without_an_endpoint_does_not_change_the_endpoint():
    lacks = Server(lambda path, body: (404, b"Not Found"))
    has = Server(lambda path, body: (200, CHAT))
    with serving(lacks) as first, serving(has) as second:
        lm = OpenAILM("m", [first, second])
        lm.generate([ASK] * 6)
    assert set(has.paths) == {"/v1/chat/completions"} and not lm.capabilities.prefill


@pytest.mark.parametrize("status", [404, 200])
def test_an_address_without_a_version_gets_a_hint(status):
    with serving(Server(lambda path, body: (status, b"<html>Not Found</html>"))) as url:
        bare = url.removesuffix("/v1")
        with pytest.raises(ServerError, match=rf"is it {bare}/v1\?"):
            OpenAILM("m", bare, retries=0).generate([ASK])


def test_a_used_up_quota_is_not_retried_and_not_taken_for_a_server_that_is_away():
    server = Server(lambda path, body: (429, refusal("You exceeded your quota", code="insufficient_quota")))
    with serving(server) as url, pytest.raises(ServerError, match="quota is used up") as error:
        OpenAILM("m", url, backoff=0.01).generate([ASK])
    assert len(server.paths) == 1 and "is the server running" not in str(error.value)


def test_a_busy_server_is_not_asked_whether_it_runs():
    server = Server(lambda path, body: (429, refusal("slow down")))
    with serving(server) as url, pytest.raises(ServerError, match="slow down") as error:
        OpenAILM("m", url, retries=1, backoff=0.01).generate([ASK])
    assert "is the server running" not in str(error.value) and len(server.paths) == 2


@pytest.mark.parametrize("status", [425, 507, 520, 529])
def test_failures_of_other_vendors_that_may_pass_are_retried(status):
    answers = [(status, b"overloaded"), (200, CHAT)]
    with serving(Server(lambda path, body: answers.pop(0))) as url:
        assert OpenAILM("m", url, backoff=0.01).generate([ASK])[0].text == "Answer: 42"


def test_a_redirect_is_named_and_not_followed():
    def answer(method, path, body, headers):
        return 308, b"", {"Location": "https://elsewhere.example/v1/chat/completions"}

    with serving(answer) as url, pytest.raises(ServerError, match="redirects to https://elsewhere.example"):
        OpenAILM("m", url, api_key="sk-0123456789abcdef", retries=0).generate([ASK])


# --- sizes and times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_is_not_read_without_end(status, monkeypatch):
    monkeypatch.setattr(_http, "LARGEST_REPLY", 100_000)
    server = Server(lambda path, body: (status, b'{"x": "' + b"y" * 1_000_000))
    with serving(server) as url, pytest.raises(ServerError, match="more than 0 MiB"):
        OpenAILM("m", url, retries=0).generate([ASK])


def test_a_reply_that_drips_ends_at_the_timeout():
    """Each byte is in time for a limit per read; only the whole is not."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        stop = threading.Event()

        def drip():
            while not stop.is_set():
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not stop.wait(0.1):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        break

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        lm = OpenAILM("m", f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=0.5, retries=0)
        with pytest.raises(ServerError, match="no whole reply within 0.5 s"):
            lm.generate([ASK])
        assert time.monotonic() - start < 60
        stop.set()


# --- replies that are packed or empty -------------------------------------------------------------------


def answering(status, content, headers):
    """A server with one answer, headers included."""
    return serving(lambda method, path, body, given: (status, content, headers))


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_packed_reply_is_read(encoding, pack):
    with answering(200, pack(CHAT), {"Content-Encoding": encoding}) as url:
        assert OpenAILM("m", url, retries=0).generate([ASK])[0].text == "Answer: 42"


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "klingon"])
def test_a_few_bytes_cannot_become_gigabytes(encoding):
    """Of 64 KiB, gzip makes at most 64 MiB; gzip of gzip, or zstd, as much as it likes."""
    packed = gzip.compress(gzip.compress(b" " * 2**20))
    refused = pytest.raises(ServerError, match=f"content encoding '{encoding}', asked for gzip or deflate")
    with answering(200, packed, {"Content-Encoding": encoding}) as url, refused:
        OpenAILM("m", url, retries=0).generate([ASK])


@pytest.mark.parametrize(
    ("status", "content", "headers", "says"),
    [
        (204, b"", {}, r"answered with nothing \(HTTP 204\)"),
        (200, b" \n", {}, r"answered with nothing \(HTTP 200\)"),
        (200, CHAT, {"Content-Encoding": "gzip"}, "cannot be decoded"),
        (304, b"", {}, "HTTP 304"),
    ],
)
def test_an_empty_or_unreadable_reply_is_named_and_the_server_counts_as_running(status, content, headers, says):
    with answering(status, content, headers) as url, pytest.raises(ServerError, match=says) as error:
        OpenAILM("m", url, retries=0).generate([ASK])
    assert "is the server running" not in str(error.value) and "elsewhere" not in str(error.value)


def test_a_server_may_say_by_a_date_how_long_it_wants_to_be_left_alone():
    when = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=3), usegmt=True)
    asked = []

    def answer(method, path, body, headers):
        if method == "GET":
            return 200, b"{}", {}
        asked.append(time.monotonic())
        return (503, b"", {"Retry-After": when}) if len(asked) == 1 else (200, CHAT, {})

    with serving(answer) as url:
        OpenAILM("m", url, retries=1, backoff=0.01).generate([ASK])
    assert 1.5 < asked[1] - asked[0] < 3.5
