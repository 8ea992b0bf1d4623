"""What replies of servers and hosted models say, and what they leave out: log-probabilities, texts, thinking."""

import json
import math
from dataclasses import replace
from enum import Enum
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from specrag.errors import ModelError, ServerError, SpecRAGError
from specrag.models import Completion, GenerationRequest, OpenAIEmbedder, OpenAILM, Score, Segment, Stage, Turn
from specrag.models._logprobs import listed_tokens
from specrag.models.base import GeneratedText
from specrag.models.chat import ChatLM, ChatReply, answer_start, ended_at_limit
from specrag.models.tokenization import ConversationEncoder
from specrag.schema import Draft, Usage
from specrag.speculative.affirmation import yes_log_probability
from specrag.speculative.drafting import Assignment, Drafter, split_reply, total
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import Verifier, draft_score
from tests.fakes import ScriptedLM, part
from tests.servers import serving

ASK = GenerationRequest((Turn.of("user", "hi"),), (Stage("Answer:", 16),))
PLAIN = GenerationRequest((Turn.of("user", "hi"),))
CONVERSATION = (
    Turn("assistant", (Segment("Answer: "), Segment("日本 😀 wins", "contain"))),
    Turn.of("user", "True?"),
    Turn("assistant", (Segment("Yes", "reflect"),)),
)
DRAFT = Draft(0, (0,), (), "42", "because", log_answer=-1.0, log_rationale=-2.0, answer_tokens=1, rationale_tokens=1)


class HostedLM(ChatLM):
    """A model of another library that answers as given."""

    def __init__(self, reply):
        super().__init__("hosted")
        self._reply = reply

    async def reply(self, request):
        return self._reply


def one_answer(answer):
    """A server that answers every request for a reply with ``answer``."""

    def respond(method, path, body, headers):
        return 200, json.dumps({"data": []} if method == "GET" else answer).encode(), {}

    return serving(respond)


def completion(text, logprobs, **more):
    choice = {"text": text, "finish_reason": "stop", "logprobs": logprobs, **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}


def content(*tokens):
    return [{"token": token, "logprob": value} for token, value in tokens]


# --- what is missing is None ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": content((" 4", -0.5), ("2", -0.25))},
        {"tokens": [" 4", "2"], "token_logprobs": [-0.5, -0.25], "top_logprobs": None},
    ],
    ids=["as in chat replies", "as in completions"],
)
def test_both_shapes_of_log_probabilities_are_read(logprobs):
    with one_answer(completion(" 42", logprobs)) as url:
        made = OpenAILM("m", url, api="completions", retries=0).generate([ASK])[0].parts[0]
    assert made.log_probs == (-0.5, -0.25) and made.tokens == 2 and made.token_ends == (2, 3)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": []},
        {"content": None},
        {"content": [{"token": " 42"}]},
        {"content": content((" 42", None))},
        {"content": content((" 42", "-0.5"))},
        {"content": content((" 42", 0.7))},
        {"content": [" 42"]},
        {"tokens": [], "token_logprobs": []},
        {"tokens": [" 4", "2"], "token_logprobs": [-0.5]},
        {"tokens": [" 4", "2"], "token_logprobs": [-0.5, None]},
        {"tokens": None, "token_logprobs": [-0.5]},
        {"tokens": [" 4"], "token_logprobs": [-0.5]},
        {"tokens": [" something else"], "token_logprobs": [-0.5]},
        [],
        "none",
    ],
)
def test_log_probabilities_that_are_missing_or_odd_are_none_and_never_certainty(logprobs):
    with one_answer(completion(" 42", logprobs)) as url:
        made = OpenAILM("m", url, api="completions", retries=0).generate([ASK], top_log_probs=5)[0].parts[0]
    assert made.text == " 42" and made.log_probs is None and made.token_ends is None


def test_minus_infinity_stays_what_it_is():
    with one_answer(completion(" 42", {"content": content((" 42", -math.inf))})) as url:
        made = OpenAILM("m", url, api="completions", retries=0).generate([ASK])[0].parts[0]
    assert made.log_probs == (-math.inf,)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize(
    "listed", [{"content": content((" 42", math.nan))}, {"tokens": ["42"], "token_logprobs": [math.nan]}]
)
def test_a_reply_whose_log_probabilities_are_nan_is_asked_of_another_server(api, listed):
    """Its model is broken, and so is what it wrote."""
    reply = completion(" 42", listed)
    reply["choices"][0]["message"] = {"content": " 42"}
    well = completion(" 43", None)
    well["choices"][0]["message"] = {"content": " 43"}
    with one_answer(reply) as broken, one_answer(well) as other:
        assert OpenAILM("m", [broken, other], api=api).generate([ASK])[0].text.strip() == "43"
        with pytest.raises(ServerError, match="not numbers.*NaN"):
            OpenAILM("m", broken, api=api, retries=0).generate([ASK])


