"""Half an emoji (a lone surrogate) in what comes from outside is mended where it comes in."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from specrag import Passage, SpeculativeRAG
from specrag._unicode import well_formed, well_formed_values
from specrag.errors import InvalidInputError
from specrag.evaluation.data import load_questions, save_questions
from specrag.models.base import GeneratedText, GenerationRequest, Segment, Stage, Turn
from specrag.rapid import LongContext
from specrag.retrieval import Document, PassageIndex, read_documents
from tests.fakes import HashEmbedder, ScriptedLM
from tests.rapid_parts import DOCUMENT, generator

HALF = "smile \ud83d here"
MENDED = "smile \ufffd here"


def test_halves_that_make_a_character_become_it_and_others_are_replaced():
    assert well_formed("\ud83d\ude00 \ude00 \ud83d") == "\U0001f600 \ufffd \ufffd"
    assert well_formed("\ud83d\ude00", keep_length=True) == "\ufffd\ufffd"
    for whole in ("ascii", "Röntgen", "\U0001f600"):
        assert well_formed(whole) is whole


def test_values_that_need_no_change_are_not_copied():
    value = {"a": [1, ("b", None)], "c": np.zeros(2)}
    assert well_formed_values(value) is value
    assert well_formed_values({HALF: [(HALF, 1)]}) == {MENDED: [(MENDED, 1)]}


def test_passages_and_documents_are_mended():
    made = Passage.of({"text": HALF, "title": HALF, "id": HALF, "metadata": {HALF: [HALF]}})
    assert made == Passage(MENDED, MENDED, MENDED) and made.metadata == {MENDED: [MENDED]}
    assert Document(HALF, HALF, HALF) == Document(MENDED, MENDED, MENDED)


def test_metadata_that_hold_themselves_are_refused():
    metadata = {}
    metadata["all"] = [metadata]
    with pytest.raises(InvalidInputError, match="Passage.metadata holds itself"):
        Passage.of({"text": "a", "metadata": metadata})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_file_whose_name_is_no_utf8_is_read_and_indexed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    (document,) = read_documents(tmp_path)
    assert document.title == "caf\ufffd"
    index = PassageIndex(HashEmbedder())
    index.add([Passage(document.text, title=document.title, id=document.source)])
    index.save(tmp_path / "index")
    assert PassageIndex.load(tmp_path / "index", HashEmbedder()).passages == index.passages


def test_the_pipeline_takes_them_in_question_and_passages_and_writes_none():
    rag = SpeculativeRAG(drafter=ScriptedLM(lambda prompt: ("a reason", HALF)), embedder=HashEmbedder(), drafts=2)
    answer = rag.answer(HALF, [HALF, {"text": "b", "metadata": {"note": HALF}}, "c"])
    assert answer.question == MENDED
    json.dumps(answer.to_dict(), ensure_ascii=False).encode()


def test_an_index_is_asked_with_them(minilm):
    index = PassageIndex(minilm)
    index.add([HALF, "other"])
    assert index.search(HALF)[0].text == MENDED
    assert np.isfinite(minilm.embed([HALF])).all()


def test_models_in_this_process_take_them_in_prompts(tiny):
    request = GenerationRequest((Turn("user", (Segment(HALF),)),), (Stage(max_tokens=2),))
    assert len(tiny.generate([request])) == 1
    scored = tiny.score([[Turn.of("user", HALF), Turn("assistant", (Segment(HALF, "text"),))]])
    assert all(np.isfinite(scored[0].log_probs["text"]))
    assert GeneratedText(HALF, None, 1).text == MENDED


def test_rapid_takes_them_in_document_and_question(tiny, tmp_path):
    session = LongContext(DOCUMENT + HALF, generator(tiny))
    assert session.ask(HALF, max_tokens=2).stats.tokens == 2
    session.save(tmp_path / "session")


def test_question_files_that_escape_them_are_read_and_written(tmp_path):
    row = {"question": HALF, "answers": [HALF], "passages": [{"text": HALF}], "metadata": {"note": HALF}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    questions = load_questions(tmp_path / "a.jsonl")
    save_questions(questions, tmp_path / "b.jsonl")
    assert load_questions(tmp_path / "b.jsonl") == questions and questions[0].answers == (MENDED,)
