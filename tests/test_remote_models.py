"""Models in the replicas of deployments: the interface over a handle, lost replicas, and the keys of sessions.

Ray is not needed: handles lead to workers in this process. ``test_on_ray.py`` has the same over Ray.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specrag.errors import InvalidInputError, ModelError
from specrag.models.base import GenerationRequest, Sampling, Segment, Stage, Turn
from specrag.rapid import Message
from specrag.serving import remote
from specrag.serving.asked import Asked
from specrag.serving.keys import Owner
from specrag.serving.metrics import Metrics
from specrag.serving.rapid import RapidSessions, measured
from specrag.serving.remote import Calls, RemoteLM, RemoteRapid, RemoteReader, remote_model, session_key
from specrag.serving.replies import Finished, Text
from specrag.serving.requests import Extension
from specrag.serving.workers import Call, ModelWorker, RapidWorker
from tests.fakes import ScriptedLM
from tests.rapid_parts import DOCUMENT, generator
from tests.remote_parts import Handle, ReplicaDiedError
from tests.serving_parts import Models, chat, real_models, served

LOST = (ReplicaDiedError,)
ASKED = "who keeps the lamp of room 3"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


def request(text: str, max_tokens: int = 6) -> GenerationRequest:
    return GenerationRequest((Turn.of("user", text),), (Stage(max_tokens=max_tokens),))


def over(model, **faults) -> tuple[RemoteLM | RemoteReader, Handle]:
    handle = Handle(ModelWorker(lambda: model), **faults)
    return remote_model(handle, LOST), handle


# --- models ---------------------------------------------------------------------------------------------


def test_a_language_model_over_a_handle_is_the_model_itself(tiny):
    lm, handle = over(tiny)
    assert (lm.name, lm.folder, lm.context_window) == (tiny.name, tiny.folder, tiny.context_window)
    assert lm.count_tokens("a lamp, a key") == tiny.count_tokens("a lamp, a key")
    assert lm.capabilities == replace(tiny.capabilities, batched=False)
    requests = [request("a lamp"), request("a key and a bell")]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        ours, own = lm.generate(requests, sampling), tiny.generate(requests, sampling)
        assert [made.text for made in ours] == [made.text for made in own]
    turns = [(Turn.of("user", "who"), Turn("assistant", (Segment("Ann", "name"),)))]
    assert lm.score(turns)[0].log_probs["name"] == pytest.approx(tiny.score(turns)[0].log_probs["name"], abs=1e-5)
    assert handle.calls == ["facts", *["generate"] * 4, "score"]


async def test_calls_of_one_batch_get_what_each_gets_alone(tiny):
    worker = ModelWorker(lambda: tiny)
    drawn = Sampling(temperature=1.0, seed=5)
    calls = [
        Call(request("a lamp"), Sampling(), 0),
        Call(request("a key"), drawn, 0),
        Call(request("x " * 9000), Sampling(), 0),
        Call(request("a bell"), drawn, 0),
        Call(request("a key"), Sampling(), 2),
    ]
    made = await worker.generate_together(calls)
    assert isinstance(made[2], InvalidInputError)
    for at in (0, 1, 3, 4):
        assert made[at].text == (await worker.generate(calls[at])).text
    assert made[4].parts[0].top_log_probs and not made[0].parts[0].top_log_probs


async def test_a_conversation_that_cannot_be_scored_costs_the_others_nothing(tiny):
    worker = ModelWorker(lambda: tiny)
    long, short = ((Turn("assistant", (Segment(text, "it"),)),) for text in ("x " * 9000, "Ann"))
    made = await worker.score_together([long, short])
    assert isinstance(made[0], InvalidInputError) and made[1].log_probs["it"]


def test_a_server_over_remote_models_answers_like_one_over_its_own():
    own = real_models()
    reader, handle = over(own.rag.drafter)
    assert isinstance(reader, RemoteReader)
    away = Models(rag=own.rag.replace(drafter=reader), indexes=own.indexes, embedder=own.embedder)
    answers = []
    for models in (own, away):
        with served(models) as running, running.client() as http:
            answers.append(http.post("/v1/chat/completions", json=chat()).json())
    here, there = ({**answer["specrag"], "timings": None} for answer in answers)
    for told in (here, there):
        for draft in told["drafts"]:
            draft["seconds"] = None
    assert here == there and here["confidence"] > 0.5 and "read" in handle.calls


# --- lost replicas --------------------------------------------------------------------------------------


def test_a_call_whose_replica_dies_is_made_again():
    lm, handle = over(ScriptedLM(lambda prompt: ("why", "1898")))
    handle.dies = 2
    assert "1898" in lm.generate([request("when")])[0].text
    assert handle.calls == ["facts", *["generate"] * 3]


def test_a_call_whose_replicas_all_die_is_a_model_error():
    lm, handle = over(ScriptedLM(lambda prompt: ("why", "1898")))
    handle.dies = 9
    with pytest.raises(ModelError, match=r"the replica was lost \(ReplicaDiedError\)"):
        lm.generate([request("when")])


def test_what_the_model_raises_comes_as_it_is_and_is_not_repeated(tiny):
    lm, handle = over(tiny)
    with pytest.raises(InvalidInputError, match="exceed the 8192 positions"):
        lm.generate([request("x " * 9000)])
    assert handle.calls.count("generate") == 1
    broken, _ = over(ScriptedLM(lambda prompt: ZeroDivisionError("half")))
    with pytest.raises(ModelError, match="ZeroDivisionError: half"):
        broken.generate([request("when")])


async def test_a_call_that_nobody_waits_for_is_cancelled():
    handle = Handle(ModelWorker(lambda: ScriptedLM(lambda prompt: ("why", "1898"), delay=lambda text: 60.0)))
    calls = Calls(handle, LOST)
    lm = RemoteLM(calls, await calls.ask("facts"))
    task = asyncio.create_task(lm.agenerate([request("when")]))
    while "generate" not in handle.calls:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.cancelled == 1


# --- RAPID ----------------------------------------------------------------------------------------------


def question(*messages: str, owner: str = "1") -> Asked:
    turns = tuple(Message("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(messages))
    return Asked(
        owner=Owner(owner), model="rapid", messages=turns, where="messages", max_tokens=8, stop=(), temperature=0.0,
        top_p=None, seed=None, file_ids=(), options=Extension(),
    )  # fmt: skip


def test_a_documents_key_is_that_of_its_owner_and_its_texts():
    key = session_key(question(ASKED), [DOCUMENT])
    assert key == session_key(question("another question"), [DOCUMENT]) and key.startswith("1/")
    assert DOCUMENT[:20] not in key
    others = (
        session_key(question(ASKED, owner="2"), [DOCUMENT]),
        session_key(question(ASKED), [DOCUMENT, "more"]),
        session_key(question(ASKED), [DOCUMENT[:9], DOCUMENT[9:]]),
        session_key(question(ASKED), []),
    )
    assert len({key, *others}) == 5


def test_a_conversation_keeps_its_key_while_it_grows():
    first = f"{DOCUMENT}\n\n{ASKED}"
    assert session_key(question(first), []) == session_key(question(first, "Ann", "and the bell?"), [])
    assert session_key(question(first), []) == session_key(question(f"{DOCUMENT}\n\nwho has the key"), [])
    assert session_key(question("hello"), []) != session_key(question("good day"), [])


async def text_of(items) -> tuple[str, Finished]:
    found = [item async for item in items]
    return "".join(item.text for item in found if isinstance(item, Text)), found[-1]


async def test_rapid_over_a_handle_replies_like_rapid_in_this_process(tiny):
    made = generator(tiny, transfer="none", candidates=2)
    handle = Handle(RapidWorker(lambda: made, 1 << 30))
    away, here = RemoteRapid(Calls(handle, LOST)), RapidSessions(made, 4, 1 << 30)
    metrics = Metrics()
    text, end = await text_of(measured(away.reply(question(ASKED), [DOCUMENT], 8), metrics))
    expected, _ = await text_of(here.reply(question(ASKED), [DOCUMENT], 8))
    assert text == expected and end.completion_tokens == 8
    assert handle.keys == [session_key(question(ASKED), [DOCUMENT])]
    assert metrics.registry.get_sample_value("specrag_rapid_acceptance_count") == 1


async def test_a_reply_is_begun_again_on_another_replica_unless_a_piece_is_out(tiny):
    made = generator(tiny, transfer="none")
    handle = Handle(RapidWorker(lambda: made, 1 << 30), dies=2)
    rapid = RemoteRapid(Calls(handle, LOST))
    assert (await text_of(rapid.reply(question(ASKED), [DOCUMENT], 8)))[0]
    assert handle.calls == ["reply"] * 3
    handle.dies, handle.pieces = 1, 2
    with pytest.raises(ModelError, match="the replica was lost"):
        await text_of(rapid.reply(question(ASKED), [DOCUMENT], 8))
    assert handle.calls == ["reply"] * 4


async def test_a_worker_forgets_what_one_key_has_uploaded_and_keeps_the_rest(tiny):
    worker = RapidWorker(lambda: generator(tiny, transfer="none"), 1 << 30)
    rapid = RemoteRapid(Calls(Handle(worker), LOST))
    kept = [await worker.session(session_key(question(ASKED, owner=owner), [])) for owner in ("1", "11", "1/1")]
    for chat_of in kept:
        chat_of.complete([Message("user", ASKED)], documents=[DOCUMENT], max_tokens=2)
    await rapid.forget(Owner("1"))
    assert [len(chat_of.sessions) for chat_of in kept] == [0, 1, 1]


async def test_a_lost_replica_has_forgotten_and_another_error_is_told(tiny, monkeypatch):
    worker = RapidWorker(lambda: generator(tiny), 1 << 30)
    await RemoteRapid(Calls(Handle(worker, dies=1), LOST)).forget(Owner("1"))

    async def fails(owner: Owner) -> None:
        raise ZeroDivisionError("half")

    monkeypatch.setattr(worker, "forget", fails)
    with pytest.raises(ModelError, match="ZeroDivisionError: half"):
        await RemoteRapid(Calls(Handle(worker), LOST)).forget(Owner("1"))