def test_the_bytes_of_a_token_are_no_booleans():
    token = {"token": "\ufffd", "bytes": [True], "logprob": -1.0}
    assert listed_tokens({"content": [token]})[0].data is None


@pytest.mark.parametrize("kind", [5, None, ["text"]])
def test_a_part_of_a_message_of_an_odd_type_is_no_text(kind):
    reply = {"choices": [{"message": {"content": [{"type": kind, "text": "?"}, {"type": "text", "text": "42"}]}}]}
    with one_answer(reply) as url:
        assert OpenAILM("m", url, api="chat", retries=0).generate([ASK])[0].text == "42"


def test_an_empty_sum_is_no_draft_score():
    """log(1 + 1) = 0.69 would win over every draft whose tokens are known."""
    assert total(()) is None and total(None) is None and total((-1.0, -2.0)) == -3.0
    assert draft_score(replace(DRAFT, log_answer=total(()), log_rationale=total(()))) is None


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ({"Yes": -math.inf, "No": 0.0}, -math.inf),
        ({"Yes": -math.inf, " yes": -2.0}, -2.0),
        ({"Yes": -math.inf, " yes": -math.inf, "No": -0.1}, -math.inf),
        ({"No": -0.1, "Maybe": -math.inf}, -math.inf),
    ],
)
def test_minus_infinity_for_yes_is_impossible_and_not_certain(top, expected):
    assert yes_log_probability(top) == pytest.approx(expected)


def test_a_yes_without_a_number_is_missing():
    listed = [{"token": "No", "logprob": -0.1}, {"token": "Yes", "logprob": None}]
    reply = ChatReply("No", [{"token": "No", "logprob": -0.1, "top_logprobs": listed}])
    made = HostedLM(reply).generate([PLAIN], top_log_probs=5)[0].parts[0]
    assert yes_log_probability(made.top_log_probs[0]) is None and made.log_probs == (-0.1,)


@pytest.mark.parametrize("values", [(-1.0, 0.5), (0.002,), (math.inf,)])
def test_no_log_probability_is_above_zero(values):
    with pytest.raises(ModelError, match="above 0"):
        GeneratedText("x", values, len(values))
    with pytest.raises(ModelError, match="above 0"):
        Score({"self_reflect": values})
    assert GeneratedText("x", (1e-6,), 1).log_probs == (1e-6,)  # rounding


async def test_an_echo_with_a_gap_costs_the_segment_and_says_so():
    pieces = [
        ("Answer: ", None),
        ("日本", -1.0),
        (" 😀", -1.0),
        (" wins", None),
        ("\n\nTrue?\n\n", -1.0),
        ("Yes", -0.5),
    ]
    with one_answer(echo(pieces)) as url:
        score = OpenAILM("m", url, retries=0).score([CONVERSATION])[0]
    assert score.log_probs == {"reflect": (-0.5,)} and "contain" in score.notes[0]
    lm = ScriptedLM(lambda _: None)
    lm.score = lambda requests: [score for _ in requests]
    verified = await Verifier(lm).verify("q", [DRAFT])
    assert verified.outcomes[0].log_self_contain is None and verified.notes == score.notes


# --- where the tokens are ----------------------------------------------------------------------------


def echo(pieces, **more):
    """An echoed prompt, and the one token that is written after it."""
    tokens = [text for text, _ in pieces]
    logprobs = {"tokens": [*tokens, "."], "token_logprobs": [*(value for _, value in pieces), -3.0], **more}
    made = completion("".join(tokens) + ".", logprobs)
    return {**made, "usage": {"prompt_tokens": len(tokens), "completion_tokens": 1}}


DAMAGED = [
    ("Answer: ", None),
    ("日", -1.0),
    ("\ufffd", -1.0),
    ("\ufffd", -1.0),
    (" \ufffd", -1.0),
    ("\ufffd", -1.0),
    ("\ufffd", -1.0),
    (" wins", -1.0),
    ("\n\nTrue?\n\n", -1.0),
    ("Yes", -0.5),
]


