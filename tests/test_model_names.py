"""Names that are no model: what they are is said at once, without a minute of waiting for the hub."""

import time

import numpy as np
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import specrag.models
import specrag.models._hub
from specrag.cli import app
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models import OpenAIEmbedder, SpanReader, TransformersEmbedder, TransformersLM
from specrag.models.bundled import ADAPTERS, BUNDLED, READERS

KINDS = [TransformersLM, TransformersEmbedder, SpanReader]


@pytest.fixture
def without_network(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("load", KINDS)
def test_a_hub_id_without_network_is_one_error_within_seconds(load, without_network):
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"no \w+ 'nobody/nothing' is here, and http.* cannot be reached"):
        load("nobody/nothing")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("load", KINDS)
@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("a/b/c", ModelNotFoundError, "it is no hub id: give a folder"),
        ("~/no/such/folder", ModelNotFoundError, "at /.*no/such/folder: give a folder"),
        ("smolm2", ModelNotFoundError, "did you mean 'smollm2'"),
        ("MiniLM-reader", ModelNotFoundError, "did you mean 'minilm-reader'"),
        ("minilm", InvalidInputError, r"a bundled model: load it with bundled\('minilm'\)"),
        ("", InvalidInputError, "must be a folder, a .gguf file or a hub id, got ''"),
        (None, InvalidInputError, "must be a folder.* a hub id.*, got None"),
    ],
)
def test_a_name_that_is_no_model_says_what_it_may_be(load, name, kind, says, without_network):
    with pytest.raises(kind, match=says):
        load(name)


def test_a_model_that_was_downloaded_before_needs_no_network(without_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    specrag.models._hub.check_hub_id("somebody/something", "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--drafter", "minilm"], "'minilm' is an embedder and makes no drafts: give 'smollm2' or"),
        (["--drafter", "minilm-raeder"], "no drafter 'minilm-raeder': did you mean 'minilm-reader'?"),
        (["--drafter", ""], "drafter must be a folder, a .gguf file or a hub id, got ''"),
        (["--verifier", "mpnet"], "'mpnet' is an embedder and scores no drafts"),
        (["--embedder", "smollm2"], "'smollm2' is no embedder: give 'minilm' or 'mpnet'"),
        (["--embedder", "minlm"], "no embedder 'minlm': did you mean 'minilm'"),
    ],
)
def test_the_command_line_names_a_wrong_model_before_any_loads(options, says, tmp_path, monkeypatch, without_network):
    (tmp_path / "a.txt").write_text("The tower opened in 1889.")
    monkeypatch.setattr(specrag.models, "bundled", lambda *args, **options: pytest.fail("a model was loaded"))
    result = CliRunner().invoke(app, ["ask", "who?", "--docs", str(tmp_path), *options])
    assert result.exit_code == 1 and says in " ".join(result.output.split())


def test_a_bundled_embedder_may_be_named(tmp_path, monkeypatch, minilm):
    asked = []
    monkeypatch.setattr(specrag.models, "bundled", lambda name, **options: asked.append(name) or minilm)
    (tmp_path / "a.txt").write_text("The tower opened in 1889.")
    made = CliRunner().invoke(app, ["index", str(tmp_path), "--to", str(tmp_path / "index"), "--embedder", "mpnet"])
    assert made.exit_code == 0 and asked == ["mpnet"]


# --- texts and questions --------------------------------------------------------------------------------


def test_one_text_is_not_read_letter_by_letter(reader, minilm):
    """It is a sequence of texts of one letter."""
    for use in (
        lambda text: reader.read("who?", text),
        lambda text: reader.score("who?", text, [(0, 0, 1)]),
        minilm.embed,
        OpenAIEmbedder("http://127.0.0.1:9/v1", "m").embed,
    ):
        with pytest.raises(InvalidInputError, match="texts must be a list of texts, got a str"):
            use("one text")
        with pytest.raises(InvalidInputError, match=r"texts\[1\] must be a text, got bytes"):
            use(["a", b"b"])


def test_texts_may_be_any_sequence(minilm):
    texts = ["one", "two"]
    for given in (tuple(texts), np.array(texts)):
        assert np.array_equal(minilm.embed(given), minilm.embed(texts))


def test_a_question_that_is_no_text_is_named_as_such(reader):
    for question, says in ((b"who?", "got bytes"), (None, "got None"), (["who?"], "got a list")):
        with pytest.raises(InvalidInputError, match=f"the question must be a text, {says}"):
            reader.read(question, ["a text"])
        with pytest.raises(InvalidInputError, match=f"the question must be a text, {says}"):
            specrag.SpeculativeRAG(drafter=reader).answer(question, ["a text"])


def test_a_loaded_reader_without_its_tokenizer_says_so(reader):
    with pytest.raises(InvalidInputError, match="a loaded model needs its tokenizer"):
        SpanReader(reader.model)


def test_the_bundled_names_are_all_known():
    known = {*BUNDLED, *ADAPTERS, *READERS}
    assert known == set(specrag.models._hub.BUNDLED_NAMES)
