"""Readers of published formats, on genuine excerpts. A test without one says so.

tests/data/formats/README.md lists them.
"""

import json
from pathlib import Path

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.formats import FORMATS, formats, load
from specrag.evaluation.formats.rows import read_rows
from specrag.evaluation.records import require
from specrag.schema import Passage

SAMPLES = Path(__file__).parent / "data" / "formats"
FORMAT_OF = {
    "2wikimultihopqa.json": "2wikimultihopqa",
    "arc_challenge.jsonl": "arc-challenge",
    "arc_challenge_selfrag.jsonl": "arc-challenge",
    "boolq.jsonl": "boolq",
    "clapnq.jsonl": "clapnq",
    "hotpotqa.json": "hotpotqa",
    "hotpotqa_specrag.jsonl": "specrag",
    "lost_in_the_middle.jsonl": "lost-in-the-middle",
    "mt_bench_101.jsonl": "mt-bench-101",
    "musique.jsonl": "musique",
    "nq_open.jsonl": "nq-open",
    "nq_open_specrag.jsonl": "specrag",
    "popqa_flashrag.jsonl": "flashrag",
    "popqa_paragraphs.json": "popqa",
    "popqa_selfrag.jsonl": "self-rag",
    "popqa_selfrag_no_ctxs.jsonl": "self-rag",
    "pubhealth.tsv": "pubhealth",
    "pubhealth_test.tsv": "pubhealth",
    "squad_v1.1.json": "squad",
    "squad_v2.0.json": "squad",
    "triviaqa.json": "triviaqa",
    "triviaqa_selfrag_no_ctxs.jsonl": "self-rag",
}


def written(folder, rows):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_every_sample_has_its_place_in_the_table():
    assert {file.name for file in SAMPLES.iterdir()} == {*FORMAT_OF, "README.md"}


@pytest.mark.parametrize("name", FORMAT_OF)
def test_a_sample_is_recognised_by_its_own_format_alone(name):
    """specrag's own format, which comes last, is the most general: it may recognise rows of others."""
    for row in read_rows(SAMPLES / name):
        matching = [known for known in FORMATS if FORMATS[known].recognises(row.values)]
        assert [known for known in matching if known != "specrag"] in ([FORMAT_OF[name]], [])
        assert matching[0] == FORMAT_OF[name]


@pytest.mark.parametrize("name", FORMAT_OF)
def test_auto_reads_what_the_named_format_reads(name):
    questions = load(SAMPLES / name)
    assert questions == load(SAMPLES / name, FORMAT_OF[name])
    assert len({q.id for q in questions}) == len(questions)
    require(questions, answers=FORMAT_OF[name] != "mt-bench-101")


def test_formats_lists_the_names_and_an_unknown_one_is_refused():
    assert set(FORMAT_OF.values()) < set(formats())
    with pytest.raises(InvalidInputError, match=r"unknown format 'squad2'; known are: auto, .*squad"):
        load(SAMPLES / "squad_v2.0.json", "squad2")


# --- each format -----------------------------------------------------------------------------------


def test_hotpotqa_joins_the_sentences_and_marks_the_supporting_passages():
    question = load(SAMPLES / "hotpotqa.json")[0]
    assert question.id == "5a77ec115542992a6e59dff7"
    assert question.question == "If Gallu is a demon Lilu is what?" and question.answers == ("a spirit",)
    assert len(question.passages) == 10
    assert {question.passages[at].title for at in question.gold} == {"Alû", "Lilu (mythology)"}
    assert "  " not in question.passages[question.gold[0]].text
    assert question.metadata["type"] == "bridge" and question.metadata["level"] == "easy"


def test_hotpotqa_in_the_hugging_face_form_reads_the_same(tmp_path):
    row = json.loads((SAMPLES / "hotpotqa.json").read_text(encoding="utf-8"))[0]
    columns = {
        **row,
        "context": {"title": [title for title, _ in row["context"]], "sentences": [s for _, s in row["context"]]},
        "supporting_facts": {"title": [title for title, _ in row["supporting_facts"]]},
    }
    assert load(written(tmp_path, [columns])) == load(SAMPLES / "hotpotqa.json", limit=1)


