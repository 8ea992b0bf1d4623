"""LoRA adapters without peft: merged into a model, refused where they do not fit, averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specrag import Prompts
from specrag.engine.lora import read_lora
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models import TransformersLM, bundled
from specrag.models.bundled import adapter_folder
from specrag.training import average_adapters
from tests.conftest import tiny_llama


def test_an_adapter_of_another_model_changes_nothing(smollm2, tmp_path):
    lm = TransformersLM(tiny_llama(len(smollm2.tokenizer)), smollm2.tokenizer)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    with pytest.raises(InvalidInputError, match="made for another model"):
        TransformersLM(lm.model, lm.tokenizer, adapter=adapter_folder("smollm2-rag-drafter"))
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter"):
        TransformersLM(lm.model, lm.tokenizer, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (adapter_folder("smollm2-rag-drafter") / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(InvalidInputError, match="no plain LoRA"):
        TransformersLM(lm.model, lm.tokenizer, adapter=tmp_path)


def adapter(folder: Path, factors: dict[str, torch.Tensor], prompts: Prompts | None = None, **config) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    named = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{name}.weight": t for name, t in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    if prompts is not None:
        prompts.save_drafting(folder)
    return folder


FACTORS = {"A": torch.ones(2, 64), "B": torch.ones(128, 2)}


@pytest.mark.parametrize(
    "config",
    [
        [],
        "text",
        {"r": 2},
        {"r": 0, "lora_alpha": 4},
        {"r": "2", "lora_alpha": 4},
        {"r": 2, "lora_alpha": float("nan")},
    ],
    ids=str,
)
def test_a_damaged_config_is_one_clear_error(tmp_path, config):
    folder = adapter(tmp_path / "a", FACTORS)
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"peft_type": "LORA"} if type(config) is dict else config)
    )
    with pytest.raises(InvalidInputError, match="is damaged: adapter_config.json needs r and lora_alpha"):
        read_lora(tiny_llama(64), folder)
    for content in (b"", b"{", b"\xff\xfe\x00"):
        (folder / "adapter_config.json").write_bytes(content)
        with pytest.raises(ModelNotFoundError, match="no LoRA adapter could be read from"):
            read_lora(tiny_llama(64), folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_change_nothing(tmp_path, value):
    damaged = {name: tensor.clone() for name, tensor in FACTORS.items()}
    damaged["B"][3, 1] = value
    with pytest.raises(InvalidInputError, match=r"is damaged: .*lora_B.* holds numbers that are not finite"):
        read_lora(tiny_llama(64), adapter(tmp_path / "a", damaged))


def test_factors_that_do_not_fit_each_other_are_refused(tmp_path):
    for i, damaged in enumerate(({"B": torch.ones(128, 3)}, {"A": torch.ones(64)})):
        with pytest.raises(InvalidInputError, match="differ in rank|was made for another model"):
            read_lora(tiny_llama(64), adapter(tmp_path / str(i), FACTORS | damaged))


def test_a_weight_that_changed_on_the_disk_is_noticed_by_the_checksum(tmp_path):
    parts = [adapter(tmp_path / str(i), FACTORS) for i in range(2)]
    mean = average_adapters(parts, tmp_path / "mean")  # written by this package: with a checksum
    file = mean / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # half of 2: a number like any other
    with pytest.raises(ModelNotFoundError, match="its content has changed since it was written"):
        read_lora(tiny_llama(64), mean)


def test_the_mean_of_adapters_is_an_adapter(tmp_path):
    model = tiny_llama(64)
    size = tuple(model.model.layers[0].mlp.up_proj.weight.shape)
    a, b, c = torch.randn(3, 2, size[1]).bfloat16()
    out = torch.randn(size[0], 2).bfloat16()
    own = Prompts(abstention="nothing")
    parts = [adapter(tmp_path / str(i), {"A": x, "B": out}, own, seed=i) for i, x in enumerate((a, b, c))]
    mean = average_adapters(parts, tmp_path / "mean")
    # With B in common the mean of the factors is the mean of the updates.
    ((_, delta),) = read_lora(model, mean)
    expected = torch.stack([read_lora(model, part)[0][1] for part in parts]).mean(0)
    assert torch.allclose(delta, expected, atol=0.05, rtol=0.02) and delta.abs().max() > 1
    assert Prompts.of_drafter(mean) == own
    assert {t.dtype for t in load_file(mean / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_adapters_that_do_not_belong_together_have_no_mean(tmp_path):
    factors = {"A": torch.ones(2, 3), "B": torch.ones(3, 2)}
    one = adapter(tmp_path / "one", factors, Prompts())
    wider = adapter(tmp_path / "wider", {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}, Prompts())
    scaled = adapter(tmp_path / "scaled", factors, Prompts(), lora_alpha=8)
    asked = adapter(tmp_path / "asked", factors, Prompts(draft="{passages} {question}"))
    for given, message in (
        ([one], "at least two"), ([one, wider], "shape"), ([one, scaled], "scale"), ([one, asked], "prompts"),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=message):
            average_adapters(given, tmp_path / "mean")
    with pytest.raises(InvalidInputError, match="another folder"):
        average_adapters([one, scaled], one)
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter"):
        average_adapters([one, tmp_path / "none"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_bundled_adapter_takes_no_second_one(tmp_path):
    with pytest.raises(InvalidInputError, match="an adapter of 'smollm2' itself"):
        bundled("smollm2-rag-drafter", adapter=tmp_path)
