import asyncio
import dataclasses
import math
import threading
import warnings

import numpy as np
import pytest
from langchain_core.documents import Document

from specrag import Passage, Prompts, SpeculativeRAG
from specrag.errors import DraftingError, InvalidInputError, LogProbsUnavailableError, ModelError
from specrag.models import Completion, GenerationRequest, Sampling, Segment, Stage, Turn
from specrag.schema import AnswerReady, DraftDone, DraftFailed, SubsetsChosen, VerdictReady
from specrag.speculative.verification import Scoring
from tests.fakes import NAN, HashEmbedder, ScriptedLM, ScriptedReader, part, shortened

PASSAGES = [Passage(f"passage number {i}", title=f"T{i}", id=str(i)) for i in range(10)]


def reads(text: str, i: int) -> bool:
    return f"passage number {i} " in text


def by_passage(text: str) -> tuple[str, str]:
    """Answers with the numbers of the passages that it was shown."""
    return "because", " ".join(str(i) for i in range(10) if reads(text, i))


def pipeline(reply=by_passage, **options) -> SpeculativeRAG:
    lm = {name: options.pop(name) for name in ("batched", "scores", "log_probs", "delay", "window") if name in options}
    return SpeculativeRAG(drafter=ScriptedLM(reply, **lm), embedder=HashEmbedder(), **options)


# --- with real models -----------------------------------------------------------------------------


@pytest.mark.parametrize("reading", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        ({"max_answer_tokens": "24"}, "max_answer_tokens must be a whole number, got '24'"),
        ({"max_rationale_tokens": 0}, "max_rationale_tokens must be at least 1, got 0"),
        ({"drafts": True}, "drafts must be a whole number, got True"),
    ],
)
def test_numbers_are_checked_whoever_drafts(reading, settings, message):
    drafter = ScriptedReader({"42": 0.5}) if reading else ScriptedLM(lambda text: ("because", "42"))
    with pytest.raises(InvalidInputError, match=message):
        SpeculativeRAG(drafter=drafter, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": "1"}, "temperature must be a number"), ({"top_k": 2.5}, "top_k must be a whole number"),
     ({"top_p": True}, "top_p must be a number"), ({"seed": "1"}, "seed must be a whole number")],
)  # fmt: skip
def test_sampling_takes_numbers(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("scoring", "verifier", "message"),
    [
        (Scoring(mode="listwise"), None, "mode='listwise' needs a verifier that is a language model"),
        (Scoring(mode="listwise"), ScriptedReader({"42": 0.5}), "mode='listwise' needs a verifier that is"),
        (
            Scoring(scores=("draft", "self_reflect")),
            None,
            "the scores self_reflect, since nobody verifies",
        ),
        (Scoring(scores=("span",)), None, "no model makes the scores span"),
        (
            Scoring(scores=("listwise",), mode="pointwise"),
            ScriptedLM(lambda text: None),
            "no model makes the scores listwise",
        ),
        (
            Scoring(scores=("self_contain",)),
            ScriptedLM(lambda text: None),
            r"\(listwise\): choose among",
        ),
    ],
)
def test_scores_that_no_model_makes_are_refused_at_construction(scoring, verifier, message):
    with pytest.raises(InvalidInputError, match=message):
        SpeculativeRAG(drafter=ScriptedReader({"42": 0.5}), verifier=verifier, scoring=scoring)


def test_real_drafts_are_made_scored_and_chosen_over_real_passages(quick_smollm2, minilm, questions, forward_passes):
    question = questions[0].question
    passages = shortened(questions[0].passages)
    short = {"max_rationale_tokens": 16, "max_answer_tokens": 8}
    rag = SpeculativeRAG(drafter=quick_smollm2, embedder=minilm, prompts=Prompts.for_small_models(), seed=0, **short)
    quick_smollm2.score([_probe()])  # the checks of packed rows and of batches come before the count
    quick_smollm2.generate([GenerationRequest(_probe(), (Stage(max_tokens=1),))] * 2)
    counts = forward_passes(quick_smollm2.model)
    answer = rag.answer(question, passages)
    drafting = [n for n in counts if n != counts[-1]]
    assert drafting
    assert counts[-1] == max(counts[2:])  # the last pass scores all drafts together
    assert len(answer.verdicts) + len(answer.failures) == 5  # an untrained drafter may end a draft without an answer
    assert len(answer.verdicts) >= 3
    assert answer.scores_used == ("draft", "self_contain", "self_reflect")
    assert answer.embedding_source == "embedder"
    totals = [v.log_score for v in answer.verdicts]
    assert totals == sorted(totals, reverse=True)
    for v in answer.verdicts:
        assert v.log_score == pytest.approx(v.log_draft + v.log_self_contain + v.log_self_reflect)
        assert all(math.isfinite(x) and x <= 0.7 for x in (v.log_draft, v.log_self_contain, v.log_self_reflect))
    best = answer.verdicts[0].draft
    assert (answer.text, answer.rationale, answer.passages) == (best.text, best.rationale, best.passages)
    assert {i for made in (*answer.verdicts, *answer.failures) for i in subset_of(made)} == set(range(10))
    assert answer.timings.total >= answer.timings.draft > 0 < answer.timings.verify
    again = rag.answer(question, passages)
    assert [v.draft.text for v in again.verdicts] == [v.draft.text for v in answer.verdicts]
    assert [v.log_score for v in again.verdicts] == pytest.approx(totals)


