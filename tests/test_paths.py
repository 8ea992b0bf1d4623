"""Every public door that takes a path says so when it is given something else."""

from __future__ import annotations

import pytest

from specrag import SpeculativeRAG
from specrag.errors import InvalidInputError
from specrag.evaluation.data import load_questions, save_questions
from specrag.evaluation.formats import load as load_format
from specrag.evaluation.page import write_page
from specrag.evaluation.run import evaluate
from specrag.evaluation.runs import Run
from specrag.models import SpanReader, TransformersEmbedder, TransformersLM, bundled, load_reader
from specrag.models.bundled import fetch, located
from specrag.rapid import LongContext
from specrag.rapid.datastore import Datastore
from specrag.retrieval import PassageIndex, index_documents, read_documents, read_passages
from specrag.speculative.confidence import Calibration
from specrag.training import average_adapters, train, train_reader
from tests.fakes import HashEmbedder, first_passage_lm
from tests.rapid_parts import generator
from tests.test_confidence import calibration
from tests.test_runs import QUESTIONS

HASH = HashEmbedder()
DOORS = {
    "read_documents": lambda path, tiny: read_documents(path),
    "read_passages": lambda path, tiny: read_passages(path),
    "index_documents": lambda path, tiny: index_documents(path, HASH),
    "PassageIndex.load": lambda path, tiny: PassageIndex.load(path, HASH),
    "PassageIndex.save": lambda path, tiny: PassageIndex(HASH).save(path),
    "PassageIndex.is_saved_at": lambda path, tiny: PassageIndex.is_saved_at(path),
    "PassageIndex.check_target": lambda path, tiny: PassageIndex.check_target(path),
    "LongContext.load": lambda path, tiny: LongContext.load(path, generator(tiny)),
    "LongContext.save": lambda path, tiny: LongContext("A short text.", generator(tiny)).save(path),
    "Datastore.open": lambda path, tiny: Datastore.open(path),
    "Datastore.build": lambda path, tiny: Datastore.build(["radium"], tiny.tokenizer, path),
    "Datastore.check_target": lambda path, tiny: Datastore.check_target(path),
    "Calibration.load": lambda path, tiny: Calibration.load(path),
    "Calibration.save": lambda path, tiny: calibration().save(path),
    "load_questions": lambda path, tiny: load_questions(path),
    "save_questions": lambda path, tiny: save_questions([], path),
    "formats.load": lambda path, tiny: load_format(path),
    "Run.load": lambda path, tiny: Run.load(path),
    "evaluate": lambda path, tiny: evaluate({"a": SpeculativeRAG(drafter=first_passage_lm())}, QUESTIONS, path),
    "write_page": lambda path, tiny: write_page(path),
    "average_adapters": lambda path, tiny: average_adapters(["a", "b"], path),
    "average_adapters of": lambda path, tiny: average_adapters([path, path], "out"),
    "train": lambda path, tiny: train(tiny, [[]], path),
    "train_reader": lambda path, tiny: train_reader(None, None, [[]], path),
    "TransformersLM": lambda path, tiny: TransformersLM(path),
    "TransformersEmbedder": lambda path, tiny: TransformersEmbedder(path),
    "SpanReader": lambda path, tiny: SpanReader(path),
    "load_reader": lambda path, tiny: load_reader(path),
}
# Here None means "the usual place", or nothing.
OPTIONAL = {
    "bundled": lambda path, tiny: bundled("minilm", folder=path),
    "located": lambda path, tiny: located("minilm", path),
    "fetch": lambda path, tiny: fetch("minilm", path),
    "load_reader of": lambda path, tiny: load_reader("minilm-reader", models=path),
    "an adapter": lambda path, tiny: TransformersLM(tiny.model, tiny.tokenizer, adapter=path),
}


@pytest.mark.parametrize("door", [*DOORS, *OPTIONAL])
def test_what_is_no_path_is_named(door, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        (3, "int"),
        (b"folder", "bytes"),
        (["folder"], "list"),
        ({}, "dict"),
        (True, "bool"),
        ("a\0b", "null character"),
    ]
    for value, named in [*given, *([(None, "None"), (" ", "' '")] if door in DOORS else [])]:
        with pytest.raises(InvalidInputError, match=named):
            (DOORS | OPTIONAL)[door](value, tiny)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_a_text_or_begin_with_the_home_folder(tmp_path, monkeypatch):
    assert located("minilm", str(located("minilm").parent)) == located("minilm")
    monkeypatch.setenv("HOME", str(tmp_path))
    index = PassageIndex(HASH)
    index.add(["Marie Curie discovered radium."])
    index.save("~/site")
    assert len(PassageIndex.load("~/site", HASH)) == 1 and (tmp_path / "site").is_dir()
    calibration().save("~/confidence.json")
    assert Calibration.load("~/confidence.json") == calibration()
    save_questions(QUESTIONS, "~/questions.jsonl")
    assert len(load_questions("~/questions.jsonl")) == len(load_format("~/questions.jsonl")) == len(QUESTIONS)
