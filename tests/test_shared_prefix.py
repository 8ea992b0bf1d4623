"""Prompts begin alike as far as they can, so that a server reads what they share once: counted in its own usage."""

import pytest

from specrag import Passage, SpeculativeRAG
from specrag.models import OpenAILM
from specrag.models.tokenization import ConversationEncoder, shared_beginning
from specrag.schema import Draft
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import Prompts
from specrag.speculative.verification import Verifier
from tests.fakes import HashEmbedder
from tests.servers import PREFIXES, counting, live_or_replayed

QUESTION = "which of the two observatories on the mountain was built first"
PASSAGES = [
    Passage("The old observatory was built in 1892 by the university.", title="Old observatory"),
    Passage("The new observatory opened in 1931 and has a larger mirror.", title="New observatory"),
    Passage("A cable car leads up the mountain since 1954.", title="Cable car"),
    Passage("The village below is known for its cheese market.", title="Village"),
]


@pytest.mark.parametrize("prompts", [Prompts(), Prompts.for_small_models()], ids=["default", "small models"])
def test_the_drafts_of_a_question_share_all_that_stands_before_their_passages(smollm2, prompts):
    encoder, drafter = ConversationEncoder(smollm2.tokenizer), Drafter(smollm2, prompts)
    asked = [drafter.request(QUESTION, PASSAGES[at : at + 2]) for at in (0, 2)]
    texts = [encoder.render_generation(request) for request in asked]
    before = texts[0].index("[1] Old observatory")
    assert texts[0][:before] == texts[1][:before]
    ids = [encoder.encode_generation(request) for request in asked]
    assert smollm2.tokenizer.decode(ids[0][: shared_beginning(ids)]).startswith(texts[0][:before])


def test_the_verifications_of_a_question_share_all_that_stands_before_the_drafts(smollm2):
    encoder, verifier = ConversationEncoder(smollm2.tokenizer), Verifier(smollm2)
    drafts = [
        Draft(i, (i,), (PASSAGES[i],), text, why, log_answer=-1.0, log_rationale=-1.0)
        for i, (text, why) in enumerate([("1892", "Built by the university."), ("in 1931", "It opened then.")])
    ]
    ids = [encoder.encode_scored(verifier.conversation(QUESTION, draft)).ids for draft in drafts]
    shared = smollm2.tokenizer.decode(ids[0][: shared_beginning(ids)])
    assert QUESTION in shared and shared.endswith(("Answer:", "Rationale:"))


@pytest.fixture(scope="module")
def vllm_url(request):
    with live_or_replayed(request.config.getoption("--vllm-url"), PREFIXES) as url:
        yield url


def test_vllm_reads_what_the_prompts_share_once(vllm_url, smollm2):
    """It caches whole blocks, of 32 tokens here. One request at a time: two that begin together share nothing."""
    with counting(vllm_url) as (url, replies):
        lm = OpenAILM("smollm2", url, tokenizer=smollm2.tokenizer, max_concurrency=1, retries=0)
        rag = SpeculativeRAG(
            drafter=lm, embedder=HashEmbedder(), drafts=3, max_rationale_tokens=24, max_answer_tokens=8
        )
        answer = rag.answer(QUESTION, PASSAGES)
    assert answer.verdicts and not answer.failures
    used = [reply["usage"] for reply in replies]
    cached = [(usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) for usage in used]
    read = sum(usage["prompt_tokens"] for usage in used)
    assert read == answer.drafter_usage.prompt_tokens + answer.verifier_usage.prompt_tokens
    assert sum(cached) > 0.6 * read
