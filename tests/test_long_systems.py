"""Systems over a long document: their names, one reading for all, rows, figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.data import load_questions
from specrag.evaluation.long_documents import LongDocuments
from specrag.evaluation.long_names import LongSystem
from specrag.evaluation.long_rows import drafter_alone, long_figures, long_table, pieces
from specrag.evaluation.long_run import run_dialogues, run_long_systems
from specrag.evaluation.long_systems import INSTRUCTION, LongSystems
from specrag.evaluation.records import Question
from specrag.evaluation.runs import AnswerRow, Run
from specrag.models import Sampling
from specrag.rapid import LongContext, RapidSettings, RapidStats
from specrag.rapid.decoding import TracedRound
from specrag.rapid.proposing import DrafterCaches
from tests.conftest import DEMO
from tests.fakes import HashEmbedder
from tests.rapid_parts import DOCUMENT, PROPOSERS, generator, plain_greedy

NAMES = [
    "long-context", "rag", "rag-upward", "naive-sd-self", "magicdec-self", "match-self", "rapid-self-0",
    "rapid-self-20", "rapid-upward-0", "rapid-upward-40", "hybrid-upward-10", "rag-irrelevant",
    "rapid-self-50-irrelevant", "rapid-upward-20-irrelevant",
]  # fmt: skip


@pytest.fixture(scope="module")
def documents(tiny):
    """Documents of 2,500 tokens from the demo's passages."""
    passages = [passage for question in load_questions(DEMO) for passage in question.passages]
    return LongDocuments(passages, tiny.count_tokens, 2500, repeat=True)


@pytest.fixture(scope="module")
def asked(documents):
    """Five questions with a document each."""
    return [documents.make(question) for question in load_questions(DEMO) if question.gold][:5]


@pytest.fixture(scope="module")
def questions_of_one_document(documents):
    """Three questions over one document."""
    return documents.share([question for question in load_questions(DEMO) if question.gold][:3])


def systems(names, target, drafter=None, **options):
    return LongSystems(names, target, drafter, embedder=HashEmbedder(), max_tokens=8, **options)


def test_names_say_what_reads_and_what_is_sampled():
    rapid = LongSystem.named("rapid-upward-40-irrelevant")
    assert rapid.proposer == "rag" and rapid.upward and rapid.irrelevant and rapid.strength == 40
    settings = rapid.settings(RapidSettings(candidates=5))
    assert (settings.transfer, settings.transfer_strength, settings.candidates) == ("rapid", 40, 5)
    magicdec = LongSystem.named("magicdec-self").settings(RapidSettings(candidates=3))
    assert (magicdec.proposer, magicdec.transfer, magicdec.candidates) == ("window", "none", 3)
    common = RapidSettings(proposer="rest", datastore="store")  # which rest alone looks up
    for name, datastore in (("rest-self", "store"), ("magicdec-self", None), ("long-context", None)):
        assert LongSystem.named(name).settings(common).datastore == datastore
    assert LongSystem.named("long-context").settings(RapidSettings()).candidates == 0
    for proposer in PROPOSERS:
        assert LongSystem.named(f"{proposer}-self").proposer == proposer


@pytest.mark.parametrize(
    "name", ["rapid", "rapid-self-", "long-context-irrelevant", "turbo-self-3", "", "rapid-self--1"]
)
def test_an_unknown_name_is_refused_with_the_forms(name):
    with pytest.raises(InvalidInputError, match="unknown system .* expected long-context"):
        LongSystem.named(name)


def test_what_does_not_go_together_is_refused_before_anything_is_read(tiny):
    with pytest.raises(InvalidInputError, match="need a drafter: rapid-upward-5"):
        systems(["rag", "rapid-upward-5"], tiny)
    with pytest.raises(InvalidInputError, match="each once"):
        systems(["rag", "rag"], tiny)
    with pytest.raises(InvalidInputError, match="max_tokens"):
        LongSystems(["rag"], tiny, embedder=HashEmbedder(), max_tokens=0)


