"""RapidChat: the context of a conversation is found, and its session is kept for the next call."""

import pytest

from specrag.engine import memory
from specrag.errors import InvalidInputError, ModelError
from specrag.models import Sampling, TransformersLM
from specrag.rapid import LongContext, Message, RapidChat, RapidSettings
from specrag.rapid.chat import call_options
from specrag.rapid.conversation import conversation, split_context
from tests.rapid_parts import DOCUMENT, PROPOSERS, generator, plain_greedy

LONG = DOCUMENT * 3  # about 1,400 tokens


@pytest.fixture
def chat(tiny):
    return RapidChat(generator(tiny, candidates=3, transfer="none"))


def user(text: str) -> list[Message]:
    return [Message("user", text)]


# --- sessions -------------------------------------------------------------------------------------------


def test_sessions_that_nobody_uses_make_room_where_memory_is_too_small(tiny, monkeypatch):
    chat = RapidChat(generator(tiny, candidates=0))
    chat.complete(user("first?"), documents=[LONG], max_tokens=2)
    (first,) = chat.sessions
    room = first.nbytes * 3 // 2
    monkeypatch.setattr(memory, "free_memory", lambda device: room - sum(s.nbytes for s in chat.sessions))
    chat.complete(user("second?"), documents=[LONG[1000:]], max_tokens=2)
    (second,) = chat.sessions
    assert second is not first
    with pytest.raises(ModelError, match=r"the keys and values of \d+ tokens need .* are free on cpu: give a shorter"):
        chat.complete(user("third?"), documents=[DOCUMENT * 8], max_tokens=2)
    assert chat.complete(user("fourth?"), documents=[LONG], max_tokens=2)[1].tokens == 2


def test_a_documents_session_is_used_again_and_the_oldest_goes(tiny, forward_passes):
    chat = RapidChat(generator(tiny, candidates=0), max_sessions=2)
    read = forward_passes(tiny.model)
    chat.complete(user("first?"), documents=[LONG], max_tokens=2)
    first = max(read)
    read.clear()
    chat.complete(user("second?"), documents=[LONG], max_tokens=2)
    assert first == 512 and max(read) < 40  # only the question
    chat.complete(user("third?"), documents=["another text " * 40], max_tokens=2)
    assert len(chat.sessions) == 2
    chat.complete(user("fourth?"), documents=["yet another " * 40], max_tokens=2)
    assert len(chat.sessions) == 2 and chat.sessions[0].tokens < 500
    chat.clear()
    assert chat.sessions == []


def test_caches_stay_within_their_bytes(tiny):
    chat = RapidChat(generator(tiny, candidates=0), max_bytes=1)
    chat.complete(user("q"), documents=[DOCUMENT], max_tokens=2)
    assert chat.sessions == []


def test_a_conversation_goes_on_in_its_session(tiny, chat, forward_passes):
    messages = [Message("system", "Be brief."), Message("user", f"{LONG}\n\nWhat is this about?")]
    reply, _ = chat.complete(messages, max_tokens=8)
    read = forward_passes(tiny.model)
    messages += [Message("assistant", reply), Message("user", "And in one word?")]
    again, _ = chat.complete(messages, max_tokens=8)
    # The new context is the old prompt and the reply; it begins alike, so little is read anew by the target.
    reused = sum(read)
    read.clear()
    fresh = RapidChat(generator(tiny, candidates=3, transfer="none"))
    assert fresh.complete(messages, max_tokens=8)[0] == again
    assert reused < sum(read) / 2 and len(chat.sessions) == 1


def test_a_conversation_about_documents_goes_on_in_the_documents_session(tiny, chat, forward_passes):
    first = [Message("user", "why?")]
    reply, _ = chat.complete(first, documents=[LONG], max_tokens=8)
    messages = [*first, Message("assistant", reply), Message("user", "really?")]
    read = forward_passes(tiny.model)
    again, stats = chat.complete(messages, documents=[LONG], max_tokens=8)
    assert max(read) < 800 and len(chat.sessions) == 1  # the target does not read the document again
    fresh = RapidChat(generator(tiny, candidates=3, transfer="none"))
    expected, fresh_stats = fresh.complete(messages, documents=[LONG], max_tokens=8)
    assert (again, stats.prompt_tokens) == (expected, fresh_stats.prompt_tokens)


def test_a_documents_session_is_not_given_up_for_a_prompt_that_only_shares_the_template(chat):
    system = Message("system", "Answer from the document, briefly, and say where it stands. " * 6)
    chat.complete([system, Message("user", "q")], documents=[LONG], max_tokens=2)
    chat.complete([system, Message("user", "q")], documents=["Something else."], max_tokens=2)
    assert len(chat.sessions) == 2


def test_a_prompt_that_is_too_long_costs_no_session(chat):
    chat.complete(user("q"), documents=[LONG], max_tokens=2)
    with pytest.raises(InvalidInputError, match="8192 positions"):
        chat.complete(user("q"), documents=[LONG + " word" * 9000], max_tokens=2)
    assert len(chat.sessions) == 1


def test_two_streams_at_once_do_not_share_a_session(chat):
    alone, _ = chat.complete(user("what?"), documents=[LONG], max_tokens=12)
    streams = [chat.stream(user("what?"), documents=[LONG], max_tokens=12) for _ in range(2)]
    mixed = ["", ""]
    for pieces in zip(*streams, strict=True):
        mixed = [text + piece for text, piece in zip(mixed, pieces, strict=True)]
    assert mixed == [alone, alone] and len(chat.sessions) == 2


# --- a chat and its options -----------------------------------------------------------------------------