def test_hotpotqa_in_specrags_own_form():
    (question,) = load(SAMPLES / "hotpotqa_specrag.jsonl")
    assert question.answers == ("Papa Gino's",) and len(question.passages) == 10
    assert {question.passages[at].title for at in question.gold} == {"Papa Gino's", "Pizza Inn"}
    assert question.metadata == {"type": "comparison", "level": "hard"}


def test_2wikimultihopqa():
    question = load(SAMPLES / "2wikimultihopqa.json")[0]
    assert question.question == "Which film whose director is younger, Forbidden Ground or Free Guy?"
    assert question.answers == ("Free Guy",) and question.source == "2wikimultihopqa"
    supporting = {title for title, _ in question.metadata["supporting_facts"]}
    assert {question.passages[at].title for at in question.gold} == supporting and len(supporting) == 4


def test_musique_takes_aliases_and_supporting_paragraphs():
    for question, row in zip(load(SAMPLES / "musique.jsonl"), read_rows(SAMPLES / "musique.jsonl"), strict=True):
        assert question.answers == (row.values["answer"], *row.values["answer_aliases"])
        assert len(question.passages) == 20
        assert [question.passages[at].text for at in question.gold] == [
            p["paragraph_text"] for p in row.values["paragraphs"] if p["is_supporting"]
        ]
    assert load(SAMPLES / "musique.jsonl")[0].answers[1:] == ("Alex Chiang",)


