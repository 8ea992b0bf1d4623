"""Training a drafter: a run that learns, a run that is killed, and the drafter that ships."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specrag import Prompts, SpeculativeRAG
from specrag.errors import InvalidInputError, SpecRAGError
from specrag.models import TransformersLM
from specrag.models.bundled import adapter_folder
from specrag.speculative.drafting import Drafter
from specrag.training import Mixture, TrainingSettings, evaluate_drafter, make_examples, train
from specrag.training.examples import encode_example
from specrag.training.trainer import Collator, completion_loss
from tests.conftest import tiny_llama
from tests.fakes import HashEmbedder
from tests.towers import made

SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "checkpoint_steps": 4,
    "precision": "float32",
}


TRAINED_WITH = dataclasses.replace(Prompts(), draft="{passages}\n\nAsked: {question}")


def tiny(smollm2) -> TransformersLM:
    return TransformersLM(tiny_llama(len(smollm2.tokenizer), initializer_range=0.02), smollm2.tokenizer)


def test_a_padded_batch_has_the_loss_of_its_examples_one_by_one(smollm2):
    lm = tiny(smollm2)
    drafter = Drafter(lm, Prompts())
    examples = [encode_example(e, drafter, lm.encoder, 0) for e in made(6)[0]]
    assert len({len(e.ids) for e in examples}) > 1
    batch = Collator(pad=0)(examples)
    with torch.inference_mode():
        loss, _ = completion_loss(lm.model, **batch)
        alone = [
            torch.nn.functional.cross_entropy(
                lm.model(torch.tensor([e.ids])).logits[0, :-1], torch.tensor(e.labels[1:]), reduction="sum"
            )
            for e in examples
        ]
    assert torch.allclose(loss, sum(alone), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_loss_falls_and_the_result_loads(smollm2, tmp_path, method):
    lm, losses = tiny(smollm2), []
    settings = TrainingSettings(method=method, learning_rate=1e-2, **SETTINGS)
    out = train(
        lm,
        made(24, variants=4),
        tmp_path / "out",
        settings=settings,
        held=made(4)[0],
        prompts=TRAINED_WITH,
        card={"data": "towers"},
        progress=lambda step, steps, logged: losses.append(logged["loss"]) if "loss" in logged else None,
    )
    assert losses[-1] < losses[0] - (0.2 if method == "lora" else 3)  # nats; random frozen weights leave a LoRA little
    assert TRAINED_WITH.drafts_like(Prompts.of_drafter(out))
    card = (out / "README.md").read_text()
    assert "towers" in card and "held part" in card and "Made by" in card
    assert json.loads((out / "training.json").read_text())["examples"] == 96
    if method == "lora":
        base = tiny(smollm2)
        read = TransformersLM(base.model, base.tokenizer, adapter=out)
        more = train(tiny(smollm2), made(24), tmp_path / "more", settings=settings, adapter=out)
        assert json.loads((more / "training.json").read_text())["training"]["train_loss"] < losses[0] - 0.2
        with pytest.raises(InvalidInputError, match="made for another model"):
            train(
                tiny(smollm2),
                made(4),
                tmp_path / "no",
                settings=settings,
                adapter=adapter_folder("smollm2-rag-drafter"),
            )
        with pytest.raises(InvalidInputError, match="leave method='full'"):
            train(tiny(smollm2), made(4), tmp_path / "no", settings=TrainingSettings(method="full"), adapter=out)
    else:
        read = TransformersLM(out)
    assert SpeculativeRAG(drafter=read).texts.drafts_like(TRAINED_WITH)
    conversation = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        trained, loaded = lm.model(conversation).logits, read.model(conversation).logits
    assert torch.allclose(trained, loaded, atol=2e-2)
    assert not torch.allclose(loaded, tiny(smollm2).model(conversation).logits, atol=2e-2)


_KILLED = """
import os, sys
from transformers import AutoTokenizer
import tests.test_training as t
def progress(step, steps, logged):
    if step == 10:
        os._exit(9)  # as a kill does: nothing is put in order
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = t.TransformersLM(t.tiny_llama(len(tokenizer), initializer_range=0.02), tokenizer)
t.train(model, t.made(24, variants=2), sys.argv[1], settings=t.TrainingSettings(**t.SETTINGS), progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(smollm2, smollm2_path, tmp_path):
    whole = train(tiny(smollm2), made(24, variants=2), tmp_path / "whole", settings=TrainingSettings(**SETTINGS))
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "killed"), str(smollm2_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    steps = []
    again = train(
        tiny(smollm2),
        made(24, variants=2),
        tmp_path / "killed",
        settings=TrainingSettings(**SETTINGS),
        progress=lambda step, *_: steps.append(step),
    )
    assert min(steps) == 9 and max(steps) == 12  # from the checkpoint of step 8
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) == len(b) == 28
    with pytest.raises(InvalidInputError, match="run with other examples or settings"):
        train(tiny(smollm2), made(24), tmp_path / "killed", settings=TrainingSettings(**SETTINGS))


@pytest.mark.slow
def test_a_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(smollm2, tmp_path):
    lm = tiny(smollm2)

    def progress(step, steps, logged):
        if step == 5:
            next(lm.model.parameters()).data.fill_(math.nan)

    settings = TrainingSettings(method="full", learning_rate=1e-3, **SETTINGS)
    with pytest.raises(SpecRAGError, match="has diverged: at step 6 the loss became NaN"):
        train(lm, made(24, variants=2), tmp_path, settings=settings, progress=progress)
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "complete.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_settings_are_checked_at_the_door(smollm2, tmp_path):
    for wrong, said in [
        ({"method": "qlora"}, "method must be"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"batch_size": 3, "micro_batch_size": 2}, "multiple of micro_batch_size"),
    ]:
        with pytest.raises(InvalidInputError, match=said):
            TrainingSettings(**wrong)
    with pytest.raises(InvalidInputError, match="at most max_tokens=3"):
        train(tiny(smollm2), made(4), tmp_path, settings=TrainingSettings(max_tokens=3))


@pytest.mark.slow
def test_the_shipped_drafter_is_small_and_drafts(quick_drafter, questions):
    file = adapter_folder("smollm2-rag-drafter") / "adapter_model.safetensors"
    assert file.stat().st_size < 20e6
    shown = make_examples([q for q in questions if q.answers], HashEmbedder(), mixture=Mixture(unanswerable=0))[0]
    found = evaluate_drafter(quick_drafter, shown)
    assert found.right >= 0.25 and found.wrongly_abstained <= 0.3, found  # as published it has none of them right