def subset_of(made):
    return made.draft.subset if hasattr(made, "draft") else made.subset


def _probe():
    return (Turn("assistant", (Segment("a b c", "x"),)),)


# --- the flow ---------------------------------------------------------------------------------------


def test_events_tell_the_story_in_order():
    events = list(pipeline().stream("q", PASSAGES))
    kinds = [type(event) for event in events]
    assert kinds[0] is SubsetsChosen and kinds[-1] is AnswerReady
    assert kinds.count(DraftDone) == kinds.count(VerdictReady) == 5
    assert len(events) == 12


def test_models_in_this_process_draft_in_one_batch_and_verify_in_one():
    rag = pipeline()
    rag.answer("q", PASSAGES)
    assert rag.drafter.generate_calls == [5] and rag.drafter.score_calls == [5]


def test_drafts_of_servers_are_verified_as_they_arrive():
    rag = pipeline(batched=False, delay=lambda text: 0.3 if reads(text, 0) else 0.0)
    kinds = []
    for event in rag.stream("q", PASSAGES):
        kinds.append(type(event).__name__)
    assert rag.drafter.generate_calls == [1] * 5
    assert kinds.index("VerdictReady") < len(kinds) - 1 - kinds[::-1].index("DraftDone")


def test_the_best_verified_draft_at_the_deadline_is_the_answer():
    rag = pipeline(batched=False, delay=lambda text: 30.0 if reads(text, 0) else 0.0, deadline=1.0)
    answer = rag.answer("q", PASSAGES)
    assert len(answer.verdicts) == 4 and not answer.abstained
    assert "0" not in answer.text.split()
    assert answer.timings.total < 5
    assert "deadline of 1.0 s passed with 1 drafts open" in " ".join(answer.notes)


def test_a_failed_draft_is_not_open_at_the_deadline():
    def reply(text):
        return ValueError("away") if reads(text, 1) else by_passage(text)

    answer = pipeline(
        reply, batched=False, delay=lambda text: 30.0 if reads(text, 0) else 0.0, deadline=0.5, passages_per_draft=1
    ).answer("q", PASSAGES[:3])
    assert len(answer.verdicts) == len(answer.failures) == 1
    assert "the deadline of 0.5 s passed with 1 drafts open" in answer.notes


def test_nothing_verified_by_the_deadline_is_an_abstention_that_says_so():
    answer = pipeline(batched=False, delay=lambda text: 30.0, deadline=0.1).answer("q", PASSAGES)
    assert answer.abstained and answer.text == "" and "no draft was verified in time" in answer.reason


def test_the_answer_is_the_same_inside_a_running_event_loop():
    rag = pipeline()

    async def notebook():
        blocking = rag.answer("q", PASSAGES)
        return blocking, await rag.aanswer("q", PASSAGES)

    first, second = asyncio.run(notebook())
    assert first.text == second.text == rag.answer("q", PASSAGES).text


def test_many_questions_at_once_from_many_threads():
    rag = pipeline(batched=False, delay=lambda text: 0.01)
    answers = {}

    def work(i):
        answers[i] = rag.answer("q", PASSAGES).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8 and len(set(answers.values())) == 1


def test_leaving_a_stream_early_stops_the_work():
    rag = pipeline(batched=False, delay=lambda text: 0.0 if reads(text, 0) else 5.0)
    for event in rag.stream("q", PASSAGES):
        if isinstance(event, DraftDone):
            break
    assert len(rag.drafter.generate_calls) == 1