@pytest.mark.slow
def test_every_system_answers_five_questions_and_lossless_ones_say_what_the_target_says(tiny, other, asked):
    runner = systems(NAMES, tiny, other)
    for question in asked:
        rows = {row.system: row for row in runner.answers(question)}
        assert list(rows) == NAMES and {row.error for row in rows.values()} == {None}
        said = rows["long-context"].text
        for name in ("naive-sd-self", "magicdec-self", "match-self", "rapid-self-0", "rapid-upward-0"):
            assert rows[name].text == said, name
        assert rows["naive-sd-self"].rapid["acceptance"] == 1.0
        assert rows["long-context"].rapid["acceptance"] is None
        for row in rows.values():
            parts = row.rapid["pieces"]
            assert "".join(text for text, origin in parts if origin != "rejected") == row.text
            assert AnswerRow.of(row.to_row()).rapid == row.to_row()["rapid"]
        reads = {rows[name].rapid["drafter_seconds"] for name in ("rapid-upward-0", "rapid-upward-40")}
        assert len(reads) == 1 and min(reads) > 0


def test_one_document_is_read_once_for_all_systems_and_questions(tiny, other, asked, forward_passes):
    question = asked[0]
    runner = systems(["long-context", "naive-sd-self", "rapid-self-5", "rapid-self-20"], tiny)
    counts = forward_passes(tiny.model)
    list(runner.answers(question))
    read = sum(counts)
    list(runner.answers(question, done=["rapid-self-20"]))
    assert read > question.metadata["tokens"] and sum(counts) - read < 200


def test_irrelevant_chunks_hold_no_answer_and_none_that_was_retrieved(tiny, asked):
    runner = systems(["rag", "rag-irrelevant", "rapid-self-5-irrelevant"], tiny)
    for question in asked:
        rows = {row.system: row for row in runner.answers(question)}
        assert not rows["rag-irrelevant"].rapid["retrieved_holds_answer"]
        assert not rows["rapid-self-5-irrelevant"].rapid["retrieved_holds_answer"]


def test_a_system_that_fails_has_a_row_and_the_others_go_on(tiny, asked):
    settings = RapidSettings(candidates=2, sampling=Sampling(), retrieval_budget=4)
    rows = list(systems(["rapid-self-5", "magicdec-self"], tiny, settings=settings).answers(asked[0]))
    assert "retrieval budget" in rows[0].error and not rows[0].right and not rows[0].text
    assert rows[1].error is None and rows[1].text


def test_a_question_with_choices_is_asked_with_them_and_judged_by_the_choice(tiny, asked):
    plain = asked[0]
    choice = replace(plain, choices=("one", "two"), correct=(1,), answers=("two",))
    (alone,), (chosen,) = (list(systems(["long-context"], tiny).answers(question)) for question in (plain, choice))
    assert set(chosen.metrics) == {"choice"} and set(alone.metrics) == {"contains", "exact_match", "f1"}
    assert chosen.usage["target"].prompt_tokens > alone.usage["target"].prompt_tokens


def test_who_asks_for_a_whole_text_does_not_ask_for_a_sentence(tiny, asked):
    summary = replace(asked[0], answers=("one of many words " * 10,))
    (short,), (whole,) = (list(systems(["long-context"], tiny).answers(question)) for question in (asked[0], summary))
    saved = short.usage["target"].prompt_tokens - whole.usage["target"].prompt_tokens
    assert saved == pytest.approx(tiny.count_tokens(INSTRUCTION), abs=1) and "rouge_l" in whole.metrics


def test_a_document_that_cannot_be_read_fails_every_system_and_turn(tiny):
    long = Question("q", "who?", ("Ada",), context="Ada won. " * 4000)
    runner = systems(["long-context", "rag"], tiny)
    rows = [*runner.answers(long), *runner.dialogue([long, replace(long, id="q2")], {("rag", "q"): "Ada"})]
    assert [row.key for row in rows[2:]] == [("long-context", "q"), ("long-context", "q2"), ("rag", "q2")]
    assert all("8192 positions" in row.error for row in rows)