def test_musique_full_has_unanswerable_questions(tmp_path):
    row = json.loads((SAMPLES / "musique.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (question,) = load(written(tmp_path, [row | {"answerable": False}]))
    assert question.unanswerable and question.answers == () and question.metadata["answer"] == row["answer"]


def test_popqa_as_self_rag_distributes_it():
    (question,) = load(SAMPLES / "popqa_selfrag.jsonl")
    assert question.question == "What is Henry Feilden's occupation?" and "politician" in question.answers
    first, _, third, last = question.passages
    assert (first.id, first.score) == ("11341299", 1.6985543) and first.text.startswith("Henry Master")
    assert (third.id, third.score) == (None, None), "some retrieved passages have neither id nor score"
    assert last.text == "", "and some have no text"
    assert question.gold == () and question.metadata["pop"] == 58


def test_self_rag_rows_without_passages():
    popqa, trivia = (load(SAMPLES / f"{name}_selfrag_no_ctxs.jsonl")[0] for name in ("popqa", "triviaqa"))
    assert popqa.passages == trivia.passages == ()
    assert trivia.id == "qw_2021" and "Yuri Gagarin" in trivia.answers


@pytest.mark.parametrize(
    ("given", "answer"),
    [({"answers": ["true"]}, "true"), ({"label": "SUPPORTS"}, "true"), ({"label": "false"}, "false")],
)
def test_pubhealth_as_self_rag_distributes_it(tmp_path, given, answer):
    """Written to the schema that Self-RAG's code reads: no genuine row was at hand."""
    row = {"claim": "Vaccines save lives.", "label": "SUPPORTS", "ctxs": [{"title": "T", "text": "x"}], **given}
    (question,) = load(written(tmp_path, [row]))
    assert question.question == "Vaccines save lives." and question.answers == (answer,)
    assert question.choices == ("true", "false") and question.choices[question.correct[0]] == answer
    assert question.passages == (Passage("x", title="T"),)


@pytest.mark.parametrize("name", ["pubhealth.tsv", "pubhealth_test.tsv"])
def test_pubhealth_reads_tab_separated_columns_with_and_without_an_index(name):
    (question,) = load(SAMPLES / name)
    assert question.choices == ("true", "false", "unproven", "mixture") and question.answers == ("true",)
    assert question.id in ("3632", "2542") and question.passages[0].text and question.gold == (0,)
    assert question.metadata["subjects"]


def test_popqa_reads_json_inside_its_columns(tmp_path):
    question = load(SAMPLES / "popqa_paragraphs.json")[0]
    assert question.answers == ("politician", "political leader", "political figure", "polit.", "pol")
    assert question.passages[question.gold[0]].title == "George Rankin"
    table = tmp_path / "test.tsv"
    table.write_text('id\tquestion\tpossible_answers\n7\tWho?\t"[""Ann"", ""A. Lee""]"\n')
    assert load(table)[0].answers == ("Ann", "A. Lee")


def test_flashrag_keeps_its_metadata():
    question = load(SAMPLES / "popqa_flashrag.jsonl")[0]
    assert question.id == "test_10207" and question.answers == ("Ralph Rainger", "Ralph Reichenthal")
    assert question.metadata["prop"] == "composer"


def test_nq_open_has_questions_alone():
    questions = load(SAMPLES / "nq_open.jsonl")
    assert [q.id for q in questions] == ["1", "2", "3", "4", "5"]
    assert questions[2].answers == ("Salzburg, Austria", "Austria") and questions[2].passages == ()
    with pytest.raises(InvalidInputError, match="5 of 5 questions lack passages .retrieve some"):
        require(questions, passages=True)


def test_lost_in_the_middle_marks_its_gold_passage():
    """Written to the schema in the authors' README; the texts of the two passages are genuine."""
    (question,) = load(SAMPLES / "lost_in_the_middle.jsonl")
    assert question.gold == (1,) and question.answers == ("Wilhelm Conrad Röntgen",)
    assert question.passages[0].metadata["original_retrieval_index"] == 0 and question.passages[0].score == 1.6234328


def test_triviaqa_finds_its_evidence_beside_the_questions(tmp_path):
    """The texts of the evidence are made up: the release's own are not free to copy."""
    sample = (SAMPLES / "triviaqa.json").read_text(encoding="utf-8")
    (without,) = load(SAMPLES / "triviaqa.json")
    assert without.id == "tc_33" and without.answers[0] == "Sunset Boulevard" and "Sunset Blvd" in without.answers
    assert [p.metadata["kind"] for p in without.passages] == ["web"], "a search result has a description"
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "web-dev.json").write_text(sample, encoding="utf-8")
    page = tmp_path / "evidence" / "wikipedia" / "Andrew_Lloyd_Webber.txt"
    page.parent.mkdir(parents=True)
    page.write_text("Sunset Boulevard opened in Los Angeles.")
    (question,) = load(tmp_path / "qa" / "web-dev.json")
    assert question.passages[0] == Passage(
        "Sunset Boulevard opened in Los Angeles.", title="Andrew Lloyd Webber", id="Andrew_Lloyd_Webber.txt"
    )
    assert [p.metadata["kind"] for p in question.passages] == ["wikipedia", "web"]


def test_squad_makes_a_question_of_each_of_an_articles_questions():
    questions = load(SAMPLES / "squad_v1.1.json")
    assert len(questions) == 20
    first = questions[0]
    assert first.question == "Who is the creator of American Idol?" and first.answers == ("Simon Fuller",)
    assert first.passages[0].title == "American Idol" and first.gold == (0,)
    assert load(SAMPLES / "squad_v2.0.json")[1].answers == ("10th and 11th centuries", "in the 10th and 11th centuries")


def test_squad_v2_has_unanswerable_questions(tmp_path):
    article = {"title": "T", "paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q", "answers": []}]}]}
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": [article]}))
    with pytest.raises(InvalidInputError, match=r"entry 1, paragraphs\[0\], qas\[0\]: expected 'answers' with a text"):
        load(file)
    article["paragraphs"][0]["qas"][0]["is_impossible"] = True
    file.write_text(json.dumps({"data": [article]}, indent=1))
    (question,) = load(file)
    assert question.unanswerable and question.answers == question.gold == ()