def test_the_token_that_is_written_after_an_echo_belongs_to_no_segment():
    pieces = [("Answer: ", None), ("日本 😀 wins", -1.0), ("\n\nTrue?\n\n", -1.0), ("Yes", -0.5)]
    with one_answer(echo(pieces)) as url:
        score = OpenAILM("m", url, retries=0).score([CONVERSATION])[0]
    assert score.log_probs == {"contain": (-1.0,), "reflect": (-0.5,)}


def test_damaged_token_texts_shift_no_segment():
    with one_answer(echo(DAMAGED)) as url:
        score = OpenAILM("m", url, retries=0).score([CONVERSATION])[0]
    assert score.log_probs == {} and "do not add up" in score.notes[0]


def test_damaged_token_texts_are_placed_by_the_local_tokenizer(smollm2):
    encoded = ConversationEncoder(smollm2.tokenizer).encode_scored(CONVERSATION)
    texts = [smollm2.tokenizer.decode([token]) for token in encoded.ids]
    assert "\ufffd" in "".join(texts)
    pieces = [(text, None if i == 0 else -float(i)) for i, text in enumerate(texts)]
    with one_answer(echo(pieces)) as url:
        score = OpenAILM("m", url, tokenizer=smollm2.tokenizer, retries=0).score([CONVERSATION])[0]
    expected = {name: tuple(-float(i) for i in at) for name, at in encoded.segments.items()}
    assert score.log_probs == expected and len(expected["reflect"]) == 1


def test_bytes_place_the_tokens_of_a_chat_reply():
    data = "好😀!".encode()
    items = [
        {"token": "\ufffd", "bytes": list(data[:2]), "logprob": -1.0},
        {"token": "\ufffd", "bytes": list(data[2:5]), "logprob": -2.0},
        {"token": "\ufffd!", "bytes": list(data[5:]), "logprob": -3.0},
    ]
    made = HostedLM(ChatReply("好😀!", items)).generate([PLAIN])[0].parts[0]
    assert sum(made.log_probs) == pytest.approx(-5.0) and made.token_ends[-1] == 3  # the first ends inside a character
    without = [{**item, "bytes": None} for item in items]
    completion = HostedLM(ChatReply("好😀!", without)).generate([PLAIN])[0]
    assert completion.parts[0].log_probs is None and "do not add up" in completion.notes[0]


# --- a token that a stop string cuts ----------------------------------------------------------------


def cut_by_stop(listed, written, text="in 1898.", stop=("\n",), tokenizer=None, finish="stop"):
    """What is read of ``text``, which a stop string may have ended inside a token that the server does not list."""
    answer = completion(text, {"content": content(*((token, -0.5) for token in listed))}, finish_reason=finish)
    answer["usage"]["completion_tokens"] = written
    request = GenerationRequest((Turn.of("user", "hi"),), (Stage("", 16, stop),))
    options = {"api": "completions", "tokenizer": tokenizer, "chat_template": None} if tokenizer else {}
    with one_answer(answer) as url:
        return OpenAILM("m", url, retries=0, **{"api": "completions", **options}).generate([request])[0]


def test_a_token_that_a_stop_string_cuts_need_not_be_listed(smollm2_tokenizer):
    """Qwen's tokenizers have ".\\n" as one token, so llama.cpp lists the last characters of few of their lines."""
    made = cut_by_stop(["in", " 1898"], written=3).parts[0]
    assert made.log_probs == (-0.5, -0.5) and made.token_ends == (2, 7) and made.tokens == 2
    spelled = smollm2_tokenizer.tokenize(" quick brown")
    assert spelled == ["Ġquick", "Ġbrown"]
    made = cut_by_stop(["The"], 3, "The qu", ("ick b",), smollm2_tokenizer).parts[0]
    assert made.log_probs == (-0.5,) and made.token_ends == (3,)


@pytest.mark.parametrize(
    ("listed", "written", "more"),
    [
        (["in"], 3, {}),  # two tokens are missing, and one of them may lie within the text
        (["in", " 1898"], 2, {}),  # none is missing by the server's count
        (["in", " 1898"], 0, {}),  # it does not count
        (["in", " 1898"], 3, {"stop": ()}),  # there was no stop string
        (["in", " 1898"], 3, {"finish": "length"}),  # no stop string ended it
        ([" 1898"], 2, {"text": "in 1898."}),  # not the beginning of the text
    ],
)
def test_a_list_that_ends_before_its_text_is_missing_otherwise(listed, written, more):
    made = cut_by_stop(listed, written, **more)
    assert made.parts[0].log_probs is None and "do not add up" in made.notes[0]