# --- choosing ----------------------------------------------------------------------------------------


def test_the_draft_that_the_verifier_trusts_most_wins():
    rag = pipeline(scores=lambda text: -0.1 if "7" in text else -3.0)
    answer = rag.answer("q", PASSAGES)
    assert "7" in answer.text.split()
    assert PASSAGES[7] in answer.passages


def test_abstains_when_every_draft_does():
    answer = pipeline(lambda text: ("x", "not in the passages")).answer("q", PASSAGES)
    assert answer.abstained and answer.text == "" and answer.passages == ()
    assert "every draft says" in answer.reason and len(answer.verdicts) == 5


def test_abstaining_drafts_are_neither_scored_nor_chosen():
    rag = pipeline(lambda text: ("x", "42" if reads(text, 3) else "not in the passages"))
    answer = rag.answer("q", PASSAGES)
    assert answer.text == "42" and rag.drafter.score_calls == [1]
    assert [v.draft.abstained for v in answer.verdicts] == [False, True, True, True, True]


def test_abstains_below_the_threshold_and_says_by_how_much():
    rag = pipeline(scoring=Scoring(threshold=-2.0), scores=lambda text: -5.0)
    answer = rag.answer("q", PASSAGES)
    assert answer.abstained and answer.text == "" and "-2.000" in answer.reason
    assert answer.verdicts[0].log_score is not None
    assert not rag.replace(scoring=Scoring(threshold=-50.0)).answer("q", PASSAGES).abstained


def test_equal_drafts_are_scored_once():
    rag = pipeline(lambda text: ("because", "42"))
    answer = rag.answer("q", PASSAGES)
    assert rag.drafter.score_calls == [1] and len(answer.verdicts) == 5
    assert answer.verifier_usage.prompt_tokens == 7


def test_only_draft_scores_needs_no_verifier():
    rag = pipeline(scoring=Scoring(("draft",)))
    answer = rag.answer("q", PASSAGES)
    assert rag.drafter.score_calls == [] and answer.scores_used == ("draft",)


def test_a_verifier_without_prompt_log_probabilities_gets_the_substitute_and_the_answer_says_so():
    def reply(text):
        if "Yes or No" not in text:
            return by_passage(text)
        top = {"Yes": math.log(0.6), " yes": math.log(0.1), "No": math.log(0.3)}
        return Completion((part("Yes").__class__("Yes", (-0.5,), 1, None, "length", (top,)),))

    rag = pipeline(reply, scores=None)
    answer = rag.answer("q", PASSAGES)
    assert answer.scores_used == ("draft", "self_reflect")
    assert answer.verdicts[0].log_self_reflect == pytest.approx(math.log(0.7))
    assert answer.verdicts[0].log_self_contain is None
    assert any("first generated token" in note for note in answer.notes)


def test_models_without_any_log_probabilities_leave_it_to_agreement_and_rank():
    rag = pipeline(lambda text: ("x", "left" if reads(text, 0) else "right"), scores=None, log_probs=False)
    answer = rag.answer("q", PASSAGES)
    assert answer.text == "right" and answer.scores_used == ()
    assert any("agreement among drafts" in note for note in answer.notes)


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
def test_a_drafter_that_fails_on_one_subset_costs_that_draft(batched):
    def reply(text):
        return ValueError("cannot read this") if reads(text, 2) else by_passage(text)

    events = list(pipeline(reply, batched=batched).stream("q", PASSAGES))
    answer = events[-1].answer
    assert len(answer.verdicts) == 4 and len(answer.failures) == 1
    assert "cannot read this" in answer.failures[0].error and 2 in answer.failures[0].subset
    assert sum(isinstance(event, DraftFailed) for event in events) == 1


@pytest.mark.parametrize("batched", [True, False])
def test_drafts_and_failures_have_the_number_of_their_subset(batched):
    def reply(text):
        return ValueError("cannot read this") if reads(text, 2) else by_passage(text)

    events = list(pipeline(reply, batched=batched).stream("q", PASSAGES))
    subsets = events[0].subsets
    made = [*(v.draft for v in events[-1].answer.verdicts), *events[-1].answer.failures]
    assert sorted(each.index for each in made) == list(range(5))
    assert all(subsets[each.index] == each.subset for each in made)