def test_clapnq_has_answers_of_a_few_sentences_or_none(tmp_path):
    question = load(SAMPLES / "clapnq.jsonl")[0]
    assert question.answers and question.gold == (0,) and not question.unanswerable
    row = {"id": "1", "input": "q", "passages": [{"title": "t", "text": "x"}], "output": [{"answer": ""}]}
    (none,) = load(written(tmp_path, [row]))
    assert none.unanswerable and none.gold == ()


def test_boolq_is_a_choice_between_yes_and_no():
    (question,) = load(SAMPLES / "boolq.jsonl")
    assert question.answers == ("no",) and question.choices == ("yes", "no") and question.correct == (1,)
    assert question.passages[0].title == "Ethanol fuel"


def test_arc_challenge_in_the_authors_and_in_self_rags_form():
    ours = load(SAMPLES / "arc_challenge.jsonl")[0]
    theirs = load(SAMPLES / "arc_challenge_selfrag.jsonl")[0]
    assert (ours.id, ours.question, ours.choices, ours.correct) == (
        *(theirs.id, theirs.question, theirs.choices, theirs.correct),
    )
    assert ours.answers == ("Planetary days will become shorter.",) and ours.labels == ("A", "B", "C", "D")
    assert ours.passages == () and theirs.passages[0].title == "Rotation"


def test_arc_challenge_with_numbered_labels(tmp_path):
    row = {"id": "1", "question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert load(written(tmp_path, [row]))[0].correct == (1,)
    with pytest.raises(InvalidInputError, match=r"line 1: expected 'answerKey' to be one of the labels"):
        load(written(tmp_path, [row | {"answerKey": "3"}]))


@pytest.mark.parametrize("answer", ["green", ["green"], ["green", "B"], "B"])
def test_infinitebench_multiple_choice(tmp_path, answer):
    """Written to the schema that the authors' code reads: no genuine row was at hand."""
    row = {
        "id": 3,
        "context": "A book.",
        "input": "Which?",
        "answer": answer,
        "options": ["red", "green", "blue", "grey"],
    }
    (question,) = load(written(tmp_path, [row]))
    assert question.correct == (1,) and question.answers == ("green",) and question.context == "A book."
    assert question.metadata["task"] == "En.MC"


def test_infinitebench_question_answering_and_summaries(tmp_path):
    """Written to the schema that the authors' code reads: no genuine row was at hand."""
    rows = [
        {"id": 0, "context": "A book.", "input": "Who?", "answer": ["Ann", "Ann Lee"], "options": []},
        {"id": 1, "context": "A book.", "input": "", "answer": ["Ann meets Bob."], "options": []},
    ]
    asked, summary = load(written(tmp_path, rows))
    assert asked.answers == ("Ann", "Ann Lee") and asked.metadata["task"] == "En.QA"
    assert summary.question == "Summarize the document." and summary.metadata["task"] == "En.Sum"


def test_longbench_v2(tmp_path):
    """Written to the schema in the authors' README: no genuine row was at hand."""
    row = {
        "_id": "66f",
        "domain": "Single-Document QA",
        "sub_domain": "Academic",
        "difficulty": "hard",
        "length": "short",
    }
    row |= {"question": "Which?", "answer": "C", "context": "Long.", **{f"choice_{x}": f"text {x}" for x in "ABCD"}}
    file = tmp_path / "data.json"
    file.write_text(json.dumps([row], indent=2))
    (question,) = load(file)
    assert question.correct == (2,) and question.answers == ("text C",) and question.context == "Long."
    assert question.metadata["difficulty"] == "hard" and question.source == "longbench-v2"


def test_mt_bench_101_is_read_as_dialogues():
    question = load(SAMPLES / "mt_bench_101.jsonl")[0]
    assert len(question.turns) == 3 and question.turns[-1].question == question.question
    assert question.turns[0].reply == "Based on the given information, A is the tallest among the three people."
    assert question.metadata == {"task": "GR"} and not question.unanswerable
    require([question], turns=True)
