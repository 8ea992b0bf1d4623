"""REST's datastore on disk: what is found in it, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specrag.errors import InvalidInputError, NotFoundError
from specrag.rapid.datastore import LONGEST, MARKER, Datastore, suffix_order
from specrag.rapid.rest import RestProposer
from tests.rapid_parts import generator

WORDS = 4


def words(count: int = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is the word "ti"."""
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def text(tokens) -> str:
    return " ".join(f"t{token}" for token in tokens)


TEXTS = st.lists(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=60), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("datastore") / "store"


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(-1, 3), min_size=1, max_size=80))
def test_suffixes_are_in_the_order_of_the_tokens_that_begin_there(tokens):
    expected = sorted(range(len(tokens)), key=lambda i: (tokens[i : i + LONGEST], i))
    assert suffix_order(np.array(tokens)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, query=st.lists(st.integers(0, WORDS - 1), max_size=20), least=st.integers(1, 3))
def test_it_finds_what_a_search_of_every_text_finds(new_folder, texts, query, least):
    store = Datastore.build([text(t) for t in texts], words(), new_folder())
    assert len(store) == sum(map(len, texts))
    found = store.find(query, least)
    everywhere = [(t, end) for t in texts for end in range(1, len(t) + 1)]
    ends = {
        length: [(t, end) for t, end in everywhere if end >= length and t[end - length : end] == query[-length:]]
        for length in range(least, min(LONGEST, len(query)) + 1)
    }
    length = max((n for n in ends if ends[n]), default=0)
    assert found.length == length
    if length:
        expected = [([*t[end : end + 5], -1, -1, -1, -1, -1])[:5] for t, end in ends[length]]
        assert sorted(store.continuations(found, 5).tolist()) == sorted(expected)


def test_of_many_occurrences_some_are_read_in_proportion(new_folder):
    store = Datastore.build([text([0, 1, 2] * 30 + [0, 1, 3] * 10)], words(), new_folder())
    found = store.find([3, 0, 1])
    assert found.length == 3  # it stands between the groups of threes
    taken = store.continuations(store.find([1, 0, 1]), 1, most=20)
    assert len(taken) == 20 and 4 <= (taken == 3).sum() <= 6  # a quarter of the occurrences


def test_nothing_is_found_across_the_end_of_a_text(new_folder):
    store = Datastore.build([text([0, 1]), text([2, 3])], words(), new_folder())
    assert store.find([1, 2], least=2).length == 0
    assert store.continuations(store.find([0, 1]), 2).tolist() == [[-1, -1]]
    proposer = RestProposer(store, [0, 1], WORDS)
    assert proposer.source([]) is not None and proposer.propose([], 3, None) is None  # a match that nothing follows


def test_arrays_are_mapped_and_not_read(new_folder):
    store = Datastore.build([text(range(4))], words(), new_folder())
    assert isinstance(store.tokens, np.memmap) and isinstance(store.suffixes, np.memmap)


# --- what is refused ------------------------------------------------------------------------------------


def test_texts_without_tokens_and_folders_with_something_in_them_are_refused(new_folder):
    with pytest.raises(InvalidInputError, match="the texts have no tokens"):
        Datastore.build(["", " "], words(), new_folder())
    folder = new_folder()
    Datastore.build([text([1, 2])], words(), folder)
    for target in (folder, folder / MARKER):
        with pytest.raises(InvalidInputError, match="is there already and not empty: give a new folder"):
            Datastore.build([text([1, 2])], words(), target)


def changed(folder, **facts):
    written = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(written | facts))


def cut(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


def archived(file):
    with file.open("wb") as target:
        np.savez(target, tokens=np.zeros(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MARKER).write_text("{"), "is damaged: .*Build it again"),
        (lambda f: (f / MARKER).write_text("[]"), "is damaged: .*Build it again"),
        (lambda f: changed(f, format="pickle"), "names the format 'pickle'"),
        (lambda f: changed(f, tokenizer={}), "is damaged: 'digest'"),
        (lambda f: cut(f, "tokens.npy"), "is damaged: "),
        (lambda f: cut(f, "suffixes.npy"), "is damaged: "),
        (lambda f: (f / "tokens.npy").unlink(), "is damaged: .*No such file"),
        (lambda f: (f / "tokens.npy").write_bytes(b""), "is damaged: .*Build it again"),
        (lambda f: archived(f / "tokens.npy"), "its files do not fit"),
        (lambda f: np.save(f / "suffixes.npy", np.zeros(3)), "its files do not fit"),
        (lambda f: changed(f, tokens=5), "its files do not fit"),
        (lambda f: changed(f, tokens=0), "is empty: build it from texts"),
        (lambda f: changed(f, version=9), "has datastore version 9, this is 1: build it again"),
    ],
)
def test_a_damaged_datastore_is_refused(new_folder, damage, message):
    folder = new_folder()
    Datastore.build([text([0, 1, 2, 3, 1, 2])], words(), folder)
    damage(folder)
    with pytest.raises(InvalidInputError, match=message):
        Datastore.open(folder)


