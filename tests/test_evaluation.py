import json

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.data import Question, load_questions, with_distractors
from specrag.evaluation.metrics import contains_answer, exact_match, f1, wilson_interval
from specrag.schema import Passage
from tests.fakes import HashEmbedder


def test_containment_takes_whole_words_only():
    assert contains_answer("It was The Beatles, of course.", ["beatles"])
    assert not contains_answer("in 19815", ["1981"])
    assert not contains_answer("anything", [""])


def test_exact_match_and_f1():
    assert exact_match("The Beatles!", ["beatles"]) and not exact_match("Beatles band", ["beatles"])
    assert f1("the big red dog", ["red dog"]) == pytest.approx(2 * 2 / 5)
    assert f1("cat", ["dog"]) == 0


def test_the_wilson_interval_against_known_values():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_questions_with_their_gold_passage_among_distractors(questions):
    own = [type(q)(q.id, q.question, q.answers, (q.passages[q.gold[0]],), (0,)) for q in questions if q.gold]
    corpus = [p for q in questions for p in q.passages]
    for q in with_distractors(own, corpus, HashEmbedder(), count=6):
        assert len(q.passages) == 6 and contains_answer(q.passages[q.gold[0]].text, q.answers)
        others = [p for i, p in enumerate(q.passages) if i not in q.gold]
        assert not any(a.casefold() in p.text.casefold() for p in others for a in q.answers)


def test_a_passage_with_the_word_no_is_a_distractor_of_a_question_with_the_answer_no():
    corpus = [Passage(f"Nobody knows hall {i}: there is no note.") for i in range(4)]
    asked = [Question("1", "is it open?", ("no",), (Passage("The hall is closed."),), (0,))]
    (made,) = with_distractors(asked, corpus, HashEmbedder(), count=4)
    assert len(made.passages) == 4


def test_a_line_that_is_no_question_is_named(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "q", "answers": ["a"], "text": "t"}) + "\n\n{broken\n")
    with pytest.raises(InvalidInputError, match="line 3"):
        load_questions(file)


def test_supporting_titles_mark_the_gold_passages(tmp_path):
    file = tmp_path / "q.jsonl"
    passages = [{"title": t, "text": t} for t in "abc"]
    file.write_text(
        json.dumps({"question": "q", "answers": ["a"], "passages": passages, "supporting_titles": ["a", "c"]})
    )
    question = load_questions(file)[0]
    assert question.gold == (0, 2) and question.passages[1] == Passage("b", title="b")
