"""The client against llama.cpp's own server: recorded, or live with --llamacpp-url.

It lists log-probabilities in the shape of chat replies from both endpoints, ignores `echo`, names no stop string, and
says how large its window is in `meta.n_ctx`. `tests/record_llamacpp.py` says how the responses were recorded.
"""

import asyncio
import math
from dataclasses import replace

import pytest

from specrag import SpeculativeRAG
from specrag.errors import LogProbsUnavailableError
from specrag.models import GenerationRequest, OpenAILM, Stage, Turn
from specrag.speculative.drafting import Assignment, Drafter
from specrag.speculative.prompts import VERDICT_HEADER, Prompts
from specrag.speculative.verification import SUBSTITUTE_NOTE, Scoring
from tests.fakes import HashEmbedder
from tests.servers import LLAMACPP, live_or_replayed
from tests.test_openai_lm import CONVERSATIONS, PASSAGES, QUESTION, REQUESTS

# llama.cpp keeps its keys and values in 16 bits, so its log-probabilities are a little different.
CLOSE = 0.03


@pytest.fixture(scope="module")
def url(request):
    with live_or_replayed(request.config.getoption("--llamacpp-url"), LLAMACPP) as served:
        yield served


@pytest.fixture(scope="module")
def llamacpp(url, smollm2_path):
    return OpenAILM("smollm2", url, tokenizer=smollm2_path, retries=0)


def test_drafts_have_the_texts_and_log_probabilities_of_the_in_process_model(llamacpp, smollm2):
    for ours, theirs in zip(smollm2.generate(REQUESTS), llamacpp.generate(REQUESTS), strict=True):
        assert [part.text for part in theirs.parts] == [part.text for part in ours.parts]
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            assert b.log_probs == pytest.approx(a.log_probs, abs=CLOSE)
            assert b.token_ends == a.token_ends
    assert llamacpp.capabilities.generation_log_probs is True


async def test_the_verdict_on_a_draft_is_that_of_the_in_process_model(llamacpp, smollm2):
    async def verdicts(lm):
        drafter = Drafter(lm, replace(Prompts.for_small_models(), verdict_header=VERDICT_HEADER))
        assignments = [Assignment(i, (i,), (passage,)) for i, passage in enumerate(PASSAGES[:2])]
        made = sorted([draft async for draft in drafter.drafts(QUESTION, assignments)], key=lambda draft: draft.index)
        return [(draft.text, draft.log_verdict) for draft in made]

    theirs, ours = await verdicts(llamacpp), await verdicts(smollm2)
    assert [text for text, _ in theirs] == [text for text, _ in ours]
    assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], abs=CLOSE)


def test_its_window_is_known_before_the_first_request(url):
    lm = OpenAILM("smollm2", url)
    assert lm.context_window is None
    asyncio.run(lm.prepare())
    assert lm.context_window == 2048


def test_a_server_that_ignores_echo_cannot_score(llamacpp):
    with pytest.raises(LogProbsUnavailableError, match="no log-probabilities of a prompt's own tokens"):
        llamacpp.score(CONVERSATIONS[:1])
    assert llamacpp.capabilities.prompt_log_probs is False


def test_a_reply_of_a_chat_has_log_probabilities(url):
    completion = OpenAILM("smollm2", url, retries=0).generate(REQUESTS[:1], top_log_probs=3)[0]
    part = completion.parts[0]
    assert not completion.staged and len(part.log_probs) == len(part.token_ends) == part.tokens
    assert part.token_ends[-1] == len(part.text) and max(part.log_probs) <= 0
    assert all(len(top) >= 3 for top in part.top_log_probs)


def test_tokens_that_make_up_one_character_are_listed_as_one_so_the_sum_is_missing(url, smollm2_path):
    """Three emoji are ten tokens and three entries, each with the log-probability of its last byte."""
    lm = OpenAILM("smollm2", url, tokenizer=smollm2_path, chat_template=None, api="completions", retries=0)
    asked = GenerationRequest((Turn.of("user", "Emoji: 🌍🌍🌍"),), (Stage("🌍🌍", 10),))
    completion = lm.generate([asked])[0]
    assert "🌍" in completion.text and completion.parts[0].log_probs is None
    assert "do not add up" in completion.notes[0]


def test_a_stop_string_that_is_hidden_ends_the_part_only_after_its_first_character(llamacpp, smollm2):
    asked = [
        GenerationRequest(
            (Turn.of("user", "Name three fruits, one per line."),),
            (Stage("", 12, ("\n",)), Stage("\n2.", 8, ("\n",))),
        ),
        Drafter(smollm2, max_rationale_tokens=16, max_answer_tokens=8).request(QUESTION, PASSAGES[:2]),
    ]
    for ours, theirs in zip(smollm2.generate(asked), llamacpp.generate(asked), strict=True):
        assert [part.text for part in theirs.parts] == [part.text for part in ours.parts]
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            assert b.log_probs == pytest.approx(a.log_probs, abs=CLOSE)
    assert theirs.parts[0].text.startswith("\n\n")  # these tokens came back without a text, a list or a reason


def test_a_token_that_a_stop_string_cuts_costs_no_log_probability(llamacpp, smollm2):
    """The server does not list " brown". What follows is tokenised together with the piece of it that stays."""
    asked = GenerationRequest(
        (Turn.of("user", "Say: The quick brown fox"),), (Stage("", 20, ("rown",)), Stage("rown", 6))
    )
    ours, theirs = smollm2.generate([asked])[0], llamacpp.generate([asked])[0]
    assert ours.parts[0].text == "The quick b"
    for a, b in zip(ours.parts, theirs.parts, strict=True):
        assert (b.text, b.token_ends) == (a.text, a.token_ends)
        assert b.log_probs == pytest.approx(a.log_probs, abs=CLOSE)


def test_answers_are_chosen_by_the_drafts_own_scores_and_the_generated_yes(url, smollm2, smollm2_path):
    lm = OpenAILM("smollm2", url, tokenizer=smollm2_path, retries=0)

    def answered(model, scores):
        return SpeculativeRAG(
            drafter=model,
            embedder=HashEmbedder(),
            drafts=2,
            max_rationale_tokens=16,
            max_answer_tokens=8,
            scoring=Scoring(scores=scores),
        ).answer(QUESTION, PASSAGES)

    ours, theirs = answered(smollm2, ("draft",)), answered(lm, ("draft", "self_contain", "self_reflect"))
    drafted = {verdict.draft.text: verdict.log_draft for verdict in ours.verdicts}
    assert set(theirs.scores_used) == {"draft", "self_reflect"} and SUBSTITUTE_NOTE in theirs.notes
    for verdict in theirs.verdicts:
        assert verdict.log_draft == pytest.approx(drafted[verdict.draft.text], abs=0.05)
        assert -20 < verdict.log_self_reflect < 0 and not math.isnan(verdict.log_self_reflect)