def test_damage_that_only_a_look_up_meets_is_named(new_folder):
    folder = new_folder()
    Datastore.build([text([0, 1, 2, 3, 1, 2])], words(), folder)
    np.save(folder / "suffixes.npy", np.full(6, 99, dtype=np.int32))
    with pytest.raises(InvalidInputError, match="is damaged: no text at 99"):
        Datastore.open(folder).find([1, 2])
    folder = new_folder()
    store = Datastore.build([text([0, 1, 2, 3, 1, 2])], words(), folder)
    with pytest.raises(InvalidInputError, match="it holds token 3, the vocabulary has 3"):
        RestProposer(store, [1, 2], 3).propose([], 2, None)
    np.save(folder / "tokens.npy", np.array([0, 1, 2, -7, 1, 2, -1], dtype=np.int32))
    with pytest.raises(InvalidInputError, match="it holds token -7, the vocabulary has 4"):
        RestProposer(Datastore.open(folder), [1, 2], 4).propose([], 2, None)


def test_a_missing_or_foreign_datastore_is_refused_when_the_generator_is_made(tiny, new_folder):
    folder = new_folder()
    with pytest.raises(NotFoundError, match="no datastore at .*: make one with `specrag datastore build"):
        generator(tiny, proposer="rest", datastore=str(folder))
    Datastore.build([text([0, 1, 2])], words(), folder, name="words")
    with pytest.raises(InvalidInputError, match="was built with words, not with the target's tokenizer"):
        generator(tiny, proposer="rest", datastore=folder)
    with pytest.raises(InvalidInputError, match="give datastore=FOLDER, made by `specrag datastore build`"):
        generator(tiny, proposer="rest", datastore=None)
    with pytest.raises(InvalidInputError, match="a path must not be empty"):
        generator(tiny, proposer="rest", datastore="")
    with pytest.raises(InvalidInputError, match="a path must be a text or a Path, got an int"):
        generator(tiny, proposer="rest", datastore=3)
    for proposer in ("rag", "match", "triforce"):
        with pytest.raises(InvalidInputError, match=f"proposer='{proposer}' looks up no datastore: give proposer='re"):
            generator(tiny, proposer=proposer, datastore=folder)


@pytest.mark.parametrize("texts", ["t1 t2", ["t1", 2], [None]])
def test_what_is_no_sequence_of_texts_is_refused(new_folder, texts):
    with pytest.raises(InvalidInputError, match=r"texts must be a sequence|texts\[[01]\] must be a text, got"):
        Datastore.build(texts, words(), new_folder())


@pytest.mark.parametrize("candidates", [16, [2, 16], "auto"])
def test_a_tree_without_room_is_refused(tiny, candidates):
    width = 4 if candidates != "auto" else 6
    depth = 16 if candidates != "auto" else 12
    with pytest.raises(InvalidInputError, match=rf"a tree of {depth} x {width} candidates is wider than the cache's"):
        generator(tiny, proposer="rest", candidates=candidates, tree_width=width)
    with pytest.raises(InvalidInputError, match="proposer='match' makes no trees"):
        generator(tiny, proposer="match", tree_width=2)
    with pytest.raises(InvalidInputError, match="tree_width=2 needs transfer='none', got 'rapid'"):
        generator(tiny, proposer="hybrid", tree_width=2)
    with pytest.raises(InvalidInputError, match="tree_width must be at least 1"):
        generator(tiny, proposer="rest", tree_width=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 5}, r"tree_width='auto' is chosen together with candidates='auto', got 5: give a number"),
        ({"proposer": "rest"}, "proposer='rest' has no tree_width='auto': give a number"),
        ({"proposer": "match"}, "proposer='match' makes no trees"),
        ({"transfer": "rapid"}, "tree_width='auto' needs transfer='none', got 'rapid'"),
        ({"tree_width": "wide"}, "tree_width must be"),
    ],
    ids=str,
)
def test_a_width_that_cannot_be_chosen_is_refused(tiny, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        generator(tiny, **({"transfer": "none", "tree_width": "auto"} | settings))
