"""Folders of models that are damaged on the disk: one clear error, whatever library notices it."""

from __future__ import annotations

import shutil

import pytest

from specrag.errors import ModelNotFoundError
from specrag.models import TransformersEmbedder, TransformersLM
from specrag.models._loading import loading
from specrag.models.bundled import located


@pytest.fixture
def folder(tiny_path, tmp_path):
    return shutil.copytree(tiny_path, tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda whole: whole[: len(whole) // 2]),
        ("model.safetensors", lambda whole: b""),
        ("config.json", lambda whole: b""),
        ("config.json", lambda whole: b"[]"),
        ("config.json", lambda whole: whole.replace(b'"hidden_size": 64', b'"hidden_size": "64"')),
        ("tokenizer.json", lambda whole: whole[: len(whole) // 2]),
        ("tokenizer.json", lambda whole: b"\xff\xfe"),
        ("tokenizer_config.json", lambda whole: b"[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_of_a_language_model_is_one_clear_error(folder, file, damage):
    content = (folder / file).read_bytes()
    assert damage(content) != content
    (folder / file).write_bytes(damage(content))
    with pytest.raises(ModelNotFoundError, match=rf"{folder} could not be loaded as a (causal|tokenizer)"):
        TransformersLM(folder)


def test_a_damaged_embedder_is_one_clear_error(tmp_path):
    folder = shutil.copytree(located("minilm"), tmp_path / "minilm")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelNotFoundError, match="could not be loaded as an embedder"):
        TransformersEmbedder(folder)


@pytest.mark.parametrize("error", [ImportError("install x"), MemoryError(), RuntimeError("out of memory: 9 bytes")])
def test_what_is_no_damage_stays_what_it_is(error):
    with pytest.raises(type(error)) as found, loading("folder", "a model"):
        raise error
    assert found.value is error