def test_a_chat_is_opened_over_a_generator_with_other_sampling_and_nothing_else(tiny):
    rapid = generator(tiny, candidates=3)
    opened = RapidChat.open(rapid=rapid, top_p=0.5, seed=7)
    assert opened.rapid is rapid and opened.settings.sampling == Sampling(top_p=0.5, seed=7)
    assert RapidChat.open(rapid=rapid, settings=opened.settings).settings == opened.settings
    assert RapidChat.open(rapid=rapid, settings=rapid.settings, temperature=0.3).settings.sampling.temperature == 0.3
    with pytest.raises(InvalidInputError, match="give settings to the RapidGenerator"):
        RapidChat.open(rapid=rapid, settings=RapidSettings(candidates=4))
    with pytest.raises(InvalidInputError, match="rapid=, which has its models"):
        RapidChat.open(rapid=rapid, drafter="some/model")
    with pytest.raises(InvalidInputError, match="give model="):
        RapidChat.open()
    with pytest.raises(InvalidInputError, match="must be 0 or more"):
        RapidChat(rapid, max_sessions=-1)


def test_options_of_a_call_win_over_an_adapters_own():
    own = {"max_tokens": 9, "stop": ["x"], "sampling": Sampling(top_k=5, seed=1)}
    assert call_options({}, **own) == {
        "documents": (), "tools": (), "stop": ("x",), "max_tokens": 9, "sampling": Sampling(top_k=5, seed=1),
    }  # fmt: skip
    given = {"max_tokens": 2, "stop": "end", "temperature": 0.5, "seed": None, "top_p": 0.9, "documents": ["d"]}
    assert call_options(given, **own) == {
        "documents": ["d"], "tools": (), "stop": ("end",), "max_tokens": 2,
        "sampling": Sampling(temperature=0.5, top_k=5, top_p=0.9, seed=1),
    }  # fmt: skip
    with pytest.raises(InvalidInputError, match="unknown options top_n, typo: a call takes stop, max_tokens"):
        call_options({"typo": 1, "top_n": 2}, **own)


def test_a_seed_makes_the_sampling_of_a_call_repeat(chat):
    def reply(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return chat.complete(user("what?"), documents=[DOCUMENT], max_tokens=8, sampling=sampling)[0]

    assert reply(1) == reply(1) != reply(2)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_short_prompt_to_a_base_model_without_a_template_is_answered(tiny, proposer):
    base = TransformersLM(tiny.model, tiny.tokenizer, chat_template=None)
    chat = RapidChat(generator(base, candidates=3, transfer="none", proposer=proposer))
    text, stats = chat.complete(user("Once upon a time"), max_tokens=6)
    (session,) = chat.sessions
    assert text == base.tokenizer.decode(plain_greedy(session, "Once upon a time", 6)) and stats.tokens == 6
    assert chat.complete(user("Once upon a time"), max_tokens=6)[0] == text  # the session is used again


def test_a_short_conversation_with_triforce_is_answered_without_candidates(tiny):
    chat = RapidChat(generator(tiny, proposer="triforce", candidates=3, transfer="none"))
    _, stats = chat.complete(user("t1 t2"), max_tokens=4)
    assert stats.notes == ["the window of 32 tokens covers the context: the target decodes alone"]
    assert (stats.tokens, stats.candidates) == (4, 0)
    _, stats = chat.complete(user("t1 t2"), documents=[LONG], max_tokens=4)
    assert stats.candidates > 0 and not stats.notes


def test_an_empty_document_is_still_refused_without_a_template(tiny):
    base = TransformersLM(tiny.model, tiny.tokenizer, chat_template=None)
    with pytest.raises(InvalidInputError, match="the context is empty"):
        LongContext(" ", generator(base))


# --- finding the context --------------------------------------------------------------------------------


def test_the_context_of_a_message_is_found():
    ruled = (
        "Context information is below.\n---------------------\nThe facts.\n---------------------\nQuery: why?\nAnswer: "
    )
    assert split_context(ruled) == (ruled[: ruled.index("Query")].strip(), "Query: why?\nAnswer:")
    long = "word " * 400
    assert split_context(f"{long}\n\nWhy?") == (long.strip(), "Why?")
    assert split_context("Hello.\n\nWhy?") == ("", "Hello.\n\nWhy?")


def test_a_conversation_is_rendered_as_its_template_would(tiny):
    encoder = tiny.encoder

    def rendered(prompt, question):
        tokens = prompt.encoded(encoder)
        return tiny.tokenizer.decode([*tokens.ids, *tokens.question(encoder, question)])

    messages = [Message("system", "S"), Message("user", "Q1"), Message("assistant", "A1"), Message("user", "Q2")]
    expected = tiny.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    prompt, question = conversation(encoder, messages)
    assert rendered(prompt, question) == expected
    prompt, question = conversation(encoder, messages, documents=["The document."])
    assert prompt.context == "The document."
    assert rendered(prompt, question) == expected.replace("Q1", "The document.\n\nQ1")


def test_messages_that_ask_nothing_are_refused(tiny):
    for messages, options, message in (
        ([], {}, "must be the user's"),
        ([Message("user", "q"), Message("assistant", "a")], {}, "must be the user's"),
        ([Message("user", " ")], {}, "last message is empty"),
        ([Message("user", "q")], {"documents": [" "]}, "documents are empty"),
        ([Message("oracle", "x"), Message("user", "q")], {}, "role must be system, user, assistant or tool"),
        ([Message("user", "q")], {"tools": [{"name": "t"}]}, "no tools in the <tool_call> format"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            conversation(tiny.encoder, messages, **options)