def test_the_tokenizer_says_whether_one_token_was_cut(smollm2_tokenizer):
    """llama.cpp leaves as many tokens out as the stop string has; one of them may lie within the text."""
    made = cut_by_stop(["The"], 3, "The quick b", ("rown",), smollm2_tokenizer)
    assert made.parts[0].log_probs is None and "do not add up" in made.notes[0]


def test_a_chat_reply_that_a_stop_string_cut_keeps_its_log_probabilities():
    request = GenerationRequest((Turn.of("user", "hi"),), (Stage("", 16, ("\n",)),))
    reply = ChatReply("in 1898.", content(("in", -0.5), (" 1898", -0.25)), Usage(3, 3))
    assert HostedLM(reply).generate([request])[0].parts[0].log_probs == (-0.5, -0.25)
    assert HostedLM(replace(reply, cut=True)).generate([request])[0].parts[0].log_probs is None
    assert HostedLM(reply).generate([PLAIN])[0].parts[0].log_probs is None


# --- half a reply, and thinking -----------------------------------------------------------------------


def drafted(reply):
    drafter = Drafter(HostedLM(reply))
    assignment = Assignment(0, (0,), ())
    completion = drafter.lm.generate([drafter.request("q", [])])[0]
    return drafter.read(completion, assignment)


@pytest.mark.parametrize(
    "reply",
    [
        ChatReply("Rationale: The passages say that", cut=True),
        ChatReply("<think>The user wants", cut=True),
        ChatReply("<think>The user wants"),
        ChatReply("<think>Answer: 7</think>"),
        ChatReply("", cut=True, thought=True),
    ],
)
def test_a_reply_that_ended_before_its_answer_is_no_answer(reply):
    with pytest.raises(ModelError, match="wrote no answer"):
        drafted(reply)


@pytest.mark.parametrize(
    "told",
    [
        {"finish_reason": "length"},  # OpenAI
        {"finish_reason": "model_length"},  # Mistral
        {"stop_reason": "max_tokens"},  # Anthropic
        {"stopReason": "max_tokens"},  # Bedrock
        {"done_reason": "length"},  # Ollama
        {"finish_reason": "MAX_TOKENS"},  # Google
        {"finish_reason": Enum("FinishReason", ["STOP", "MAX_TOKENS"]).MAX_TOKENS},
        {"incomplete_details": {"reason": "max_output_tokens"}},  # OpenAI's responses
        {"choices": [{"finish_reason": "length"}]},
        SimpleNamespace(choices=[SimpleNamespace(finish_reason="length")]),
        SimpleNamespace(candidates=[{"finishReason": "MAX_TOKENS"}]),
    ],
)
def test_every_way_of_saying_that_a_reply_ended_at_its_limit_is_known(told):
    assert ended_at_limit(told)


@pytest.mark.parametrize(
    "told",
    [None, {}, "length", {"finish_reason": "stop"}, {"stop_reason": "end_turn"}, {"choices": None}, {"choices": [None]}]
    + [{"finish_reason": None}, {"finish_reason": 3}, SimpleNamespace(choices=[]), {"incomplete_details": None}],
)
def test_a_reply_that_ended_otherwise_is_whole(told):
    assert not ended_at_limit(told)


@pytest.mark.parametrize(
    "text",
    [
        "<think>Maybe 7?\nAnswer: 7</think>\n\nRationale: It is.\nAnswer: 42",
        "Maybe 7?\nAnswer: 7</think>Rationale: It is.\nAnswer: 42",
        "[THINK]Answer: 7[/THINK]Rationale: It is.\nAnswer: 42",
        "<think></think><thinking>Answer: 7</thinking>Rationale: It is.\nAnswer: 42",
    ],
)
def test_thinking_is_taken_off(text):
    tokens = [{"token": piece, "logprob": -1.0} for piece in text]
    draft = drafted(ChatReply(text, tokens))
    assert (draft.text, draft.rationale) == ("42", "It is.")
    assert draft.log_answer == -2.0 and draft.answer_tokens == 2


