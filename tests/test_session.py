"""LongContext: a context is read once and asked many times; what two prompts share is not read again."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from specrag.errors import InvalidInputError, ModelError
from specrag.models import Stage
from specrag.models.tokenization import StopStrings
from specrag.rapid import LongContext
from specrag.rapid.cached_model import CachedModel
from tests.rapid_parts import DOCUMENT, generator


def test_the_next_question_pays_for_its_own_tokens_only(tiny, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, candidates=0))
    counts = forward_passes(tiny.model)
    first = session.ask("who?", max_tokens=3).text
    assert max(counts) < 20 < session.tokens
    session.ask("a different and longer question about the lamps?", max_tokens=3)
    assert session.ask("who?", max_tokens=3).text == first


def test_the_first_token_comes_before_the_drafter_reads(tiny, other, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny, other, candidates=3))
    counts = forward_passes(other.model)
    stream = session.stream("who?", max_tokens=5)
    next(stream)
    assert counts == []
    list(stream)
    assert counts


def test_progress_is_told_while_the_context_is_read(tiny):
    told = []
    session = LongContext(DOCUMENT * 3, generator(tiny), progress=lambda *counts: told.append(counts))
    assert told == [(512, session.tokens), (1024, session.tokens), (session.tokens, session.tokens)]
    assert session.prefill_seconds > 0


def test_a_session_that_was_given_up_saves_another_one_the_reading(tiny, forward_passes):
    rapid = generator(tiny, candidates=3)
    longer = DOCUMENT + " And a last note: the door of room 9 is open."
    expected = LongContext(longer, rapid).ask("which door?", max_tokens=8).text
    first = LongContext(DOCUMENT, rapid)
    first.ask("who keeps the bell?", max_tokens=8)  # its cache holds a question and an answer too
    counts = forward_passes(tiny.model)
    second = LongContext(longer, rapid, prefix=first.give_up())
    assert sum(counts) < 40 < second.tokens
    assert second.ask("which door?", max_tokens=8).text == expected
    assert first.nbytes == 0 < second.nbytes
    with pytest.raises(InvalidInputError, match="was given up"):
        first.ask("who?")
    same = LongContext(longer, rapid, prefix=second.give_up())
    assert same.chunks.vectors is not None and same.prefill_seconds == 0  # neither read nor embedded again
    assert same.ask("which door?", max_tokens=8).text == expected


def test_unusable_texts_and_questions_are_refused(tiny):
    rapid = generator(tiny, retrieval_budget=40)
    with pytest.raises(InvalidInputError, match="context is empty"):
        LongContext(" \n", rapid)
    with pytest.raises(InvalidInputError, match=r"the context has \d+ tokens, .* 8192 positions.*RoPE scaling"):
        LongContext("word " * 9000, rapid)
    session = LongContext(DOCUMENT, rapid)
    for question, options, message in (
        (" ", {}, "question is empty"),
        ("why " * 60, {}, "the retrieval budget is 40"),
        ("who?", {"max_tokens": 8000}, "has 8192"),
        ("who?", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("who?", {"stop": [""]}, "stop string must not be empty"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            session.ask(question, **options)
    assert session.ask("who?", max_tokens=2).stats.tokens == 2


def test_out_of_memory_during_prefill_is_said_and_the_generator_stays_usable(tiny):
    rapid, calls = generator(tiny, candidates=0), itertools.count()

    def fail(*_):
        if next(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    hook = tiny.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ModelError, match="out of memory while reading"):
            LongContext(DOCUMENT * 4, rapid)  # several chunks: the second fails
    finally:
        hook.remove()
    assert LongContext("A short text.", rapid).ask("who?", max_tokens=2).stats.tokens == 2


@pytest.mark.parametrize("lack", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("no memory")])
def test_a_session_that_has_no_memory_for_a_question_answers_the_next(tiny, lack):
    session = LongContext(DOCUMENT, generator(tiny, candidates=3))
    expected = session.ask("who?", max_tokens=4).text

    def fail(*_):
        raise lack

    hook = tiny.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ModelError, match=r"out of memory while reading \d+ tokens: give a shorter text"):
            session.ask("which of the keepers?", max_tokens=4)
    finally:
        hook.remove()
    assert session.ask("who?", max_tokens=4).text == expected


def test_a_failed_chunk_leaves_the_cache_as_it_was(tiny):
    model = CachedModel(tiny, 64, 100)
    model.prefill([1, 2, 3])

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.prefill([4, 5], progress=fail)
    assert model.length == 3
    assert torch.equal(model.feed([4])[-1], model_after(tiny, [1, 2, 3, 4]))


def model_after(lm, tokens: list[int]) -> torch.Tensor:
    model = CachedModel(lm, 64, 100)
    model.prefill(tokens[:-1])
    return model.feed(tokens[-1:])[-1]


# --- one answer at a time -------------------------------------------------------------------------------


def test_threads_that_ask_one_session_get_what_they_get_alone(tiny):
    session = LongContext(DOCUMENT, generator(tiny))
    alone = [session.ask(question, max_tokens=12).text for question in ("one?", "two?", "three?")]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda q: session.ask(q, max_tokens=12).text, ["one?", "two?", "three?"] * 2))
    assert together == alone * 2


def test_while_an_answer_is_streamed_the_session_is_not_used_for_anything_else(tiny, tmp_path):
    """Both would write into one cache, and both answers would be wrong."""
    session = LongContext(DOCUMENT, generator(tiny))
    whole = session.ask("one?", max_tokens=12).text
    streamed = session.stream("one?", max_tokens=12)
    pieces = [next(streamed)]
    for use in (
        lambda: session.ask("two?", max_tokens=4),
        lambda: next(session.stream("two?", max_tokens=4)),
        lambda: session.save(tmp_path / "session"),
        session.give_up,
    ):
        with pytest.raises(InvalidInputError, match="still writing another answer: read that to its end or close it"):
            use()
    assert "".join([*pieces, *streamed]) == whole
    abandoned = session.stream("one?", max_tokens=12)
    next(abandoned)
    abandoned.close()
    assert session.ask("one?", max_tokens=12).text == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens must be a whole number, got '5'"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"stop": [b"x"]}, "a stop string must be a text, got bytes"),
        ({"stop": ["a", ""]}, "a stop string must not be empty"),
        ({"sampling": {"temperature": 0}}, "sampling must be a Sampling, got dict"),
    ],
)
def test_options_of_an_answer_are_checked(tiny, options, message):
    with pytest.raises(InvalidInputError, match=message):
        LongContext(DOCUMENT, generator(tiny)).ask("one?", **options)


def test_one_stop_string_is_not_read_letter_by_letter():
    assert Stage(stop="END").stop == ("END",)
    assert StopStrings("END").find("END of E") == 0 and StopStrings("END").find("N E D") is None


@pytest.mark.parametrize("given", [None, ["a", "b"], b"text"])
def test_what_is_no_text_is_not_read(tiny, given):
    with pytest.raises(InvalidInputError, match="a session reads a text or a Prompt, got"):
        LongContext(given, generator(tiny))
