"""What nobody waits for any more ends soon: between tokens, before the next layer, before it has begun."""

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest

from specrag import SpeculativeRAG, _blocking
from specrag._abandoned import AbandonedError, in_own_thread, in_thread, stop_if_abandoned
from specrag.models import GenerationRequest, Sampling, Segment, Stage, Turn
from specrag.schema import Passage
from tests.fakes import HashEmbedder

LONG = " ".join(f"Sentence number {i} says something about the town." for i in range(130))


def request(text="Count to ten thousand.", tokens=1500):
    return GenerationRequest((Turn.of("user", text),), (Stage("1, 2, 3, 4,", tokens),))


@pytest.fixture
def layers_run(smollm2):
    """How often the first and the last layer ran over a long text.

    What the prompts share is short and read first; a quick machine may finish that within a deadline.
    """
    counts, began = {"first": 0, "last": 0}, threading.Event()

    def count(name):
        def hook(module, inputs, output):
            if (output[0] if isinstance(output, tuple) else output).shape[-2] > 64:
                counts[name] += 1
                began.set()

        return hook

    layers = smollm2.model.model.layers
    hooks = [layers[0].register_forward_hook(count("first")), layers[-1].register_forward_hook(count("last"))]
    yield counts, began
    for hook in hooks:
        hook.remove()


async def cancelled_when(began, coroutine):
    task = asyncio.ensure_future(coroutine)
    await asyncio.to_thread(began.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def free_within(lm, seconds):
    start = time.monotonic()
    assert lm.lock.acquire(timeout=60)
    lm.lock.release()
    return time.monotonic() - start < seconds


async def test_a_prompt_that_is_being_read_is_left_at_the_next_layer(smollm2, layers_run):
    counts, began = layers_run
    await cancelled_when(began, smollm2.agenerate([request(f"{i}. {LONG}") for i in range(2)]))
    assert free_within(smollm2, 10)
    assert counts == {"first": 1, "last": 0}


async def test_conversations_that_are_being_scored_are_left_at_the_next_layer(smollm2, layers_run):
    assert smollm2.packs  # found out with passes of its own
    counts, began = layers_run
    counts.update(first=0, last=0)
    began.clear()
    scored = [(Turn.of("user", f"{i}. {LONG}"), Turn("assistant", (Segment("Yes", "reflect"),))) for i in range(4)]
    await cancelled_when(began, smollm2.ascore(scored))
    assert free_within(smollm2, 10)
    assert counts == {"first": 1, "last": 0}


async def test_a_reply_that_is_being_written_is_left_at_the_next_token(smollm2):
    task = asyncio.ensure_future(smollm2.agenerate([request()], Sampling(temperature=1.5, seed=0)))
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert free_within(smollm2, 5)


async def test_what_waits_for_the_model_never_begins(smollm2, layers_run):
    counts, _ = layers_run
    with smollm2.lock:
        task = asyncio.ensure_future(smollm2.agenerate([request()]))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert free_within(smollm2, 5) and counts["first"] == 0


def test_the_question_after_missed_deadlines_does_not_wait_for_them(smollm2, layers_run):
    counts, _ = layers_run
    passages = [Passage(f"{i}. {LONG[:2500]}") for i in range(6)]
    rag = SpeculativeRAG(drafter=smollm2, embedder=HashEmbedder(), drafts=5, subsets="random", deadline=0.1)
    for _ in range(3):
        assert rag.answer("where?", passages).abstained
    assert free_within(smollm2, 10) and counts["last"] == 0


THREADS = pytest.mark.parametrize("threaded", [in_thread, in_own_thread])


@THREADS
def test_an_interrupt_reaches_the_thread(threaded):
    """Ctrl-C cancels the coroutine that `_blocking.run` waits for."""
    ended, begun = threading.Event(), threading.Event()

    def work():
        begun.set()
        try:
            while True:
                stop_if_abandoned()
                time.sleep(0.01)
        except AbandonedError:
            ended.set()
            raise

    async def interrupted():
        task = asyncio.ensure_future(threaded(work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await task

    with pytest.raises(BaseException):  # noqa: B017 - as the interrupt ends it
        _blocking.run(interrupted())
    assert ended.wait(2)


INTERRUPTED = """
import sys

from specrag import _blocking
from specrag.models import GenerationRequest, Stage, TransformersLM, Turn

lm = TransformersLM(sys.argv[1])
turns = [(Turn.of("user", f"{i} " + "word " * 1500),) for i in range(4)]
print("begins", flush=True)
_blocking.run(lm.agenerate([GenerationRequest(t, (Stage(max_tokens=400),)) for t in turns]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_an_interrupt_ends_the_process_and_does_not_abort_it(smollm2_path):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(smollm2_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == "begins\n"
        time.sleep(2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in shown and "terminate called" not in shown
    assert process.returncode != -signal.SIGABRT and time.monotonic() - start < 15


@THREADS
async def test_work_that_is_waited_for_is_not_stopped(threaded):
    def work(a, *, b):
        stop_if_abandoned()
        return a + b

    assert await threaded(work, 1, b=2) == 3
    stop_if_abandoned()
    with pytest.raises(ZeroDivisionError):
        await threaded(lambda: 1 // 0)


def test_the_loops_thread_ends_before_the_interpreter_does():
    """Handlers run last in, first out: the one here runs after that of the loop."""
    code = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
from specrag import _blocking
async def work(): return 1
_blocking.run(work())
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "['MainThread']"
