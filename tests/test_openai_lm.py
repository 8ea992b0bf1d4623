"""The client of OpenAI-compatible servers: against vLLM (recorded, or live with --vllm-url), against a real
server without log-probabilities (`transformers serve`), and against faults."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
import types

import httpx
import pytest

from specrag import Passage, SpeculativeRAG
from specrag.errors import InvalidInputError, LogProbsUnavailableError, ServerError
from specrag.models import GenerationRequest, OpenAILM, Sampling, Segment, Stage, TransformersLM, Turn, _circuit
from specrag.speculative.verification import Scoring
from tests.fakes import HashEmbedder
from tests.servers import live_or_replayed, serving

PASSAGES = [
    Passage("Tim Hortons opened its first shops in the United States in 1981.", title="Tim Hortons"),
    Passage("The first café of the chain opened in Hamilton in 1964. 你好", title="History"),
    Passage("Doughnuts are fried and glazed.", title="Doughnut"),
    Passage("Hamilton is a port city in Ontario.", title="Hamilton"),
]
QUESTION = "when did tim hortons open in the usa"
REQUESTS = [
    GenerationRequest(
        (Turn.of("user", f"[1] {p.title}: {p.text} [/1]\n\nQuestion: {QUESTION}?"),),
        (Stage("Rationale:", 24, ("\n",)), Stage("\nAnswer:", 12, ("\n",))),
    )
    for p in PASSAGES[:2]
]
CONVERSATIONS = [
    (
        Turn.of("user", f"Question: {QUESTION}"),
        Turn(
            "assistant",
            (Segment("Answer: "), Segment(answer, "contain"), Segment("\nRationale: "), Segment(why, "contain")),
        ),
        Turn.of("user", "Does the rationale support the answer? (Yes or No)"),
        Turn("assistant", (Segment("Yes", "reflect"),)),
    )
    for answer, why in (
        ("1981", "Its first shops there opened in 1981."),
        ("in a café", "Das Café 你好 is nice; naïve."),
    )
]
# The boundary stands inside a word.
CONVERSATIONS.append(
    (Turn.of("user", "hi"), Turn("assistant", (Segment("The capi"), Segment("tal of 日本", "contain"))))
)


@pytest.fixture(scope="module")
def vllm_url(request):
    with live_or_replayed(request.config.getoption("--vllm-url")) as url:
        yield url


@pytest.fixture(scope="module")
def vllm(vllm_url, smollm2_path):
    return OpenAILM("smollm2", vllm_url, tokenizer=smollm2_path, retries=0)


@pytest.fixture(scope="module")
def plain_smollm2(smollm2):
    return TransformersLM(smollm2.model, smollm2.tokenizer, chat_template=None)


# --- vLLM -----------------------------------------------------------------------------------------


def test_vllm_scores_agree_with_the_in_process_model_token_by_token(vllm, smollm2):
    for ours, theirs in zip(smollm2.score(CONVERSATIONS), vllm.score(CONVERSATIONS), strict=True):
        assert ours.log_probs.keys() == theirs.log_probs.keys()
        for name, values in ours.log_probs.items():
            assert theirs.log_probs[name] == pytest.approx(values, abs=1e-3)
    assert vllm.capabilities.prompt_log_probs is True


def test_vllm_drafts_agree_with_the_in_process_model(vllm, smollm2):
    for ours, theirs in zip(smollm2.generate(REQUESTS), vllm.generate(REQUESTS), strict=True):
        assert [p.text for p in theirs.parts] == [p.text for p in ours.parts]
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            assert b.log_probs == pytest.approx(a.log_probs, abs=1e-3)
            assert b.token_ends == a.token_ends
    assert vllm.capabilities.generation_log_probs is True and vllm.context_window == 4096


def test_vllm_without_a_tokenizer_scores_plain_text(vllm_url, plain_smollm2):
    lm = OpenAILM("smollm2", vllm_url, retries=0)
    for ours, theirs in zip(plain_smollm2.score(CONVERSATIONS), lm.score(CONVERSATIONS), strict=True):
        for name, values in ours.log_probs.items():
            assert theirs.log_probs[name] == pytest.approx(values, abs=1e-3)


def test_vllm_without_a_tokenizer_drafts_in_free_form_with_log_probabilities(vllm_url):
    lm = OpenAILM("smollm2", vllm_url, retries=0)
    completion = lm.generate(REQUESTS[:1], top_log_probs=3)[0]
    part = completion.parts[0]
    assert not completion.staged and part.text.strip()
    assert len(part.log_probs) == len(part.token_ends) == part.tokens
    assert part.token_ends[-1] == len(part.text)
    assert all(len(top) >= 3 for top in part.top_log_probs)


def test_vllm_drafter_and_verifier_answer_like_the_in_process_pipeline(vllm, smollm2):
    def answered(lm):
        return SpeculativeRAG(
            drafter=lm, embedder=HashEmbedder(), drafts=2, max_rationale_tokens=16, max_answer_tokens=8
        ).answer(QUESTION, PASSAGES)

    ours, theirs = answered(smollm2), answered(vllm)
    assert theirs.text == ours.text and theirs.scores_used == ours.scores_used
    for a, b in zip(ours.verdicts, theirs.verdicts, strict=True):
        assert b.log_score == pytest.approx(a.log_score, abs=0.02)


def test_vllm_refusing_a_request_says_why_and_is_not_asked_again(vllm_url, smollm2_path):
    lm = OpenAILM("smollm2", vllm_url, tokenizer=smollm2_path, retries=3)
    too_long = GenerationRequest((Turn.of("user", "hi"),), (Stage(max_tokens=9000),))
    with pytest.raises(ServerError, match="max_tokens"):
        lm.generate([too_long])


# --- transformers serve: a real server without log-probabilities ---------------------------------------


@pytest.fixture(scope="module")
def transformers_serve(smollm2_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"transformers serve ended: {server.stdout.read().decode()[-2000:]}")
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
def test_a_server_without_log_probabilities_is_found_out_and_still_drafts(transformers_serve, smollm2_path):
    lm = OpenAILM(str(smollm2_path), transformers_serve, retries=1)
    with pytest.raises(LogProbsUnavailableError, match="gives no log-probabilities of a prompt's own tokens"):
        lm.score(CONVERSATIONS[:1])
    assert lm.capabilities.prompt_log_probs is False
    required = OpenAILM(str(smollm2_path), transformers_serve, prompt_log_probs="required", retries=1)
    with pytest.raises(ServerError, match="vLLM and SGLang do"):
        required.score(CONVERSATIONS[:1])
    rag = SpeculativeRAG(
        drafter=lm, embedder=HashEmbedder(), drafts=2, max_rationale_tokens=12, max_answer_tokens=6, scoring=Scoring()
    )
    answer = rag.answer(QUESTION, PASSAGES)
    assert answer.verdicts and all(v.draft.text for v in answer.verdicts)
    assert lm.capabilities.generation_log_probs is False
    assert answer.scores_used == ()
    assert any("agreement among drafts" in note for note in answer.notes)


# --- faults ------------------------------------------------------------------------------------------


def chat_reply(text="Answer: 42"):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {}}).encode()


def models_reply(owner="someone"):
    return json.dumps({"data": [{"id": "m", "owned_by": owner}]}).encode()


ASK = [GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:"),))]


class Flaky:
    """Answers the first requests for a reply with the given statuses, then properly."""

    def __init__(self, *statuses, headers=None, message="try later"):
        self.statuses, self.headers, self.message = list(statuses), headers or {}, message
        self.asked = []

    def __call__(self, method, path, body, headers):
        if method == "GET":
            return 200, models_reply(), {}
        self.asked.append((time.monotonic(), json.loads(body), headers))
        if self.statuses:
            return self.statuses.pop(0), json.dumps({"error": {"message": self.message}}).encode(), self.headers
        return 200, chat_reply(), {}


@pytest.mark.parametrize("statuses", [(429,), (500, 503), (502, 429, 408)])
def test_passing_failures_are_retried(statuses):
    server = Flaky(*statuses)
    with serving(server) as url:
        assert OpenAILM("m", url, backoff=0.01).generate(ASK)[0].text == "Answer: 42"
    assert len(server.asked) == len(statuses) + 1


def test_retry_after_is_obeyed():
    server = Flaky(429, headers={"Retry-After": "0.5"})
    with serving(server) as url:
        OpenAILM("m", url, backoff=0.001).generate(ASK)
    assert server.asked[1][0] - server.asked[0][0] >= 0.5


def test_lasting_failures_end_with_what_the_server_said():
    server = Flaky(*[503] * 9, message="overloaded")
    with serving(server) as url, pytest.raises(ServerError, match="after 3 attempts.*HTTP 503: overloaded"):
        OpenAILM("m", url, backoff=0.01, retries=2).generate(ASK)
    assert len(server.asked) == 3


def test_refusals_are_not_retried():
    server = Flaky(400, 400, message="bad temperature")
    with serving(server) as url, pytest.raises(ServerError, match="bad temperature"):
        OpenAILM("m", url, backoff=0.01).generate(ASK)
    assert len(server.asked) == 1


def test_an_unreachable_server_is_named():
    with pytest.raises(ServerError, match=r"no answer from http://127.0.0.1:9/v1.*is the server running"):
        OpenAILM("m", "http://127.0.0.1:9/v1", retries=1, backoff=0.01).generate(ASK)


def test_a_server_that_hangs_runs_into_the_timeout():
    def hang(method, path, body, headers):
        if method == "POST":
            time.sleep(1.5)
        return 200, models_reply(), {}

    with serving(hang) as url, pytest.raises(ServerError, match="ReadTimeout"):
        OpenAILM("m", url, timeout=0.2, retries=0).generate(ASK)


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b'{"object": "x"}'])
def test_replies_that_are_not_the_protocol_are_refused(reply):
    def answer(method, path, body, headers):
        return 200, models_reply() if method == "GET" else reply, {}

    with serving(answer) as url, pytest.raises(ServerError, match="JSON|no choices"):
        OpenAILM("m", url, retries=0).generate(ASK)


@pytest.mark.parametrize("error", [{"message": "no GPU left for sk-very-secret"}, "no GPU left for sk-very-secret"])
def test_an_error_in_a_reply_of_status_200_is_said_without_the_key(error):
    def answer(method, path, body, headers):
        return 200, models_reply() if method == "GET" else json.dumps({"error": error}).encode(), {}

    with serving(answer) as url, pytest.raises(ServerError, match="no GPU left") as raised:
        OpenAILM("m", url, api_key="sk-very-secret", retries=0).generate(ASK)
    assert "very-secret" not in str(raised.value)


def test_the_api_key_is_sent_and_never_shown(caplog):
    key = "sk-very-secret"
    server = Flaky(401, message=f"Incorrect API key provided: {key}")
    with serving(server) as url, caplog.at_level(logging.DEBUG):
        lm = OpenAILM("m", url, api_key=key)
        with pytest.raises(ServerError) as error:
            lm.generate(ASK)
    assert server.asked[0][2]["Authorization"] == f"Bearer {key}"
    assert key not in str(error.value) + repr(error.value) + repr(lm) + str(lm) + caplog.text
    assert "secret" not in repr(OpenAILM("m", "http://user:secret@127.0.0.1:9/v1"))


def test_a_pool_shares_the_work_and_survives_a_dead_member():
    servers = [Flaky(), Flaky()]
    with serving(servers[0]) as first, serving(servers[1]) as second:
        lm = OpenAILM("m", [first, second, "http://127.0.0.1:9/v1"], backoff=0.01)
        completions = lm.generate(ASK * 12)
    assert len(completions) == 12
    assert all(len(server.asked) >= 3 for server in servers)


def test_a_dead_member_costs_no_waiting_and_is_asked_again_when_it_is_back(monkeypatch):
    server, back = Flaky(), Flaky()
    with serving(back) as dead:
        pass
    with serving(server) as url:
        lm = OpenAILM("m", [url, dead], backoff=60.0)
        start = time.monotonic()
        lm.generate(ASK * 3)
        lm.generate(ASK)
        assert time.monotonic() - start < 30  # no retry of the dead one was waited for
        assert len(server.asked) == 4
        with serving(back, port=int(dead.split(":")[2].removesuffix("/v1"))):
            later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + _circuit.PASSED_OVER)
            monkeypatch.setattr(_circuit, "time", later)
            lm.generate(ASK * 4)
    assert len(server.asked) >= 4 and len(back.asked) >= 1


def test_concurrency_is_limited():
    running, peak = 0, 0

    def slow(method, path, body, headers):
        nonlocal running, peak
        if method == "GET":
            return 200, models_reply(), {}
        running += 1
        peak = max(peak, running)
        time.sleep(0.05)
        running -= 1
        return 200, chat_reply(), {}

    with serving(slow) as url:
        OpenAILM("m", url, max_concurrency=3).generate(ASK * 10)
    assert 1 < peak <= 3


def test_a_server_that_refuses_to_be_asked_for_log_probabilities_is_not_asked_again():
    asked = []

    def answer(method, path, body, headers):
        if method == "GET":
            return 200, models_reply(), {}
        asked.append(json.loads(body))
        if "logprobs" in asked[-1]:
            return 422, json.dumps({"error": {"message": "unexpected field logprobs"}}).encode(), {}
        return 200, chat_reply(), {}

    with serving(answer) as url:
        lm = OpenAILM("m", url)
        assert lm.generate(ASK)[0].parts[0].log_probs is None
        lm.generate(ASK)
    assert ["logprobs" in body for body in asked] == [True, False, False]
    assert lm.capabilities.generation_log_probs is False


def test_a_server_without_chat_is_spoken_to_through_completions():
    def answer(method, path, body, headers):
        if method == "GET":
            return 200, models_reply(), {}
        if "chat" in path:
            return 404, b'{"detail": "Not Found"}', {}
        return 200, json.dumps({"choices": [{"text": " 42", "finish_reason": "stop"}]}).encode(), {}

    with serving(answer) as url:
        for completion in OpenAILM("m", url).generate(ASK * 3):  # three requests find it out at once
            assert completion.staged and completion.text == " 42"
        with pytest.raises(ServerError, match="has no /chat endpoint"):
            OpenAILM("m", url, api="chat").generate(ASK)


def test_a_part_that_a_stop_string_ended_too_early_is_continued_where_it_ended():
    written = [("", "\n"), (" because", "\n"), (" 42", None)]
    prompts = []

    def answer(method, path, body, headers):
        if method == "GET":
            return 200, models_reply(), {}
        prompts.append(json.loads(body)["prompt"])
        text, stopped = written[len(prompts) - 1]
        choice = {"text": text, "finish_reason": "stop", "stop_reason": stopped}
        return 200, json.dumps({"choices": [choice]}).encode(), {}

    asked = GenerationRequest((Turn.of("user", "hi"),), (Stage("Rationale:", 9, ("\n",)), Stage("\nAnswer:", 9)))
    with serving(answer) as url:
        completion = OpenAILM("m", url, api="completions").generate([asked])[0]
    assert [part.text for part in completion.parts] == ["\n because", " 42"]
    assert prompts == [
        "hi\n\nRationale:",
        "hi\n\nRationale:\n",
        "hi\n\nRationale:\n because\nAnswer:",
    ]


def test_sampling_settings_reach_the_server_with_a_seed_a_row():
    server = Flaky()
    with serving(server) as url:
        OpenAILM("m", url, max_concurrency=1).generate(ASK * 2, Sampling(temperature=0.7, top_p=0.9, seed=5))
    bodies = sorted((body for _, body, _ in server.asked), key=lambda body: body["seed"])
    assert [body["seed"] for body in bodies] == [5, 6]
    assert bodies[0]["temperature"] == 0.7 and bodies[0]["top_p"] == 0.9


def test_one_model_serves_several_event_loops():
    with serving(Flaky()) as url:
        lm = OpenAILM("m", url)

        async def ask():
            made = await lm.agenerate(ASK)
            await lm.aclose()
            return made[0].text

        assert asyncio.run(ask()) == asyncio.run(ask()) == lm.generate(ASK)[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": []}, "base_url is empty"),
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"timeout": 0}, "timeout must be a positive"),
        ({"timeout": "5"}, "timeout must be a number, got '5'"),
        ({"backoff": -1}, "backoff must be at least 0"),
        ({"retries": 2.5}, "retries must be a whole number, got 2.5"),
        ({"max_concurrency": True}, "max_concurrency must be a whole number, got True"),
        ({"context_window": "4096"}, "context_window must be a whole number, got '4096'"),
        ({"context_window": -1}, "context_window must be at least 1"),
        ({"thinking_tokens": "x"}, "thinking_tokens must be a whole number"),
        ({"api_key": 5}, "api_key must be a text, got int"),
        ({"model": None}, "model must be the name under which the server knows it, got None"),
        ({"base_url": 5}, "base_url must be a URL or a list of them, got int"),
        ({"api": "grpc"}, "api must be"),
        ({"prompt_log_probs": "maybe"}, "prompt_log_probs must be"),
    ],
)
def test_settings_are_checked_at_construction(options, message):
    with pytest.raises(InvalidInputError, match=message):
        OpenAILM(**({"model": "m", "base_url": "http://127.0.0.1:9/v1"} | options))
