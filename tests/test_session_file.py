"""Saved sessions: they continue exactly, and a file that does not fit is refused."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from specrag.errors import InvalidInputError, NotFoundError, SpecRAGError
from specrag.rapid import LongContext
from specrag.rapid.session_file import read_session
from tests.fakes import HashEmbedder
from tests.kills import kill_session
from tests.rapid_parts import DOCUMENT, generator
from tests.test_files import on_a_full_disk


def test_a_saved_session_continues_with_identical_logits(tiny, tmp_path):
    session = LongContext(DOCUMENT, generator(tiny, candidates=3))
    session.retrieve("bell")
    session.save(tmp_path / "session.safetensors")
    loaded = LongContext.load(tmp_path / "session.safetensors", generator(tiny, candidates=3))
    assert loaded.prompt == session.prompt and loaded.prefill_seconds == 0
    ids = tiny.encoder.encode_text("who keeps it?")
    assert torch.equal(session.model.feed(ids), loaded.model.feed(ids))
    assert loaded.ask("who?", max_tokens=8).text == session.ask("who?", max_tokens=8).text
    assert loaded.retrieve("bell") == session.retrieve("bell")


def test_a_loaded_session_reads_nothing_and_embeds_the_context_only_if_nobody_has(tiny, tmp_path, forward_passes):
    session = LongContext(DOCUMENT, generator(tiny))
    session.save(tmp_path / "new")
    session.retrieve("bell")
    session.save(tmp_path / "embedded")
    counts = forward_passes(tiny.model)
    for name, texts in (("new", 1 + 3), ("embedded", 1)):  # a chunk has three pieces
        loaded = LongContext.load(tmp_path / name, generator(tiny))
        loaded.retrieve("bell")
        assert loaded.rapid.embedder.calls == texts
    assert counts == []


def test_a_session_of_another_model_version_or_none_at_all_is_refused(tiny, other, tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    LongContext(DOCUMENT, generator(tiny)).save(file)
    with pytest.raises(InvalidInputError, match="was made with"):
        LongContext.load(file, generator(other))
    monkeypatch.setattr("specrag.rapid.session_file.SESSION_VERSION", 3)
    with pytest.raises(InvalidInputError, match="version 2, this is 3"):
        LongContext.load(file, generator(tiny))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match="damaged"):
        LongContext.load(file, generator(tiny))
    with pytest.raises(NotFoundError, match="no saved session"):
        LongContext.load(tmp_path / "none", generator(tiny))


def changed(file, change) -> None:
    """Write the session in ``file`` anew with its tensors changed, and its metadata as they were."""
    tensors = load_file(file)
    with safe_open(file, "pt") as data:
        facts = data.metadata()
    change(tensors)
    save_file(tensors, file, metadata=facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["keys.0"].view(-1)[5].fill_(float("nan")),
        lambda t: t["values.1"].view(-1)[0].add_(1e-3),
        lambda t: t["context"][0].add_(1),
        lambda t: t["pieces"].view(-1)[0].add_(1e-3),
        lambda t: t.pop("keys.1"),
        lambda t: t.update({"keys.0": t["keys.0"][:, :, :-1].contiguous()}),
    ],
    ids=["nan", "value", "token", "embedding", "missing", "shape"],
)
def test_numbers_that_changed_on_the_disk_are_noticed(tiny, tmp_path, change):
    session = LongContext(DOCUMENT, generator(tiny))
    session.retrieve("bell")
    session.save(tmp_path / "s")
    changed(tmp_path / "s", change)
    with pytest.raises(InvalidInputError, match="not a saved session, or damaged .*: read the text again"):
        LongContext.load(tmp_path / "s", generator(tiny))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"keys.0": t["keys.0"][:, :1].contiguous()}),
        lambda t: t.update({"values.0": t["values.0"][..., :-1].contiguous()}),
        lambda t: t.update({"keys.0": t["keys.0"].half()}),
        lambda t: t.update({"context": t["context"][:-1].contiguous()}),
        lambda t: t.update({"head": torch.zeros(2, 2)}),
        lambda t: t.pop("head"),
    ],
    ids=["heads", "size", "dtype", "tokens", "matrix", "missing"],
)
def test_a_session_of_another_shape_is_refused_though_its_checksum_is_right(tiny, tmp_path, change, monkeypatch):
    monkeypatch.setattr("specrag.engine.tensor_files.digest", lambda tensors, facts: "the same")
    LongContext(DOCUMENT, generator(tiny)).save(tmp_path / "s")
    changed(tmp_path / "s", change)
    with pytest.raises(InvalidInputError, match="not a saved session, or damaged"):
        LongContext.load(tmp_path / "s", generator(tiny))


def test_another_file_of_tensors_is_no_session(tiny, tmp_path):
    save_file({"keys.0": torch.zeros(2)}, tmp_path / "a", metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match="not a saved session, or damaged .it has no version"):
        read_session(tmp_path / "a", tiny, 100, 8)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match="not a saved session, or damaged"):
        read_session(tmp_path / "folder", tiny, 100, 8)


def test_embeddings_of_another_embedder_are_made_anew(tiny, tmp_path):
    class Other(HashEmbedder):
        name = "other"

    session = LongContext(DOCUMENT, generator(tiny))
    session.retrieve("bell")
    session.save(tmp_path / "s")
    for dimension in (16, 8):
        loaded = LongContext.load(tmp_path / "s", generator(tiny, embedder=Other(dimension)))
        loaded.retrieve("bell")
        assert loaded.rapid.embedder.calls == 1 + 3


def test_a_session_is_not_saved_onto_a_folder_or_a_full_disk(tiny, tmp_path):
    session = LongContext(DOCUMENT, generator(tiny))
    session.save(tmp_path / "s")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInputError, match="is a folder: give the path of a file"):
        session.save(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecRAGError, match="could not be written"):
        session.save(tmp_path / "file" / "s")
    on_a_full_disk(lambda: session.save(tmp_path / "s"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "s"]
    LongContext.load(tmp_path / "s", generator(tiny))


@pytest.mark.slow
def test_a_killed_process_loses_no_session_and_leaves_nothing(tiny, tmp_path):
    outcome = kill_session(tmp_path, 20, lm=tiny)
    assert outcome.killed == 20 and outcome.dirty > 0
    assert not outcome.lost and not outcome.refused and not outcome.left, outcome
