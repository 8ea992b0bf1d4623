"""Training a span reader: its examples, a loss that falls, a run that is stopped, LoRA, and the adapter it writes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specrag import Passage
from specrag.errors import InvalidInputError, ModelNotFoundError, SpecRAGError
from specrag.evaluation.data import Question
from specrag.models.bundled import located
from specrag.models.reader import ADAPTER_FILE, SpanReader
from specrag.training.reader import ReaderSettings, train_reader
from specrag.training.reader_batches import ReaderCollator, encode_group, in_order
from specrag.training.reader_examples import ReaderExample, ReaderMixture, make_reader_examples
from specrag.training.settings import TrainingSettings
from tests.fakes import HashEmbedder
from tests.reader_parts import records, word_tokenizer
from tests.test_span_reader import tiny_bert


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def minilm_tokenizer():
    return AutoTokenizer.from_pretrained(located("minilm"))


def rounds(count: int, **mixture) -> list[list[ReaderExample]]:
    settings = ReaderMixture(**({"substituted": 0.0, "unanswerable": 0.0} | mixture))
    return make_reader_examples(records(), HashEmbedder(), rounds=count, mixture=settings)


# --- examples -------------------------------------------------------------------------------------------


def test_an_example_has_the_gold_passage_and_negatives_without_its_answer():
    for example in rounds(1, alone=0.0, most_negatives=2)[0]:
        holding = [p for p in example.passages if example.answers[0] in p.text]
        assert 2 <= len(example.passages) <= 3 and len(holding) == 1
    assert all(len(example.passages) == 1 for example in rounds(1, alone=1.0)[0])


def test_the_gold_passage_is_left_out_as_often_as_asked_and_then_no_span_is_right():
    made = [example for part in rounds(20, unanswerable=0.5) for example in part]
    without = [example for example in made if not example.answers]
    assert 0.4 < len(without) / len(made) < 0.6
    years = {e.question: e for e in made if e.answers}
    assert all(years[e.question].answers[0] not in p.text for e in without if e.question in years for p in e.passages)


def test_questions_that_no_span_answers_train_the_reader_to_point_at_nothing():
    closed = [
        dataclasses.replace(records()[0], answers=("yes",)),
        dataclasses.replace(records()[1], answers=()),
        dataclasses.replace(records()[2], answers=("not in it",)),  # of no use
    ]
    made = make_reader_examples(closed, HashEmbedder(), mixture=ReaderMixture(alone=1.0, unanswerable=0.0))[0]
    assert [example.question for example in made] == [closed[0].question, closed[1].question]
    assert all(example.answers == () for example in made)
    with pytest.raises(InvalidInputError, match="none of the 1 records can be used"):
        make_reader_examples(closed[2:], HashEmbedder())


def test_negatives_may_come_from_the_record_itself_but_there_must_be_some():
    (first, second, *_) = records()
    everything = ReaderMixture(alone=0, most_negatives=1, unanswerable=0, substituted=0)
    alone = dataclasses.replace(first, passages=(*first.passages, *second.passages))
    ((made,),) = make_reader_examples([alone], HashEmbedder(), mixture=everything)
    assert sorted(p.title for p in made.passages) == ["Tower 0", "Tower 1"]
    unanswered = dataclasses.replace(alone, answers=(), gold=())  # there is no gold passage at all
    ((made,),) = make_reader_examples([unanswered], HashEmbedder(), mixture=everything)
    assert made.answers == () and len(made.passages) == 1
    notes = (Passage("Note 0."), Passage("Note 1."))
    denied = dataclasses.replace(alone, answers=("no",), passages=notes, gold=(0,))
    ((made,),) = make_reader_examples([denied], HashEmbedder(), mixture=everything)
    assert len(made.passages) == 2  # "note" is not the answer "no"
    with pytest.raises(InvalidInputError, match="one passage in all: negatives need at least 2"):
        make_reader_examples([first], HashEmbedder())


def test_a_record_is_shown_as_often_as_its_weight_says():
    weighted = [dataclasses.replace(record, weight=2.5) for record in records()]
    made = make_reader_examples(weighted, HashEmbedder(), rounds=40)
    assert np.mean([len(part) for part in made]) == pytest.approx(2.5 * 24, rel=0.05)


def test_long_passages_are_shown_as_windows_that_keep_an_answer():
    text = "word " * 300 + "it was built in 1889 by them " + "word " * 300
    long = Question("a", "when was it built", ("1889",), (Passage(text), Passage("other " * 500)), (0,))
    made = make_reader_examples([long], HashEmbedder(), rounds=30, mixture=ReaderMixture(unanswerable=0, words=60))
    for example in (e for part in made for e in part):
        assert sum("1889" in p.text for p in example.passages) == 1
        sizes = {len(p.text.split()) for p in example.passages}
        assert len(sizes) == 1 and 30 <= sizes.pop() <= 60


def test_every_place_of_an_answer_is_right(minilm_tokenizer):
    passages = (Passage("In 1889, yes, 1889 it was.", title="1889"), Passage("Not in 18890."))
    group = encode_group(ReaderExample("when", passages, ("1889",)), minilm_tokenizer, 64, 8)
    said = [minilm_tokenizer.decode(group.ids[row][i : i + w + 1]) for row, i, w in group.gold]
    assert said == ["1889"] * 3 and {row for row, _, _ in group.gold} == {0}
    assert not any(inside for inside, kind in zip(group.inside[0], group.types[0], strict=True) if kind == 0)


def test_batches_hold_so_many_passages_and_every_example_once():
    examples = rounds(3)
    ordered = in_order(examples, rows=8)
    assert all(sum(len(e.passages) for e in batch) <= 8 for batch in ordered)
    assert sorted(id(e) for batch in ordered for e in batch) == sorted(id(e) for part in examples for e in part)
    assert in_order(examples, rows=8) == ordered and in_order(examples, rows=8, seed=1) != ordered


def test_a_batch_in_parts_of_like_length_has_the_loss_of_its_examples_alone(minilm_tokenizer):
    from types import SimpleNamespace

    from specrag.training.reader import _ReaderTrainer

    model, collate = tiny_bert(len(minilm_tokenizer)), ReaderCollator(minilm_tokenizer, 128, 8)
    examples = [
        ReaderExample("when", (Passage("In 1889."), Passage("word " * 60)), ("1889",)),
        ReaderExample("who", (Passage("It was Ann, " + "surely " * 30),), ("Ann",)),
        ReaderExample("why", (Passage("Nobody knows."),)),
    ]
    trainer = SimpleNamespace(_longest=8, state=SimpleNamespace(global_step=0))
    with torch.no_grad():
        loss = _ReaderTrainer.compute_loss(trainer, model, collate([examples]))
        alone = [_ReaderTrainer.compute_loss(trainer, model, collate([[example]])) for example in examples]
    assert float(loss) == pytest.approx(float(sum(alone) / 3), abs=1e-4)


# --- training -------------------------------------------------------------------------------------------

SETTINGS = ReaderSettings(learning_rate=3e-3, rows=16, max_tokens=64, longest=8, averaging=0.9, checkpoint_steps=4)


def test_the_loss_falls_and_the_spans_come_out_right(tokenizer, tmp_path):
    losses = []
    out = train_reader(
        tiny_bert(len(tokenizer)),
        tokenizer,
        rounds(40, alone=1.0),
        tmp_path / "reader",
        settings=dataclasses.replace(SETTINGS, train_embeddings=True, checkpoint_steps=1000),
        progress=lambda step, steps, logged: losses.append(logged["loss"]) if "loss" in logged else None,
    )
    assert losses[-1] < 0.3 * losses[0]
    reader = SpanReader(tiny_bert(len(tokenizer)), tokenizer, adapter=out, longest=8, dtype=torch.float32)
    right = 0
    for record in records():
        text = f"{record.passages[0].title}: {record.passages[0].text}"
        best = reader.read(record.question, [text]).spans[0]
        right += text[best.start : best.end] == record.answers[0]
    assert right >= 22


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_run_goes_on_to_the_same_end(tokenizer, tmp_path, method):
    settings = dataclasses.replace(SETTINGS, method=method, rank=4)
    data = rounds(3)

    def run(folder, stop_at=None):
        def progress(step, steps, logged):
            if step == stop_at:
                raise KeyboardInterrupt

        return train_reader(tiny_bert(len(tokenizer)), tokenizer, data, folder, settings=settings, progress=progress)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_at=6)
    resumed = run(tmp_path / "stopped")
    for file in [ADAPTER_FILE] + (["adapter_model.safetensors"] if method == "lora" else []):
        a, b = load_file(whole / file), load_file(resumed / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    read = SpanReader(tiny_bert(len(tokenizer)), tokenizer, adapter=resumed).read("when", ["It was in 1889."])
    assert read.spans
    with pytest.raises(InvalidInputError, match="other examples or settings"):
        train_reader(tiny_bert(len(tokenizer)), tokenizer, rounds(2), tmp_path / "stopped", settings=settings)


@pytest.mark.parametrize(("at", "what"), [(6, "step 7 the loss"), (8, "step 8 the weights")])
def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(tokenizer, tmp_path, at, what):
    """At step 8, a checkpoint is due: without numbers, it is not written."""
    model = tiny_bert(len(tokenizer))

    def progress(step, steps, logged):
        if step == at:
            model.qa_outputs.weight.data.fill_(math.nan)

    with pytest.raises(SpecRAGError, match=f"has diverged: at {what} became NaN"):
        train_reader(model, tokenizer, rounds(3), tmp_path, settings=SETTINGS, progress=progress)
    kept = [folder for folder in (tmp_path / "checkpoints").glob("checkpoint-*") if (folder / "complete.json").exists()]
    assert [folder.name for folder in kept] == ["checkpoint-4"] and not (tmp_path / ADAPTER_FILE).exists()
    assert all(torch.isfinite(value).all() for value in load_file(kept[0] / "model.safetensors").values())


def test_frozen_embeddings_are_not_in_the_result(tokenizer, tmp_path):
    out = train_reader(tiny_bert(len(tokenizer)), tokenizer, rounds(1), tmp_path, settings=SETTINGS)
    names = set(load_file(out / ADAPTER_FILE))
    assert not any("embeddings" in name for name in names) and "qa_outputs.weight" in names


def test_what_an_adapter_cannot_be(tokenizer, tmp_path):
    model = tiny_bert(len(tokenizer))
    with pytest.raises(ModelNotFoundError, match="no reader's weights could be read"):
        SpanReader(model, tokenizer, adapter=tmp_path)
    save_file({"qa_outputs.weight": torch.zeros(2, 5)}, tmp_path / ADAPTER_FILE)
    with pytest.raises(InvalidInputError, match=r"made for another base: qa_outputs.weight is \(2, 32\) here"):
        SpanReader(model, tokenizer, adapter=tmp_path)
    save_file({"qa_outputs.bias": torch.tensor([0.0, float("nan")])}, tmp_path / ADAPTER_FILE)
    with pytest.raises(InvalidInputError, match="damaged: qa_outputs.bias"):
        SpanReader(model, tokenizer, adapter=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"averaging": 1.0}, r"averaging must lie in \[0, 1\)"),
        ({"method": "half"}, "method must be 'full' or 'lora'"),
    ],
)
def test_settings_are_checked_at_construction(changes, message):
    with pytest.raises(InvalidInputError, match=message):
        ReaderSettings(**changes)


def test_there_must_be_examples_and_a_fast_tokenizer(tokenizer, tmp_path):
    with pytest.raises(InvalidInputError, match="no examples"):
        train_reader(tiny_bert(100), tokenizer, [[]], tmp_path)
    with pytest.raises(InvalidInputError, match="no character offsets"):
        train_reader(tiny_bert(100), object(), rounds(1), tmp_path)


@pytest.mark.parametrize("kind", [ReaderSettings, TrainingSettings])
@pytest.mark.parametrize("rate", [-1.0, 0.0, math.nan, math.inf, "3e-4"])
def test_a_learning_rate_that_no_optimiser_takes_is_refused_before_anything_loads(kind, rate):
    with pytest.raises(InvalidInputError, match="learning_rate must be a"):
        kind(learning_rate=rate)
