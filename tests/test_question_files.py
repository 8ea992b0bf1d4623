"""Files of questions: specrag's own format, what a file may be, what is refused, and the record itself."""

import gzip
import json
from pathlib import Path

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.data import load_questions, save_questions
from specrag.evaluation.formats import load
from specrag.evaluation.records import Question, Turn, require
from specrag.schema import Passage

SAMPLES = Path(__file__).parent / "data" / "formats"


def written(folder, rows):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# --- specrag's own format --------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path):
    passages = (Passage("t", title="T", id="p1", score=0.5, metadata={"page": 3}), Passage("é"))
    questions = [
        Question("1", "q", ("a",), passages, gold=(1,), weight=0.0, source="set", metadata={"level": "hard"}),
        Question("2", "which", ("y",), choices=("x", "y"), correct=(1,), context="long"),
        Question("3", "none", (), passages, unanswerable=True),
        Question("4", "and then?", (), turns=(Turn("hi", "hello", ("hello",)), Turn("and then?"))),
    ]
    save_questions(questions, tmp_path / "q.jsonl")
    loaded = load(tmp_path / "q.jsonl", "specrag")
    assert loaded == questions
    assert [q.metadata for q in loaded] == [q.metadata for q in questions]
    assert loaded[0].passages[0].metadata == {"page": 3}


def test_own_rows_may_come_without_passages_or_answers(tmp_path):
    file = written(tmp_path, [{"question": "q", "answers": ["a"]}, {"question": "r", "answers": []}])
    first, second = load(file)
    assert first.passages == () and not first.unanswerable and second.unanswerable
    with pytest.raises(InvalidInputError, match="2 of 2 questions lack passages"):
        load_questions(file)


def test_a_document_is_a_file_beside_the_data(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "race.html").write_text("<p>Ada won.</p><p>Eve lost.</p>")
    row = {"question": "q", "answers": ["a"], "document": "texts/race.html"}
    (question,) = load(written(tmp_path, [row]))
    assert "Ada won." in question.context and "<p>" not in question.context
    assert "document" not in question.metadata
    (tmp_path / "texts" / "race.html").write_text("<p>Eve won the second race.</p>")
    assert "second race" in load(tmp_path / "data.jsonl")[0].context


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"document": "nowhere.txt"},
            "line 1: expected 'document' to be the path of a file that can .*nowhere",
        ),
        ({"document": "empty.txt"}, "line 1: expected .*holds none"),
        ({"document": "image.png"}, "line 1: expected 'document' to be the path of a file that can be read"),
        ({"document": "full.txt", "context": "text"}, "not both"),
        ({"document": 3}, "'document' to be a text, got 3"),
    ],
)
def test_a_document_that_cannot_be_read_is_named_with_its_line(tmp_path, changes, message):
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "full.txt").write_text("text")
    with pytest.raises(InvalidInputError, match=message):
        load(written(tmp_path, [{"question": "q", "answers": ["a"]} | changes]))


def test_gold_passages_may_be_marked_in_place(tmp_path):
    passages = [{"text": "a", "gold": False}, {"text": "b", "gold": True, "rank": 3}, {"text": "c"}]
    row = {"question": "q", "answers": ["a"], "passages": passages}
    (question,) = load(written(tmp_path, [row]))
    assert question.gold == (1,)
    assert [dict(passage.metadata) for passage in question.passages] == [{}, {"rank": 3}, {}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gold": [0]}, "gold passages to be named once"),
        ({"supporting_titles": ["T"]}, "gold passages to be named once"),
        (
            {"passages": [{"text": "a", "gold": "yes"}]},
            r"passages\[0\]: expected 'gold' to be true or false",
        ),
        ({"passages": [{"text": "a"}], "gold": [True]}, "'gold' to be a list of positions"),
        ({"passages": [{"text": "a"}], "gold": True}, "'gold' to be a list of positions"),
        ({"choices": ["a"], "correct": [False]}, "'correct' to be a list of positions"),
        ({"unanswerable": "false"}, "'unanswerable' to be true or false"),
    ],
)
def test_marks_that_mean_nothing_are_refused(tmp_path, changes, message):
    row = {"question": "q", "answers": ["a"], "passages": [{"text": "a", "title": "T", "gold": True}]}
    with pytest.raises(InvalidInputError, match=message):
        load(written(tmp_path, [row | changes]))


def test_a_choice_is_marked_by_position_or_by_the_answer(tmp_path):
    row = {"question": "q", "answers": ["y"], "choices": ["x", "y"]}
    assert load(written(tmp_path, [row]))[0].correct == load(written(tmp_path, [row | {"correct": [1]}]))[0].correct
    with pytest.raises(InvalidInputError, match="line 1: expected 'correct'"):
        load(written(tmp_path, [row | {"answers": ["z"]}]))
    with pytest.raises(InvalidInputError, match="positions among the 2 choices, got \\[2\\]"):
        load(written(tmp_path, [row | {"correct": [2]}]))


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squad_v2.0.json", "nq_open.jsonl", "pubhealth.tsv", "hotpotqa.json"])
def test_gzip_files_are_read_by_their_content(tmp_path, name):
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress((SAMPLES / name).read_bytes()))
    assert load(packed) == load(SAMPLES / name)


def test_a_limit_reads_no_further(tmp_path):
    file = written(tmp_path, [{"question": "q", "answer": ["a"]}] * 3)
    file.write_text(file.read_text() + "{broken\n")
    assert [q.id for q in load(file, limit=2)] == ["1", "2"]
    with pytest.raises(InvalidInputError, match="limit must be at least 1"):
        load(file, limit=0)


