"""The examples that a drafter is trained on: rationales, distractors, substituted answers, tokens."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from specrag import Passage, Prompts
from specrag.errors import InvalidInputError
from specrag.evaluation.data import Question
from specrag.speculative.drafting import Drafter
from specrag.text import MAX_EVIDENCE_WORDS, yes_or_no
from specrag.training import Mixture, evaluate_drafter, extractive_rationale, make_examples
from specrag.training.examples import IGNORED, encode_example, in_batches
from specrag.training.rationales import answer_in, supporting_rationale
from specrag.training.substitution import Substitutes, answer_kind
from tests.fakes import HashEmbedder, ScriptedLM
from tests.towers import made, records

# --- rationales -----------------------------------------------------------------------------------------


def test_the_rationale_is_the_sentence_with_the_answer_under_its_title():
    passage = Passage("Berlin is big. Paris has held the record since 1889. In 1889 it rained.", title="Paris")
    assert answer_in(passage, ["1889", "89"]) == "1889"
    assert extractive_rationale("since when has paris held the record", "1889", passage) == (
        "Paris: Paris has held the record since 1889."
    )
    long = Passage("word " * 60 + "the answer is Rome and more words follow here " + "word " * 60)
    cut = extractive_rationale("what", "Rome", long)
    assert cut is not None and "Rome" in cut and len(cut.split()) <= MAX_EVIDENCE_WORDS
    assert extractive_rationale("what", "Oslo", passage) is None
    assert answer_in(Passage("the United  States, of America"), ["united states of america"]) == (
        "United  States, of America"
    )
    assert answer_in(Passage("category"), ["cat"]) is None
    initials = Passage("It rained. Toto was written by L. Frank Baum and drawn by Dr. W. W. Denslow. He barks.")
    assert extractive_rationale("who wrote toto", "L. Frank Baum", initials) == (
        "Toto was written by L. Frank Baum and drawn by Dr. W. W. Denslow."
    )
    scattered = Passage("It was 28% in 2008. Later it fell to 20 of 100.")
    assert extractive_rationale("how much", "20", scattered) == "Later it fell to 20 of 100."


def test_the_rationale_of_yes_or_no_is_the_sentence_that_shares_most_with_the_question():
    moose = Passage("It is a big animal. The moose belongs to the deer family. Is it fast? It is.", title="Moose")
    asked = "is the moose a member of the deer family"
    assert supporting_rationale(asked, [moose]) == "Moose: The moose belongs to the deer family."
    # "tower" stands in every sentence and says less than "iron", which stands in one
    tower = Passage("The tower, a tower of the city, is a tower. This tower is of iron.")
    assert supporting_rationale("is the city tower made of iron", [tower, Passage("The city is old.")]) == (
        "This tower is of iron."
    )
    long = Passage("word " * 60 + "the moose belongs to the deer family as all know " + "word " * 60)
    cut = supporting_rationale(asked, [Passage("Nothing."), long])
    assert cut is not None and "moose belongs to the deer family" in cut and len(cut.split()) <= MAX_EVIDENCE_WORDS
    assert supporting_rationale("is that so", [moose]) == "Moose: It is a big animal."
    assert supporting_rationale(asked, [Passage(" ")]) is None


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (("yes",), "Yes"),
        (("No.", "no"), "No"),
        (("yes", "no"), None),
        (("no", "none of them"), None),
        (("the no",), "No"),
        ((), None),
    ],
)
def test_answers_that_say_yes_or_no(answers, said):
    assert yes_or_no(answers) == said


# --- examples -------------------------------------------------------------------------------------------


def test_examples_show_what_drafts_will_see():
    rounds = made(60, variants=4, mixture=Mixture(unanswerable=0.3, gold_alone=0.1, wide=0.1))
    assert len(rounds) == 4 and [len(part) for part in rounds] == [60] * 4
    examples = [e for part in rounds for e in part]
    unanswerable = [e for e in examples if not e.answerable]
    assert 0.2 < len(unanswerable) / len(examples) < 0.4
    for e in examples:
        asked = re.search(r"\d+", e.question).group()
        gold = [p for p in e.passages if p.title == f"Tower {asked}"]
        assert bool(gold) == e.answerable and len({p.text for p in e.passages}) == len(e.passages)
        if e.answerable:
            assert e.answer == f"in {1800 + int(asked)}" and e.answer in e.rationale
        else:
            assert Prompts().is_abstention(e.answer) and len(e.passages) == 2
    assert {len(e.passages) for e in examples if e.answerable} == {1, 2, 3, 4}
    first = [
        e.passages[0].title == f"Tower {re.search(r'[0-9]+', e.question).group()}" for e in examples if e.answerable
    ]
    assert 0.3 < sum(first) / len(first) < 0.8  # gold first or last
    assert rounds[0] != rounds[1] and made(60, variants=4)[0] == made(60, variants=1)[0]


def test_an_example_is_examined_by_any_of_its_right_answers():
    example = made(24, mixture=Mixture(unanswerable=0))[0][0]
    example = dataclasses.replace(example, right=(*example.right, "the year three"))
    for written, right in ((example.answer, 1.0), ("It was the year three.", 1.0), ("in 1700", 0.0)):
        assert evaluate_drafter(ScriptedLM(lambda prompt, w=written: ("why", w)), [example]).right == right


def test_an_answer_gives_way_to_another_of_its_kind():
    kept, changed = Mixture(unanswerable=0), Mixture(unanswerable=0, substituted=1)
    for before, after in zip(made(mixture=kept)[0], made(mixture=changed)[0], strict=True):
        gold = next(p.text for p in after.passages if p.title == before.rationale.split(":")[0])
        assert after.answer != before.answer and re.fullmatch(r"in 18\d\d", after.answer)
        assert after.question == before.question and after.right == (after.answer,)
        assert after.answer in gold and after.answer in after.rationale
        assert not any(before.answer in text for text in (gold, after.rationale))
    some = made(60, mixture=Mixture(unanswerable=0, substituted=0.5))[0]
    own = sum(e.answer == f"in {1800 + int(re.search('[0-9]+', e.question).group())}" for e in some)
    assert 15 < own < 45


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("when was it built", "in March 1889", ("when", "date 3")),
        ("when was it opened", "4 May", ("when", "date 2")),
        ("when is it open", "in June", ("when", "date 2")),
        ("who was it", "June Carter", ("who", "name")),
        ("what year was it", "1889", ("what", "date 1")),
        ("how many are there", "about forty", ("how many", "number")),
        ("author of the book", "Ann of the North", ("", "name")),
        ("what is it made of", "riveted iron", None),
        ("is it made of iron", "Yes", None),
    ],
)
def test_kinds_of_answers(question, answer, kind):
    assert answer_kind(question, answer) == kind


@pytest.mark.parametrize(
    ("text", "answers", "question", "rationale"),
    [
        ("Ann Low wrote it.", ("Ann Low",), "who wrote Ann Low's book", "Ann Low wrote it."),  # the question names it
        ("Ann Low wrote it.", ("Ann Low",), "who wrote it", "She wrote it."),  # the rationale does not
        ("Ann Low (Mrs Low) wrote it.", ("Ann Low", "Mrs Low"), "who wrote it", "Ann Low wrote it."),  # it stays
        ("It is made of iron.", ("iron",), "what is it made of", "It is made of iron."),  # of no kind
        ("Bob May and Ann Low met.", ("Ann Low",), "who met Bob May", "Bob May and Ann Low met."),  # no other
    ],
)
def test_an_answer_stays_where_another_makes_no_sense(text, answers, question, rationale):
    record = Question("1", question, answers, (Passage(text),), (0,))
    other = Question("2", "who wrote that", ("Bob May",), (Passage("Bob May wrote that."),), (0,))
    substitutes = Substitutes([(record, answers[0]), (other, "Bob May")])
    assert substitutes.substitute(record, answers[0], rationale, np.random.default_rng(0)) is None
    plain = Question("3", "who wrote this", ("Cy Fox",), (Passage("Cy Fox wrote this.", title="Cy Fox"),), (0,))
    changed = substitutes.substitute(plain, "Cy Fox", "Cy Fox: Cy Fox wrote this.", np.random.default_rng(0))
    assert changed is not None and changed[1] in ("Ann Low", "Bob May")
    assert changed[0].passages[0] == Passage(f"{changed[1]} wrote this.", title=changed[1])
    assert changed[2] == f"{changed[1]}: {changed[1]} wrote this."


def test_yes_or_no_is_an_example_though_no_passage_says_it():
    """As "Yes" or "No", never substituted; passages with the word "no" are distractors like any other."""
    told = [
        Question(
            str(i),
            f"is tower {i} tall",
            ("yes",) if i % 2 else ("no",),
            (Passage(f"They stand. Tower {i} is {10 * i} metres high. It has no roof.", title=f"Tower {i}"),),
            (0,),
        )
        for i in range(24)
    ]
    both = [*told, *(dataclasses.replace(record, id=f"w{record.id}") for record in records())]
    examples = make_examples(both, HashEmbedder(), variants=3, mixture=Mixture(substituted=1, unanswerable=0.3))
    of_told = [e for part in examples for e in part if e.question.startswith("is ")]
    assert len(of_told) == 3 * 24 and {len(e.passages) for e in of_told if e.answerable} == {1, 2, 3, 4}
    for e in of_told:
        i = int(re.findall(r"\d+", e.question)[0])
        assert any(p == told[i].passages[0] for p in e.passages) == e.answerable
        if e.answerable:
            assert e.answer == ("Yes" if i % 2 else "No")
            assert e.rationale == f"Tower {i}: Tower {i} is {10 * i} metres high."
            said = ScriptedLM(lambda prompt, answer=e.answer: ("why", answer))
            assert evaluate_drafter(said, [e]).right == 1.0
    alone = make_examples(told, HashEmbedder(), mixture=Mixture(gold_alone=0))[0]
    assert all(len(e.passages) > 1 for e in alone)
    others = [e for part in examples for e in part if e.question.startswith("when") and e.answerable]
    assert others and all(re.fullmatch(r"in 18\d\d", e.answer) for e in others)
    written = make_examples(told, HashEmbedder(), rationales={"3": "It is 30 metres\nhigh."})[0][3]
    assert not written.answerable or (written.rationale, written.answer) == ("It is 30 metres high.", "Yes")


def test_a_part_of_a_multi_hop_question_does_not_answer_it():
    hops = [
        Question(
            str(i),
            f"who {i}",
            ("Ann",),
            (Passage(f"Ann wrote book {i}."), Passage(f"Book {i} won."), Passage(f"Other {i}.")),
            (0, 1),
        )
        for i in range(40)
    ]
    for e in make_examples(hops, HashEmbedder(), mixture=Mixture(unanswerable=0.5, gold_alone=0, wide=0))[0]:
        i = e.question.split()[1]
        gold = {p.text for p in e.passages} & {f"Ann wrote book {i}.", f"Book {i} won."}
        assert len(gold) == 2 if e.answerable else len(gold) < 2


def test_useless_records_are_refused():
    with pytest.raises(InvalidInputError, match="the answer must be yes or no"):
        make_examples([Question("1", "is it", ("yes", "no"), (Passage("it"),), (0,))], HashEmbedder())
    with pytest.raises(InvalidInputError, match="none of the 1 records can be used"):
        make_examples([Question("1", "q", ("x",), (Passage("no"),), (0,))], HashEmbedder())
    with pytest.raises(InvalidInputError, match="need at least 3"):
        made(2)
    with pytest.raises(InvalidInputError, match="sum to at most 1"):
        Mixture(unanswerable=0.9, wide=0.2)
    with pytest.raises(InvalidInputError, match="substituted must lie in"):
        Mixture(substituted=1.5)


def test_an_example_has_exactly_the_tokens_of_a_draft(smollm2):
    """What the model would generate token by token from the same prompt, if it wrote the example's draft."""
    example = made()[0][1]
    drafter = Drafter(smollm2)
    end = smollm2.tokenizer.eos_token_id
    encoded = encode_example(example, drafter, smollm2.encoder, end)
    prompt = smollm2.encoder.encode_generation(drafter.request(example.question, example.passages))
    assert encoded.ids[: len(prompt)] == prompt and set(encoded.labels[: len(prompt)]) == {IGNORED}
    decode = smollm2.tokenizer.decode
    assert decode(encoded.ids[len(prompt) :]) == f" {example.rationale}\nAnswer: {example.answer}{decode([end])}"
    counted = [token for token in encoded.labels if token != IGNORED]
    assert decode(counted) == f" {example.rationale}\n {example.answer}{decode([end])}"
    assert encoded.completion == len(encoded.ids) - len(prompt)


def test_batches_hold_like_lengths_and_every_example_once(smollm2):
    drafter = Drafter(smollm2)
    encoded = [[encode_example(e, drafter, smollm2.encoder, 0) for e in part] for part in made(24, variants=2)]
    ordered = in_batches(encoded, 4, seed=1)
    assert sorted(map(str, ordered)) == sorted(str(e) for part in encoded for e in part)
    spread = [
        max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in (ordered[i : i + 4] for i in range(0, 48, 4))
    ]
    whole = max(len(e.ids) for e in ordered) - min(len(e.ids) for e in ordered)
    assert sorted(spread)[len(spread) // 2] < whole / 2
    assert in_batches(encoded, 4, seed=1) == ordered != in_batches(encoded, 4, seed=2)