@pytest.mark.parametrize("batched", [True, False])
def test_of_drafts_with_equal_subsets_the_one_that_failed_is_known(batched):
    calls = []

    def reply(text):
        calls.append(text)
        # The batch fails; then each draft is asked for by itself, in order.
        return ValueError("away") if len(calls) in ((1, 3) if batched else (2,)) else ("because", "42")

    rag = pipeline(reply, batched=batched, sampling=Sampling(temperature=1.0, seed=0), drafts=3)
    answer = rag.answer("q", PASSAGES[:1])
    assert [v.draft.subset for v in answer.verdicts] == [(0,), (0,)] == [answer.failures[0].subset] * 2
    assert sorted(v.draft.index for v in answer.verdicts) == [0, 2] and answer.failures[0].index == 1


def test_all_drafts_lost_is_an_error_with_the_first_reason():
    with pytest.raises(DraftingError, match="all 5 drafts failed; the first: ModelError: broken"):
        pipeline(lambda text: ModelError("broken")).answer("q", PASSAGES)


def test_a_drafter_that_writes_nothing_is_lost():
    with pytest.raises(DraftingError, match="wrote no answer"):
        pipeline(lambda text: ("x", "")).answer("q", PASSAGES)


def test_scores_that_are_not_numbers_lose_their_draft_only():
    answer = pipeline(scores=lambda text: NAN if "7" in text else -1.0).answer("q", PASSAGES)
    assert len(answer.verdicts) == 4 and "NaN" in answer.failures[0].error
    assert all("7" not in v.draft.text for v in answer.verdicts)


def test_drafts_whose_log_probabilities_are_not_numbers_are_lost():
    def reply(text):
        return Completion((part("x"), part("42", NAN))) if reads(text, 1) else by_passage(text)

    answer = pipeline(reply).answer("q", PASSAGES)
    assert len(answer.verdicts) == 4 and "NaN" in answer.failures[0].error


def test_a_verifier_that_fails_is_an_error():
    with pytest.raises(ModelError, match="verifier down"):
        pipeline(scores=lambda text: ModelError("verifier down")).answer("q", PASSAGES)


def test_a_verifier_that_fails_for_one_draft_costs_that_draft():
    rag = pipeline(batched=False, scores=lambda text: ModelError("no") if "7" in text else -1.0)
    answer = rag.answer("q", PASSAGES)
    assert len(answer.verdicts) == 4 and answer.failures[0].error == "verifier: ModelError: no"


# --- odd input ----------------------------------------------------------------------------------------


def test_no_passages_is_an_abstention():
    answer = pipeline().answer("q", [])
    assert answer.abstained and answer.reason == "no passages were given" and answer.verdicts == ()
    assert pipeline().answer("q", [Passage(" ")]).reason == "every passage is empty"


def test_one_passage_makes_one_draft_without_embedding():
    rag = pipeline()
    answer = rag.answer("q", PASSAGES[:1])
    assert len(answer.verdicts) == 1 and answer.embedding_source == "none" and rag.embedder.calls == 0
    assert "1 different subsets for 5 drafts" in " ".join(answer.notes)


def test_repeated_subsets_are_drafted_again_when_sampling():
    rag = pipeline(sampling=Sampling(temperature=1.0, seed=0))
    assert len(rag.answer("q", PASSAGES[:1]).verdicts) == 5


def test_plain_strings_mappings_and_documents_are_welcome_as_passages():
    texts = [p.text for p in PASSAGES]
    given = [
        texts[0],
        {"text": texts[1], "title": "T1"},
        Document(page_content=texts[2], metadata={"title": "T2"}),
        *PASSAGES[3:],
    ]
    rag = pipeline(scores=lambda text: -0.1 if "2" in text else -3.0)
    answer = rag.answer("q", given)
    assert answer.text == rag.answer("q", PASSAGES).text
    assert {type(p) for v in answer.verdicts for p in v.draft.passages} == {Passage}
    assert answer.passages == tuple(Passage.of(given[i]) for i in answer.subset) and 2 in answer.subset
    assert [e.answer.text for e in rag.stream("q", iter(given)) if isinstance(e, AnswerReady)] == [answer.text]


def test_equal_and_empty_passages_are_left_out_and_positions_stay_the_callers():
    passages = [Passage("same text"), Passage(""), Passage("same  text"), Passage("other text")]
    answer = pipeline(lambda text: ("x", "42"), passages_per_draft=1, drafts=2).answer("q", passages)
    assert sorted(v.draft.subset for v in answer.verdicts) == [(0,), (3,)]
    assert set(answer.notes) >= {"1 empty passages were left out", "1 repeated passages were left out"}


