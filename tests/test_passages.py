"""What a caller may hand over as a passage."""

from types import SimpleNamespace

import numpy as np
import pytest
from langchain_core.documents import Document

from specrag import Passage
from specrag.errors import InvalidInputError
from specrag.schema import passages_of
from specrag.speculative.perspectives import select_perspectives


def test_a_passage_stays_as_it_is_and_a_string_is_its_text():
    passage = Passage("text", title="T")
    assert Passage.of(passage) is passage
    assert Passage.of("text") == Passage("text")


def test_a_mapping_gives_its_fields():
    made = Passage.of(
        {"text": "x", "title": "T", "id": 7, "score": np.float32(0.5), "embedding": [1, 0], "metadata": {"page": 3}}
    )
    assert (made.text, made.title, made.id, made.score, made.metadata) == ("x", "T", "7", 0.5, {"page": 3})
    assert made.embedding.tolist() == [1.0, 0.0]
    assert Passage.of({"text": "x"}) == Passage("x")


@pytest.mark.parametrize("form", [lambda document: document, lambda document: document.model_dump()])
def test_a_langchain_document_gives_text_id_and_what_its_metadata_hold(form):
    metadata = {"title": "T", "relevance_score": 0.25, "embedding": [0.0, 1.0], "page": 3}
    made = Passage.of(form(Document("x", id="d1", metadata=metadata)))
    assert (made.text, made.title, made.id, made.score) == ("x", "T", "d1", 0.25)
    assert made.embedding.tolist() == [0.0, 1.0] and made.metadata == metadata
    bare = Passage.of(form(Document("x", metadata={"score": "high", "embedding": "minilm"})))
    assert (bare.title, bare.id, bare.score, bare.embedding) == (None, None, None, None)


def test_any_object_with_page_content_and_metadata_serves():
    assert Passage.of(SimpleNamespace(page_content="x", metadata=None)) == Passage("x")


def test_a_mappings_own_fields_come_before_its_metadata():
    made = Passage.of({"text": "x", "title": "own", "score": 1, "metadata": {"title": "other", "score": 2}})
    assert (made.title, made.score) == ("own", 1.0)


NAN = float("nan")


@pytest.mark.parametrize("nothing", [None, NAN, np.float32("nan"), type("NAType", (), {})(), ""])
def test_what_a_table_writes_for_nothing_is_missing(nothing):
    made = Passage.of({"text": "x", "title": nothing, "id": nothing, "metadata": {"title": nothing}})
    assert (made.title, made.id) == (None, None)
    if nothing != "":
        made = Passage.of({"text": "x", "score": nothing, "embedding": nothing, "metadata": nothing})
        assert (made.score, made.embedding, made.metadata) == (None, None, {})
    assert Passage("x", title=nothing) == Passage("x")


@pytest.mark.parametrize(
    "metadata",
    [
        {"title": np.array(["a", "b"]), "score": np.array([1.0, 2.0]), "embedding": "all-MiniLM-L6-v2"},
        {"title": ["a"], "score": "high", "embedding": ["a", "b"]},
        {"title": NAN, "score": NAN, "embedding": [1.0, NAN]},
        {"title": {"en": "a"}, "score": True, "embedding": np.eye(2)},
        {"title": None, "score": None, "embedding": []},
        {"title": 7, "score": object(), "embedding": {"model": "x"}},
        {"embedding": 0.5},
    ],
    ids=["arrays", "lists", "nan", "others", "empty", "objects", "number"],
)
def test_metadata_that_merely_have_our_names_stay_metadata(metadata):
    for form in (Document("x", metadata=metadata), {"text": "x", "metadata": metadata}):
        made = Passage.of(form)
        assert (made.title, made.score, made.embedding) == (None, None, None)
        assert made.metadata is metadata or set(made.metadata) == set(metadata)


def test_the_first_similarity_that_is_a_number_counts():
    assert (
        Passage.of({"text": "x", "metadata": {"score": NAN, "similarity": "0.9", "relevance_score": 0.5}}).score == 0.5
    )


def test_titles_and_ids_that_are_numbers_become_texts():
    made = Passage.of({"text": "x", "title": 1984, "id": np.int64(7)})
    assert (made.title, made.id) == ("1984", "7")


def test_passages_may_come_from_a_generator_and_its_faults_are_named():
    assert passages_of(str(i) for i in range(2)) == [Passage("0"), Passage("1")]
    with pytest.raises(InvalidInputError, match=r"passages\[1\]: .*must be a string, got None"):
        passages_of({"text": text} for text in ("a", None))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "got an int"),
        (None, "got None"),
        (b"bytes", "got bytes"),
        ({}, "no 'text' in a mapping with no keys"),
        ({"text": "x", "titel": "T"}, "unknown key titel: a passage has text, .*title"),
        ({"text": 3}, "must be a string, got int"),
        ({"text": "x", "score": "high"}, "score must be a number, got a str"),
        ({"text": "x", "metadata": "page 3"}, "metadata must be a mapping, got a str"),
        ({"text": "x", "embedding": "vector"}, "must be a vector of numbers"),
        ({"text": "x", "title": np.array(["a", "b"])}, "title must be a text, got a ndarray"),
        ({"text": "x", "id": ["a"]}, "id must be a text, got a list"),
        ({"text": "x", "score": True}, "score must be a number, got a bool"),
        ({"text": "x", "metadata": np.zeros(2)}, "metadata must be a mapping, got a ndarray"),
        ({"text": "x", "embedding": [[1.0], [2.0]]}, r"one dimension, got shape \(2, 1\)"),
    ],
)
def test_what_cannot_be_a_passage_is_refused_with_its_position(value, message):
    with pytest.raises(InvalidInputError, match=message):
        Passage.of(value)
    with pytest.raises(InvalidInputError, match=rf"passages\[2\]: .*{message}"):
        passages_of(["a", "b", value])


@pytest.mark.parametrize("values", ["text", b"text", {"text": "x"}, Passage("x"), 3, None])
def test_a_list_is_asked_for(values):
    with pytest.raises(InvalidInputError, match="passages must be a list of passages, got "):
        passages_of(values)


def test_perspectives_are_selected_among_anything_that_is_a_passage():
    passages = [
        {"text": "a", "embedding": [1.0, 0.0]},
        {"text": "", "embedding": [0.0, 1.0]},
        Document("b", metadata={"embedding": [1.0, 0.1]}),
        Passage("c", embedding=np.array([0.0, 1.0])),
    ]
    assert select_perspectives("q", passages, 2) == (0, 3)
    assert select_perspectives("q", ["a", "a", "b"], 2) == (0, 2)
    with pytest.raises(InvalidInputError, match=r"passages\[1\]"):
        select_perspectives("q", ["a", 1], 1)
    with pytest.raises(InvalidInputError, match="number of perspectives must be at least 1"):
        select_perspectives("q", ["a"], 0)