def test_a_tag_in_the_middle_of_an_answer_is_no_thinking():
    assert answer_start("The tag <think> opens it") == 0
    assert answer_start("Answer: 42") == 0


def test_the_content_of_a_message_may_be_a_list_of_parts():
    parts = [
        {"type": "reasoning", "text": "Answer: 7"},
        {"type": "text", "text": "Rationale: It is.\n"},
        {"type": "output_text", "text": "Answer: 42"},
        {"type": "image_url", "image_url": {}},
    ]
    answer = {"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}
    with one_answer(answer) as url:
        made = OpenAILM("m", url, retries=0).generate([ASK])[0]
    assert split_reply(made.parts[0], Prompts())[1].text == "42"


def test_a_complete_reply_without_a_header_is_still_the_answer():
    assert drafted(ChatReply("forty-two")).text == "forty-two"
    cut_in_the_answer = ChatReply("Rationale: It is.\nAnswer: forty", usage=Usage(1, 9), cut=True)
    assert drafted(cut_in_the_answer).text == "forty"


async def test_notes_of_a_completion_reach_the_draft():
    completion = Completion((part("because"), part("42")), notes=("something is missing",))
    drafts = Drafter(ScriptedLM(lambda _: completion)).drafts("q", [Assignment(0, (0,), ())])
    assert [draft.notes async for draft in drafts] == [("something is missing",)]


# --- anything at all -----------------------------------------------------------------------------------

ODD = [None, True, -1, 0.5, 1e400, float("nan"), "", "\ud800", "x", [], {}, [None], [[]], {"a": None}, 10**400, "日本"]


def mutated(value, random):
    """``value`` with one of its parts replaced or left out."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(list(value))
        if random.random() < 0.15:
            return {k: v for k, v in value.items() if k != name}
        return {**value, name: mutated(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        if random.random() < 0.15:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutated(value[at], random), *value[at + 1 :]]
    return random.choice(ODD)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["content", "parallel", "chat", "echo", "models", "embeddings"])
def test_a_damaged_reply_ends_in_one_clear_error_or_in_numbers_that_can_be(kind):
    random = Random(kind)
    top = [{"token": "Yes", "logprob": -0.5, "bytes": [89, 101, 115]}]
    items = [
        {"token": t, "logprob": v, "id": 5, "bytes": list(t.encode()), "top_logprobs": top}
        for t, v in [(" 4", -0.5), ("2", -0.25)]
    ]
    parallel = {"tokens": [" 4", "2"], "token_logprobs": [-0.5, -0.25], "top_logprobs": [{"4": -0.5}, {"2": -0.2}]}
    whole = {
        "content": completion(" 42", {"content": items}, token_ids=[5, 6], stop_reason="x"),
        "parallel": completion(" 42", parallel),
        "chat": {
            "choices": [
                {
                    "message": {"content": " 42", "reasoning": "x"},
                    "logprobs": {"content": items},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        },
        "echo": echo([("Answer: ", None), ("日本 😀 wins", -1.0), ("\n\nTrue?\n\n", -1.0), ("Yes", -0.5)]),
        "models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 900, "meta": {"n_ctx": 800}}]},
        "embeddings": {"data": [{"index": 0, "embedding": [0.5, 1.0]}, {"index": 1, "embedding": [1.0, 0.5]}]},
    }[kind]
    answers = iter([])

    def respond(method, path, body, headers):
        if method == "GET":
            return 200, json.dumps(next(answers) if kind == "models" else {"data": []}).encode(), {}
        return 200, json.dumps(next(answers) if kind != "models" else completion(" 42", None)).encode(), {}

    with serving(respond) as url:
        for _ in range(40):
            damaged = mutated(whole, random)
            answers = iter([damaged] * 20)
            lm = OpenAILM("m", url, api="chat" if kind == "chat" else "completions", retries=0)
            try:
                if kind == "embeddings":
                    assert np.isfinite(OpenAIEmbedder(url, "m", retries=0).embed(["a", "b"])).all()
                elif kind == "echo":
                    values = [v for score in lm.score([CONVERSATION]) for at in score.log_probs.values() for v in at]
                    assert all(v <= 1e-3 or math.isnan(v) for v in values)
                else:
                    made = lm.generate([ASK], top_log_probs=2)[0].parts[0]
                    assert isinstance(made.text, str) and made.log_probs != ()
                    assert lm.context_window is None or lm.context_window > 0
            except SpecRAGError as error:
                assert str(error)