def test_a_question_without_a_document_is_refused(tiny, asked):
    with pytest.raises(InvalidInputError, match="no document"):
        list(systems(["rag"], tiny).answers(replace(asked[0], context="")))


# --- the engine's part ------------------------------------------------------------------------------


def test_a_trace_holds_the_answer_and_what_was_rejected(tiny, other):
    session = LongContext(DOCUMENT, generator(tiny, other, candidates=3, transfer="none"))
    stats = RapidStats(trace=[])
    session.ask("q", max_tokens=20, stats=stats)
    tokens = [token for step in stats.trace for token in (*step.candidates[: step.accepted], step.following)]
    assert tokens[: stats.tokens] == plain_greedy(session, "q", 20)
    assert sum(step.accepted for step in stats.trace) == stats.accepted
    assert [len(step.candidates) for step in stats.trace[1:]] == stats.schedule
    assert "trace" not in stats.to_dict() and session.ask("q", max_tokens=4).stats.trace is None


def test_pieces_are_joined_and_cut_at_the_answers_end(tiny):
    encode = tiny.tokenizer.encode
    a, b, c = (encode(word, add_special_tokens=False)[0] for word in ("key", "lamp", "bell"))
    trace = [TracedRound((), 0, a), TracedRound((b, c, c), 1, a), TracedRound((c, c), 2, b)]
    text = tiny.tokenizer.decode
    assert pieces(trace, 4, tiny.tokenizer) == [
        [text([a]), "target"], [text([b]), "accepted"], [text([c, c]), "rejected"], [text([a]), "target"],
        [text([c]), "accepted"],
    ]  # fmt: skip


def test_a_drafters_reading_is_kept_for_the_next_question_and_changes_nothing(tiny, other, forward_passes):
    rapid = generator(tiny, other, candidates=3, transfer_strength=20.0)
    alone = [LongContext(DOCUMENT, rapid).ask(q, max_tokens=12).text for q in ("which key?", "which lamp?")]
    session = LongContext(DOCUMENT, rapid)
    session.drafters = DrafterCaches()
    counts = forward_passes(other.model)
    first = session.ask("which key?", max_tokens=12)
    assert first.text == alone[0] and first.stats.startup_seconds > 0
    read = max(counts)
    counts.clear()
    again = session.ask("which key?", max_tokens=12)
    assert again.text == alone[0] and again.stats.startup_seconds == 0
    assert session.ask("which lamp?", max_tokens=12).text == alone[1]
    assert read > 100 > max(counts)


# --- figures -----------------------------------------------------------------------------------------


def row(system, key, right, accepted=3, candidates=4):
    made = {"accepted": accepted, "candidates": candidates, "tokens_per_second": 8.0, "drafter_seconds": 1.0}
    return AnswerRow(system=system, id=key, right=right, rapid=made)


def test_figures_compare_with_the_target_alone_and_count_what_both_miss():
    rows = [row("long-context", key, right, 0, 0) for key, right in zip("abcd", (1, 0, 0, 0), strict=True)]
    rows += [row("rag-upward", key, right, 0, 0) for key, right in zip("abcd", (0, 1, 0, 0), strict=True)]
    rows += [row("rapid-upward-40", key, right) for key, right in zip("abc", (0, 1, 1), strict=True)]
    target, rapid = long_figures(rows, ["long-context", "rapid-self-5", "rapid-upward-40"])
    assert (target.right, target.questions, target.won, target.both_fail, target.acceptance) == (1, 4, 0, None, None)
    assert (rapid.right, rapid.questions, rapid.won, rapid.lost) == (2, 3, 2, 1)
    assert (rapid.both_fail, rapid.rescued, rapid.acceptance) == (1, 1, 0.75)
    assert "| rapid-upward-40 | 2 of 3 (67%) |" in long_table([target, rapid])


