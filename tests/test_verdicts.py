"""The trained verdict: a drafter says behind its draft whether it is right."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from specrag import Passage, Prompts, SpeculativeRAG
from specrag.errors import InvalidInputError, ModelError
from specrag.models import Completion, GeneratedText, TransformersLM, bundled
from specrag.schema import Draft, DraftFailure, Verdict
from specrag.speculative.drafting import VERDICT_LOG_PROBS, Assignment, Drafter
from specrag.speculative.prompts import VERDICT_HEADER
from specrag.speculative.selection import merged
from specrag.speculative.verification import Scoring, with_self_reflection
from specrag.training import Example, TrainingSettings, judged_drafts, train
from specrag.training.examples import IGNORED, encode_example
from tests.conftest import tiny_llama
from tests.fakes import ScriptedLM, part
from tests.towers import made

ASKED = replace(Prompts(), verdict_header=VERDICT_HEADER)
PASSAGES = [Passage("The tower was completed in March 1889.", title="Tower"), Passage("The river is long.")]


def said(yes: float, no: float) -> GeneratedText:
    """What a drafter wrote as its verdict, with the log-probabilities of the likeliest tokens."""
    return replace(part(" Yes"), top_log_probs=({" Yes": math.log(yes), " No": math.log(no)},))


def judging_lm(verdicts: dict[str, float], **options) -> ScriptedLM:
    """Answers with the first word of the passages that is in ``verdicts``, and says Yes with its probability."""

    def reply(prompt: str) -> Completion:
        answer = next((name for name in verdicts if f" {name} " in prompt), None)
        if answer is None:
            return Completion((part("nothing"), part("not in the passages"), said(0.9, 0.1)))
        yes = verdicts[answer]
        return Completion((part("because"), part(answer), said(yes, 1 - yes)))

    return ScriptedLM(reply, **options)


@pytest.fixture
def trained(tmp_path):
    """Makes a drafter one that was trained to judge, as a folder with its prompts says."""

    def with_folder(lm, prompts=ASKED):
        prompts.save_drafting(tmp_path)
        lm.folder = tmp_path
        return lm

    return with_folder


async def drafted(drafter: Drafter, count: int = 1):
    subsets = [(0, 1), (1, 0), (0,), (1,)][:count]
    assignments = [Assignment(i, s, tuple(PASSAGES[at] for at in s)) for i, s in enumerate(subsets)]
    return [draft async for draft in drafter.drafts("when was the tower completed?", assignments)]


async def test_the_verdict_is_the_probability_of_yes_behind_the_draft():
    """Asked in the cache of the draft, alone or in a batch, it is that of one pass over the whole text."""
    drafter_lm = bundled("smollm2-rag-drafter")  # float weights: a batch and steps round as one pass does
    plain = await drafted(Drafter(drafter_lm), 4)
    drafts = await drafted(Drafter(drafter_lm, ASKED), 4)
    assert [(d.text, d.rationale) for d in drafts] == [(d.text, d.rationale) for d in plain]
    assert [d.log_answer for d in drafts] == pytest.approx([d.log_answer for d in plain], abs=1e-3)
    assert all(d.log_verdict is None for d in plain)
    answering = [d for d in drafts if not d.abstained]
    assert answering
    (alone,) = await drafted(Drafter(drafter_lm, ASKED))
    assert alone.log_verdict == pytest.approx(drafts[0].log_verdict, abs=1e-3)
    encoder = drafter_lm.encoder
    for draft in answering:
        request = Drafter(drafter_lm, ASKED).request("when was the tower completed?", draft.passages)
        text = f" {draft.rationale}\nAnswer: {draft.text}\n{VERDICT_HEADER}"
        ids = [*encoder.encode_generation(request), *encoder.encode_text(text)]
        with torch.inference_mode():
            probabilities = drafter_lm.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
        top = probabilities.topk(5).indices.tolist()
        yes = [i for i in top if drafter_lm.tokenizer.decode([i]).strip().casefold() == "yes"]
        expected = math.log(sum(probabilities[i] for i in yes)) if yes else math.log(probabilities[top[-1]])
        assert draft.log_verdict == pytest.approx(expected, abs=1e-3)


async def test_a_draft_that_abstains_or_is_written_freely_has_no_verdict():
    (abstained,) = await drafted(Drafter(judging_lm({}), ASKED))
    assert abstained.abstained and abstained.log_verdict is None
    free = ScriptedLM(lambda prompt: Completion((part("Rationale: so\nAnswer: 42"),), staged=False))
    (draft,) = await drafted(Drafter(free, ASKED))
    assert draft.text == "42" and draft.log_verdict is None
    bare = ScriptedLM(lambda prompt: Completion((part("so"), part("42"), part(" Yes"))))  # lists no tokens
    (draft,) = await drafted(Drafter(bare, ASKED))
    assert draft.text == "42" and draft.log_verdict is None


def test_the_prompts_of_a_drafter_keep_the_header_of_its_verdict(tmp_path):
    ASKED.save_drafting(tmp_path)
    assert Prompts.of_drafter(tmp_path) == ASKED and Prompts().drafts_like(ASKED)
    file = tmp_path / "prompts.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "verdict_header"}
    file.write_text(json.dumps(older))
    assert Prompts.of_drafter(tmp_path) == Prompts()
    with pytest.raises(InvalidInputError, match="verdict_header must be a text"):
        replace(Prompts(), verdict_header="  ")


def test_the_verdict_chooses_without_a_verifier(trained):
    lm = trained(judging_lm({"red": 0.3, "blue": 0.8, "green": 0.6}))
    passages = ["it is red here", "it is blue here", "it is green here"]
    settings = {"drafts": 3, "passages_per_draft": 1, "subsets": "random"}
    answer = SpeculativeRAG(drafter=lm, scoring=Scoring(scores=("verdict",)), **settings).answer("which?", passages)
    assert answer.text == "blue" and answer.scores_used == ("verdict",)
    assert [v.draft.text for v in answer.verdicts] == ["blue", "green", "red"]
    assert answer.verdicts[0].log_score == pytest.approx(math.log(0.8))
    assert answer.verdicts[0].to_row()["log_verdict"] == pytest.approx(math.log(0.8))
    assert lm.score_calls == [] and answer.verifier_usage.prompt_tokens == 0
    both = SpeculativeRAG(drafter=lm, scoring=Scoring(scores=("self_reflect", "verdict")), **settings)
    assert both.answer("which?", passages).text == "blue" and sum(lm.score_calls) == 3
    other = replace(both.texts, statement="Is that so?", affirmation="Surely")  # the verifier's, not the drafter's
    assert both.replace(prompts=other).answer("which?", passages).scores_used == ("self_reflect", "verdict")


def test_drafters_that_judge_themselves_need_no_verifier_by_default(trained):
    def counted(**settings):
        rag = SpeculativeRAG(drafter=settings.pop("drafter", judge), **settings)
        return rag.roles.settled.counted, rag.roles.names[1]

    judge, other = trained(judging_lm({"red": 0.3})), ScriptedLM(lambda prompt: ("because", "blue"))
    three = ("draft", "self_contain", "self_reflect")
    assert counted() == (("draft", "verdict"), "")
    assert counted(drafter=[judge, judge]) == (("draft", "verdict", "agreement"), "")
    assert counted(drafter=[judge, other]) == ((*three, "agreement"), "scripted")
    assert counted(verifier=other) == (three, "scripted")
    # What asks for a verifier gets one.
    assert counted(scoring=Scoring(mode="pointwise")) == (three, "scripted")
    assert counted(scoring=Scoring(mode="listwise")) == (("draft", "listwise"), "scripted")
    assert counted(scoring=Scoring(evidence="passages")) == (three, "scripted")
    assert counted(prompts=replace(ASKED, statement="Is that so?")) == (three, "scripted")
    assert counted(scoring=Scoring(weights={"self_reflect": 2.0})) == (three, "scripted")
    assert counted(scoring=Scoring(weights={"verdict": 2.0})) == (("draft", "verdict"), "")
    assert counted(prompts=replace(ASKED, verify="Asked: {question}")) == (three, "scripted")
    assert counted(scoring=with_self_reflection(Scoring())) == (three, "scripted")
    assert counted(drafter=other) == (three, "scripted")
    answer = SpeculativeRAG(drafter=judge, subsets="random").answer("which?", ["it is red here"])
    assert answer.scores_used == ("draft", "verdict") and judge.score_calls == []


@pytest.mark.parametrize("given", [False, True])
def test_only_a_drafter_that_was_trained_to_judge_is_asked(trained, given):
    stages = {"judge": set(), "other": set()}

    def watched(lm, name):
        generate = lm.generate

        def watch(requests, sampling=None, *, top_log_probs=0):
            stages[name] |= {(len(request.stages), top_log_probs) for request in requests}
            return generate(requests, sampling, top_log_probs=top_log_probs)

        lm.generate = watch
        return lm

    judge = watched(trained(judging_lm({"red": 0.3})), "judge")
    other = watched(ScriptedLM(lambda prompt: ("because", "blue")), "other")
    rag = SpeculativeRAG(drafter=[judge, other], subsets="random", scoring=Scoring(scores=("draft", "verdict")))
    if given:
        rag = rag.replace(prompts=replace(rag.texts, statement="Is that so?"))
    answer = rag.answer("which?", ["it is red here", "it is red there"])
    assert stages == {"judge": {(3, VERDICT_LOG_PROBS)}, "other": {(2, 0)}}
    stages["judge"].clear()
    rag.replace(scoring=Scoring()).answer("which?", ["it is red here"])
    assert stages["judge"] == {(2, 0)}  # not asked where it does not count
    assert answer.scores_used == ("draft",) and any("left out: verdict" in note for note in answer.notes)


def test_drafts_with_the_same_answer_have_the_best_of_their_verdicts():
    draft = Draft(0, (0,), (), "blue", "")
    verdicts = [
        Verdict(replace(draft, index=i), log_draft=own, log_verdict=judged)
        for i, (own, judged) in enumerate([(-1.0, -2.0), (-2.0, -0.1), (-3.0, None)])
    ]
    (one,) = merged(verdicts)
    assert (one.draft.index, one.same, one.log_draft, one.log_verdict) == (0, (1, 2), -1.0, -0.1)
    (none,) = merged([replace(verdict, log_verdict=None) for verdict in verdicts])
    assert none.log_verdict is None


async def test_a_verdict_that_is_not_a_number_is_a_lost_draft():
    nan = replace(said(0.5, 0.5), top_log_probs=({" Yes": math.nan, " No": -1.0},))
    lm = ScriptedLM(lambda prompt: Completion((part("so"), part("42"), nan)))
    (lost,) = await drafted(Drafter(lm, ASKED))
    assert isinstance(lost, DraftFailure) and "NaN" in lost.error
    one = ScriptedLM(lambda prompt: Completion((part("42"),)))
    (lost,) = await drafted(Drafter(one, ASKED))
    assert isinstance(lost, DraftFailure) and "one part" in lost.error


def test_a_verdict_that_nobody_gives_is_refused_at_the_door(trained):
    scoring = Scoring(scores=("draft", "verdict"))
    refusal = "no model makes the scores verdict.*choose among agreement, draft, self_contain, self_reflect; `specrag"
    with pytest.raises(InvalidInputError, match=refusal):
        SpeculativeRAG(drafter=judging_lm({}), scoring=scoring)
    SpeculativeRAG(drafter=judging_lm({}), scoring=scoring, prompts=ASKED)  # on a server, say
    with pytest.raises(InvalidInputError, match=refusal):
        SpeculativeRAG(drafter=trained(judging_lm({}), Prompts()), scoring=scoring, prompts=ASKED)


# --- training -------------------------------------------------------------------------------------------


def example(text: str, answer: str, answerable: bool = True) -> Example:
    right = (answer,) if answerable else ()
    return Example("which?", (Passage(text),), "r", answer if answerable else "not in the passages", answerable, right)


def test_a_drafters_own_drafts_are_judged(tmp_path):
    replies = [("so", "it is red"), ("so", "blue"), ("no", "not in the passages"), ("so", "green"),
               ("no", "not in the passages"), ("", "red")]  # fmt: skip
    lm = ScriptedLM(lambda prompt: next(reply for i, reply in enumerate(replies) if f"tower {i}." in prompt))
    given = [example(f"It is tower {i}.", "red", answerable=i not in (2, 3)) for i in range(6)]
    cache = tmp_path / "drafts.jsonl"
    judged = judged_drafts(given, lm, cache, prompts=ASKED, imitated=1.0)
    # A wrong abstention (4) and an empty draft (5) are left out.
    assert [(e.answer, e.verdict, e.imitated) for e in judged] == [
        ("it is red", True, True),
        ("blue", False, False),
        ("not in the passages", None, True),
        ("green", False, False),  # nothing there answers
    ]
    assert [(e.question, e.passages) for e in judged] == [(e.question, e.passages) for e in given[:4]]
    calls = len(lm.generate_calls)
    again = judged_drafts(given, lm, cache, prompts=ASKED, imitated=0.0)
    assert len(lm.generate_calls) == calls and [e.answer for e in again] == ["it is red", "blue", "green"]
    assert not any(e.imitated for e in again)
    judged_drafts(given, lm, cache, prompts=ASKED, version="trained anew")
    assert len(lm.generate_calls) == 2 * calls
    with pytest.raises(InvalidInputError, match="of 3 drafts that answer, 0 are right"):
        judged_drafts([replace(e, right=("pink",)) for e in given], lm, cache, prompts=ASKED)
    with pytest.raises(ModelError, match="does not continue a header"):
        free = ScriptedLM(lambda prompt: Completion((part("Rationale: so\nAnswer: red"),), staged=False))
        judged_drafts(given, free, tmp_path / "other.jsonl", prompts=ASKED)
    with pytest.raises(InvalidInputError, match="name what comes before the verdict"):
        judged_drafts(given, lm, cache, prompts=Prompts())
    with pytest.raises(InvalidInputError, match=r"imitated must lie in \[0, 1\]"):
        judged_drafts(given, lm, cache, prompts=ASKED, imitated=2.0)


@pytest.mark.parametrize("imitated", [True, False])
@pytest.mark.parametrize("verdict", [True, False])
def test_an_example_with_a_verdict_has_the_tokens_of_drafting(tiny, verdict, imitated):
    drafter, encoder, end = Drafter(tiny, ASKED), tiny.encoder, 0
    draft = Example("which?", (Passage("It is red."),), "It is red.", "red", verdict=verdict, imitated=imitated)
    encoded = encode_example(draft, drafter, encoder, end)
    word = " Yes" if verdict else " No"
    text = f" It is red.\nAnswer: red\n{VERDICT_HEADER}{word}"
    prompt = encoder.encode_generation(drafter.request("which?", draft.passages))
    assert encoded.ids == [*prompt, *encoder.encode_text(text)]
    learnt = [token for token in encoded.labels if token != IGNORED]
    parts = [" It is red.", "\n", " red"]
    written = [token for piece in parts for token in encoder.encode_text(piece)] + [end] if imitated else []
    assert learnt == [*written, *encoder.encode_text(word)]
    with pytest.raises(InvalidInputError, match="the prompts have no verdict_header"):
        encode_example(draft, Drafter(tiny), encoder, end)


@pytest.mark.slow
async def test_a_drafter_learns_which_of_its_drafts_are_right(smollm2, tmp_path):
    """Every second draft is wrong, and says something else."""

    def lm(adapter=None) -> TransformersLM:
        model = tiny_llama(len(smollm2.tokenizer), initializer_range=0.02)
        return TransformersLM(model, smollm2.tokenizer, adapter=adapter)

    rounds = [
        [
            replace(e, imitated=False, answer=e.answer if i % 2 else "no tower", verdict=bool(i % 2))
            for i, e in enumerate(part)
            if e.answerable
        ]
        for part in made(40, variants=16)
    ]
    settings = TrainingSettings(
        method="full", learning_rate=1e-2, batch_size=4, micro_batch_size=4, precision="float32"
    )
    out = train(lm(), rounds, tmp_path / "out", settings=settings, prompts=ASKED)
    assert Prompts.of_drafter(out) == ASKED
    read = TransformersLM(out)
    drafter, sure = Drafter(read, ASKED), {True: [], False: []}
    for e in rounds[0][:12]:
        ids = encode_example(e, drafter, read.encoder, 0).ids[:-1]
        with torch.inference_mode():
            log_probs = read.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        sure[e.verdict].append(log_probs[read.encoder.encode_text(" Yes")[0]].exp().item())
    assert min(sure[True]) > 0.5 > max(sure[False])