def test_a_huge_passage_is_cut_and_the_answer_says_so():
    rag = pipeline(window=500)
    answer = rag.answer("q", [Passage("word " * 20_000), *PASSAGES])
    assert not answer.failures
    assert any("cut to fit the drafter's window of 500 tokens" in note for note in answer.notes)


@pytest.mark.parametrize(
    ("question", "passages", "message"),
    [
        (" ", PASSAGES, "question is empty"),
        (3, PASSAGES, "the question must be a text, got an int"),
        ("q", [*PASSAGES, 3], r"passages\[10\]: a passage is .*; got an int"),
        ("q", [{"title": "T"}], r"passages\[0\]: no 'text' in a mapping with title"),
        ("q", "one text", "passages must be a list of passages, got a str"),
        ("q", None, "passages must be a list of passages, got None"),
    ],
)
def test_unusable_input_is_refused(question, passages, message):
    with pytest.raises(InvalidInputError, match=message):
        pipeline().answer(question, passages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"passages_per_draft": 0}, "passages_per_draft must be"),
        ({"drafts": 2.5}, "whole number"),
        ({"subsets": "x"}, "subsets must be one of"),
        ({"sampling": "coverage"}, "sampling must be a Sampling; `subsets` says how passages are chosen, got str"),
        ({"scoring": ("draft",)}, "scoring must be a Scoring, got tuple"),
        ({"prompts": "Q: {question}"}, "prompts must be a Prompts, got str"),
        ({"embedder": "minilm"}, "embedder must be a specrag Embedder, got str"),
        ({"deadline": 0}, "deadline must be a positive"),
        ({"max_answer_tokens": 0}, "max_answer_tokens must be at least 1"),
        ({"drafter": "gpt"}, "drafter must be a specrag LanguageModel"),
        ({"verifier": object()}, "verifier must be"),
    ],
)
def test_settings_are_checked_at_construction(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        SpeculativeRAG(**({"drafter": ScriptedLM(by_passage)} | changes))


def test_a_drafter_is_asked_with_what_it_was_trained_with(tmp_path):
    asked = []
    drafter = ScriptedLM(lambda text: asked.append(text) or by_passage(text))
    dataclasses.replace(Prompts(), draft="{passages}\nMine: {question}").save_drafting(tmp_path)
    drafter.folder = tmp_path
    rag = SpeculativeRAG(drafter=drafter, embedder=HashEmbedder())
    rag.answer("q", PASSAGES)
    assert len(asked) == 5 and all(text.endswith("\nMine: q") for text in asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rag.replace(prompts=dataclasses.replace(rag.texts, statement="True?")).texts.draft == rag.texts.draft
    with pytest.warns(UserWarning, match="trained to draft with other prompts"):
        assert rag.replace(prompts=Prompts()).texts == Prompts()
    assert SpeculativeRAG(drafter=ScriptedLM(by_passage)).texts == Prompts()


# --- embeddings ---------------------------------------------------------------------------------------


def embedded(dimension=4, count=10, value=None):
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(dimension) if value is None else np.full(dimension, value) for _ in range(count)]
    return [Passage(p.text, embedding=v) for p, v in zip(PASSAGES, vectors, strict=False)]


def test_the_passages_own_embeddings_are_used_when_all_have_one():
    rag = pipeline()
    assert rag.answer("q", embedded()).embedding_source == "passages"
    assert rag.embedder.calls == 0
    assert rag.replace(reuse_embeddings=False).answer("q", embedded()).embedding_source == "embedder"


@pytest.mark.parametrize(
    "passages",
    [embedded()[:9] + [PASSAGES[9]], embedded()[:9] + [Passage("x", embedding=np.ones(7))], embedded(value=np.nan)],
)
def test_missing_unequal_or_broken_embeddings_are_made_anew(passages):
    assert pipeline().answer("q", passages).embedding_source == "embedder"


def test_the_result_is_plain_json():
    import json

    shown = json.loads(json.dumps(pipeline().answer("q", embedded()).to_dict()))
    assert shown["verdicts"][0]["draft"]["passages"][0]["text"].startswith("passage number")
    assert "embedding" not in json.dumps(shown["passages"])


def test_a_missing_substitute_is_an_error_only_when_nothing_is_left(monkeypatch):
    rag = pipeline(scores=lambda text: LogProbsUnavailableError("x"))
    assert rag.answer("q", PASSAGES).scores_used == ("draft",)