def test_each_rapid_system_is_compared_with_its_own_drafter():
    assert drafter_alone("rapid-upward-10-irrelevant") == "rag-upward-irrelevant"
    assert drafter_alone("rag-self-10") == "rag" and drafter_alone("rag-upward") is None
    assert drafter_alone("hybrid-self-5") == "rag" and drafter_alone("magicdec-self") is None


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_continues_and_asks_nothing_twice(tiny, asked, tmp_path):
    names = ["long-context", "rapid-self-10"]

    def stopping(row, done, left):
        if row.system == "long-context" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_long_systems(systems(names, tiny), asked[:3], tmp_path, progress=stopping)
    assert len(Run.load(tmp_path).answers) == 3
    told = []
    rows = run_long_systems(
        systems(names, tiny), asked[:3], tmp_path, progress=lambda row, done, left: told.append((row.key, done, left))
    )
    assert [key for key, _, _ in told] == [("rapid-self-10", asked[1].id), *((name, asked[2].id) for name in names)]
    assert told[0][2] is None and told[-1][2] > 0
    assert [row.key for row in rows] == [(name, question.id) for question in asked[:3] for name in names]
    assert {row.text for row in rows if row.system == "long-context"} == {
        row.text for row in Run.load(tmp_path).answers if row.system == "long-context"
    }


def test_a_kept_reading_is_not_read_again(tiny, asked, tmp_path, forward_passes):
    first = {row.system: row for row in systems(["long-context"], tiny, sessions=tmp_path).answers(asked[0])}
    counts = forward_passes(tiny.model)
    later = list(systems(["long-context", "rapid-self-10"], tiny, sessions=tmp_path).answers(asked[0]))
    assert later[0].text == first["long-context"].text and max(counts) < 600 < asked[0].metadata["tokens"]
    assert later[0].rapid["prefill_seconds"] == first["long-context"].rapid["prefill_seconds"] > 0


def test_in_a_dialogue_each_system_sees_its_own_earlier_answers(tiny, other, questions_of_one_document, tmp_path):
    names = ["long-context", "rapid-self-0", "rag", "rapid-upward-0", "rapid-self-20-irrelevant"]
    dialogue = questions_of_one_document
    rows = run_dialogues(systems(names, tiny, other), [dialogue], tmp_path)
    said = {row.key: row for row in rows}
    assert [row.error for row in rows] == [None] * (len(names) * len(dialogue))
    for question in dialogue:  # lossless systems have the same history, so they say the same
        texts = {said[name, question.id].text for name in ("long-context", "rapid-self-0", "rapid-upward-0")}
        assert len(texts) == 1
    read = [said["long-context", question.id].usage["target"].prompt_tokens for question in dialogue]
    assert read == sorted(set(read))  # each turn is longer than the one before
    alone = systems(["long-context"], tiny).answers(dialogue[1])
    assert next(alone).usage["target"].prompt_tokens < read[1]  # a question alone has no history


def test_a_dialogue_that_was_stopped_continues_with_the_answers_that_are_there(tiny, questions_of_one_document):
    dialogue = questions_of_one_document
    whole = {row.key: row.text for row in systems(["long-context"], tiny).dialogue(dialogue)}
    begun = {("long-context", dialogue[0].id): whole["long-context", dialogue[0].id]}
    rest = list(systems(["long-context"], tiny).dialogue(dialogue, begun))
    assert [row.id for row in rest] == [question.id for question in dialogue[1:]]
    assert all(row.text == whole[row.key] for row in rest)
    assert list(systems(["long-context"], tiny).dialogue(dialogue, whole)) == []


def test_a_dialogue_over_two_documents_is_refused(tiny, asked):
    with pytest.raises(InvalidInputError, match="one document"):
        list(systems(["rag"], tiny).dialogue(asked[:2]))