def test_repeated_ids_are_made_distinct(tmp_path):
    file = written(tmp_path, [{"id": "x", "question": q, "answers": ["a"]} for q in "abc"])
    assert [q.id for q in load(file)] == ["x", "x#2", "x#3"]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a\u2028b", "answers": ["c"]}\n', encoding="utf-8")
    assert load(file)[0].question == "a\u2028b"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "Frage über", "answers": ["ä"]}\n' * 2, encoding=encoding)
    assert [q.answers for q in load(file)] == [("ä",), ("ä",)]


def test_a_byte_order_mark_is_ignored(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "q", "answers": ["c"]}\n', encoding="utf-8-sig")
    assert load(file)[0].answers == ("c",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"holds no questions"),
        ("[]", r"holds no questions"),
        ('{"data": []}', r"holds no questions"),
        ("hello\n", r"line 1: expected JSON, JSON lines or tab-separated text, got \"hello\""),
        ('{"question": "q", "answers": ["a"]}\n{broken\n', r"line 2: not valid JSON"),
        ('{"question": "q", \n', r"line 1: not valid JSON"),
        ("[" * 100_000, r"not valid JSON"),
        ('{"question": ' + "[" * 100_000 + "\n", r"line 1: not valid JSON"),
        ("[1, 2]", r"entry 1: expected an object, got 1"),
        (
            '{"text": "a passage"}\n',
            r"line 1: no known format has such rows. The row has the fields text; known formats",
        ),
        ("claim_id\tclaim\tmain_text\tlabel\n1\tc\tm\n", r"line 2: expected 4 columns, got 3"),
        ("claim_id\tclaim\tmain_text\tlabel\n1\tc\tm\tmaybe\n", r"line 2: expected 'label' to be one of true, false"),
        ('{"question": "q", "answer": []}\n', r"line 1: expected at least one answer under 'answer', got \[\]"),
        ('{"question": "q", "answer": [" "]}\n', r"line 1: expected at least one answer"),
        ('{"question": "q", "answers": [1]}\n', r"line 1: expected 'answers' to be a list of texts, got \[1\]"),
        ('{"question": " ", "answers": ["a"]}\n', r"line 1: question '1': the question is empty"),
        ('{"question": "q", "answers": ["a"], "text": "t", "gold": [1]}\n', r"line 1: expected 'gold' to be a list of"),
        ('{"question": "q", "answers": ["a"], "weight": "much"}\n', r"line 1: expected 'weight' to be a number"),
        (
            '{"_id": "1", "question": "q", "answer": "a", "context": [["t"]], "supporting_facts": []}',
            r"\[title, \[sent",
        ),
        (
            '{"_id": "1", "question": "q", "context": [["t", ["s"]]], "supporting_facts": []}\n',
            r"'answer' to be a list",
        ),
        ('{"QuestionId": "1", "Question": "q", "Answer": null}\n', r"line 1: expected 'Answer' to be an object"),
        ('{"history": []}\n', r"line 1: expected 'history' to hold at least one turn"),
        (
            '{"input": "q", "context": "c", "answer": "E", "options": ["x", "y"]}\n',
            r"one of the 2 choices or its letter",
        ),
        ('{"question": "q", "possible_answers": "a, b"}\n', r"'possible_answers' to be a JSON list in a text"),
        ('{"question": "q", "passage": "p", "answer": "yes"}\n', r"'answer' to be true or false"),
        ('{"question": "q", "answers": ["a"], "ctxs": [{"text": "t", "isgold": false}]}\n', r"'isgold': true"),
    ],
)
def test_a_broken_file_is_refused_with_the_place_and_what_was_expected(tmp_path, content, message):
    file = tmp_path / "broken.txt"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=message) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))


def test_another_format_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match=r"entry 1: expected hotpotqa: rows with '_id'.*it looks like squad"):
        load(SAMPLES / "squad_v1.1.json", "hotpotqa")
    mixed = written(tmp_path, [{"question": "q", "answer": ["a"]}, {"question": "q", "answers": ["a"]}])
    with pytest.raises(InvalidInputError, match=r"line 2: expected nq-open: .*it looks like specrag"):
        load(mixed)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidInputError, match="there is no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b'{"question": "q"}' * 1000)[:40])
    with pytest.raises(InvalidInputError, match="gzip file is damaged"):
        load(tmp_path / "torn.gz")
    (tmp_path / "latin").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(InvalidInputError, match="expected UTF-8"):
        load(tmp_path / "latin")


# --- the record ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "  "}, "the question is empty"),
        ({"question": None}, "question must be a text, got None"),
        ({"answers": "a"}, "answers must be a tuple of texts, got 'a'"),
        ({"gold": (1,)}, r"gold is \(1,\), but there are 1 passages"),
        ({"choices": ("x",), "correct": (-1,)}, r"correct is \(-1,\), but there are 1 choices"),
        ({"unanswerable": True}, "is unanswerable and has answers"),
    ],
)
def test_a_question_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(InvalidInputError, match=message):
        Question(**{"id": "1", "question": "q", "answers": ("a",), "passages": (Passage("p"),), **fields})


def test_what_an_evaluation_needs_is_checked_before_it_starts():
    plain = Question("7", "q", ())
    with pytest.raises(InvalidInputError, match="data set is empty"):
        require([])
    for need in ("answers", "passages", "choices", "context", "turns"):
        with pytest.raises(InvalidInputError, match=f"1 of 1 questions lack .*{need[:5]}.*the first is '7'"):
            require([plain], **{need: True})
    require([Question("8", "q", (), unanswerable=True)], answers=True)
