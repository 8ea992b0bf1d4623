"""Saved sessions: they continue exactly, and a file that does not fit is refused."""

import pytest
import torch

from specrag.errors import InvalidInputError, NotFoundError
from specrag.rapid import LongContext
from tests.rapid_parts import DOCUMENT, generator


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
    monkeypatch.setattr("specrag.rapid.session_file.SESSION_VERSION", 2)
    with pytest.raises(InvalidInputError, match="version 1, this is 2"):
        LongContext.load(file, generator(tiny))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInputError, match="damaged"):
        LongContext.load(file, generator(tiny))
    with pytest.raises(NotFoundError, match="no saved session"):
        LongContext.load(tmp_path / "none", generator(tiny))
