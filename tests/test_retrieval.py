import hashlib
import json
import math
import resource

import numpy as np
import pytest

from specrag.errors import InvalidInputError, NotFoundError
from specrag.models.bundled import located
from specrag.models.embedders import TransformersEmbedder
from specrag.retrieval import Document, PassageIndex, index_documents, read_documents, split_passages
from specrag.schema import Passage
from tests.documents import make_pdf
from tests.fakes import HashEmbedder


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Plain text about Röntgen.", encoding="utf-8")
    (folder / "b.md").write_text("# The heading\n\nMarkdown about Curie.")
    (folder / "c.html").write_text(
        "<html><head><title>Page</title><script>var x</script></head><body><p>Html about Bohr.</p></body></html>"
    )
    (folder / "old.txt").write_bytes("Café".encode("cp1252"))
    make_pdf(folder / "d.pdf", "Pdf about Einstein.")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def test_text_markdown_html_and_pdf_are_read(docs):
    texts = {d.source.rsplit("/", 1)[-1]: d for d in read_documents(docs, notes=[])}
    assert set(texts) == {"a.txt", "b.md", "c.html", "d.pdf", "old.txt"}
    assert "Röntgen" in texts["a.txt"].text
    assert texts["b.md"].title == "The heading"
    assert texts["c.html"].title == "Page" and "Html about Bohr." in texts["c.html"].text
    assert "var x" not in texts["c.html"].text
    assert "Pdf about Einstein." in texts["d.pdf"].text and texts["d.pdf"].page == 1
    assert texts["old.txt"].text == "Café"


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(NotFoundError, match="no file or folder") as error:
        read_documents(tmp_path / "none")
    assert type(error.value) is NotFoundError  # no model is missing
    with pytest.raises(InvalidInputError, match="holds no document"):
        read_documents(tmp_path)
    (tmp_path / "x.docx").write_bytes(b"")
    with pytest.raises(InvalidInputError, match="not one of the types"):
        read_documents(tmp_path / "x.docx")
    (tmp_path / "x.pdf").write_bytes(b"not a pdf")
    with pytest.raises(InvalidInputError, match="could not be read as PDF"):
        read_documents(tmp_path / "x.pdf")
    (tmp_path / "empty.txt").write_text(" \n ")
    with pytest.raises(InvalidInputError, match="holds no text"):
        index_documents(tmp_path / "empty.txt", HashEmbedder())


@pytest.mark.parametrize(("words", "overlap"), [(10, 0), (10, 3), (7, 6), (1, 0)])
def test_passages_hold_all_words_in_order_within_the_limit(words, overlap):
    text = "One two three. Four five! " + " ".join(f"w{i}" for i in range(40)) + ". The end comes now."
    passages = split_passages(Document(text, "T", "f.txt"), words, overlap)
    assert all(len(p.text.split()) <= words for p in passages)
    kept = []
    for p in passages:
        own = p.text.split()
        shared = next(n for n in range(len(own), -1, -1) if n == 0 or kept[-n:] == own[:n])
        kept += own[shared:]
    assert kept == text.split()
    assert len({p.id for p in passages}) == len(passages)


def test_passages_end_at_sentences_where_they_can():
    text = "Aa bb cc dd. Ee ff gg hh ii jj. Kk ll."
    assert [p.text for p in split_passages(Document(text, "T", "f"), 8)] == [
        "Aa bb cc dd.",
        "Ee ff gg hh ii jj. Kk ll.",
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("今天天气很好。我们去公园玩！“真的下雨吗？”", ["今天天气很好。", "我们去公园玩！", "“真的下雨吗？”"]),
        ("これはペンです。それは本です。", ["これはペンです。", "それは本です。"]),
        ("圧力は２．５です．次の文。", ["圧力は２．５です．", "次の文。"]),
        ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("هل هذا سؤال؟ نعم.", ["هل هذا سؤال؟", "نعم."]),
        ("안녕하세요 세계. 오늘은 맑다.", ["안녕하세요 세계.", "오늘은 맑다."]),
        ('He said "Fine." Then 3.14 came.', ['He said "Fine."', "Then 3.14 came."]),
    ],
)
def test_sentences_of_any_script_end_passages(text, sentences):
    longest = max(len(split_passages(Document(s, "T", "f"), 1)) for s in sentences)
    assert [p.text for p in split_passages(Document(text, "T", "f"), longest)] == sentences


@pytest.mark.parametrize(
    ("sentence", "longest"),
    [
        ("今天天气很好我们去公园玩。", 120),
        ("今天天气很好我们去公园玩", 100),  # no sentence ends
        ("これはペンですそれは本です", 100),
        ("สวัสดีชาวโลกวันนี้อากาศดีมาก", 600),
        ("ຂ້ອຍຮັກເຈົ້າ", 600),
        ("QUJDREVGR0hJSktM", 2000),  # encoded data
        ("https://example.org/a/b", 2000),
        ("👩‍👩‍👧‍👦", 700),
    ],
)
def test_text_without_spaces_is_cut_and_nothing_of_it_is_lost(sentence, longest):
    text = sentence * (7000 // len(sentence))
    passages = split_passages(Document(text, "T", "f"))
    assert len(passages) > 2 and max(len(p.text) for p in passages) <= longest
    assert "".join(p.text for p in passages) == text


def test_a_long_word_is_not_cut_where_it_fits_into_the_next_passage():
    text = "one two three " + "Donaudampfschifffahrtsgesellschaftskapitän" + " four"
    assert [p.text for p in split_passages(Document(text, "T", "f"), 4)] == [
        "one two three",
        "Donaudampfschifffahrtsgesellschaftskapitän four",
    ]
    overlapping = split_passages(Document(text * 3, "T", "f"), 4, overlap=3)
    assert all(len(p.text.split()) <= 4 for p in overlapping)
    assert sum("Donaudampfschifffahrtsgesellschaftskapitän" in p.text for p in overlapping) >= 3


@pytest.mark.slow
def test_a_real_index_finds_the_passage_that_answers(minilm, questions):
    index = PassageIndex(minilm)
    index.add(p for q in questions for p in q.passages)
    found = 0
    for q in questions:
        results = index.search(q.question, 10)
        assert [p.score for p in results] == sorted((p.score for p in results), reverse=True)
        assert results[0].embedding.shape == (minilm.dimension,)
        found += any(q.passages[i].text in [p.text for p in results] for i in q.gold)
    assert found >= sum(bool(q.gold) for q in questions) - 1


def test_an_index_comes_back_as_it_was_saved(tmp_path):
    index = PassageIndex(HashEmbedder())
    index.add([Passage(f"text {i}", title="T", id=str(i), metadata={"n": i}) for i in range(30)] + [Passage(" ")])
    index.save(tmp_path / "index")
    loaded = PassageIndex.load(tmp_path / "index", HashEmbedder())
    assert loaded.passages == index.passages and len(loaded) == 30
    ours, theirs = index.search("text 7", 5), loaded.search("text 7", 5)
    assert ours == theirs and [p.score for p in ours] == [p.score for p in theirs]
    assert theirs[0].metadata == ours[0].metadata
    index.save(tmp_path / "index")  # again, over the old one
    assert not [f for f in (tmp_path / "index").iterdir() if f.suffix in (".pkl", ".pickle")]


def test_a_damaged_or_foreign_index_is_refused(tmp_path):
    index = PassageIndex(HashEmbedder())
    with pytest.raises(InvalidInputError, match="index is empty"):
        index.save(tmp_path / "index")
    index.add([Passage("a"), Passage("b")])
    where = tmp_path / "index"
    index.save(where)
    with pytest.raises(InvalidInputError, match="16 dimensions, hash has 8"):
        PassageIndex.load(where, HashEmbedder(8))
    with pytest.raises(NotFoundError, match="no index at") as error:
        PassageIndex.load(tmp_path / "none", HashEmbedder())
    assert type(error.value) is NotFoundError
    marker, passages, vectors = (next(where.glob(name)) for name in ("*.json", "passages-*", "vectors-*"))
    facts, whole = json.loads(marker.read_text()), vectors.read_bytes()
    passages.write_text(passages.read_text().splitlines()[0] + "\n")
    with pytest.raises(InvalidInputError, match=rf"is damaged: {passages.name} has changed"):
        PassageIndex.load(where, HashEmbedder())
    files = facts["files"] | {passages.name: hashlib.sha256(passages.read_bytes()).hexdigest()}
    marker.write_text(json.dumps(facts | {"files": files}))
    with pytest.raises(InvalidInputError, match="2 vectors for 1 passages"):
        PassageIndex.load(where, HashEmbedder())
    for damaged in (b"junk", b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        vectors.write_bytes(damaged)
        with pytest.raises(InvalidInputError, match="is damaged"):
            PassageIndex.load(where, HashEmbedder())
    for content, message in [
        (facts | {"version": 99}, "version 99"),
        (facts | {"files": {"../secret": "0"}}, "is damaged"),
        ({"format": facts["format"], "version": facts["version"]}, "is damaged"),
        ([], "is damaged"),
    ]:
        marker.write_text(json.dumps(content))
        with pytest.raises(InvalidInputError, match=message):
            PassageIndex.load(where, HashEmbedder())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(InvalidInputError, match="holds other files"):
        index.save(tmp_path / "other")
    assert (tmp_path / "other" / "precious.txt").exists()


def index_of(*texts, metadata=None):
    index = PassageIndex(HashEmbedder())
    index.add([Passage(text, metadata=metadata or {}) for text in texts])
    return index


@pytest.mark.parametrize("name", ["index.json", "specrag-index.json"])
def test_a_folder_with_somebody_elses_file_of_an_indexs_name_is_left_alone(tmp_path, name):
    theirs = {name: '{"name": "a web project", "version": 2}', "passages.jsonl": "{}", "vectors.faiss": "x"}
    for file, text in theirs.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(InvalidInputError, match="holds other files, and no index of specrag: give a new folder"):
        index_of("a").save(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == theirs
    assert not PassageIndex.is_saved_at(tmp_path)


def test_a_new_index_replaces_the_old_one_and_leaves_what_else_is_in_its_folder(tmp_path):
    index_of("old").save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "passages-of-mine.jsonl").write_text("mine too")
    index_of("new").save(tmp_path)
    assert [p.text for p in PassageIndex.load(tmp_path, HashEmbedder()).passages] == ["new"]
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) == 5 and names[0] == "notes.txt" and "passages-of-mine.jsonl" in names


def test_an_index_is_not_saved_onto_a_file(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(InvalidInputError, match="is a file: give a folder"):
        index_of("a").save(file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, float("inf"), b"bytes", np.arange(2)], ids=["object", "set", "inf", "bytes", "array"]
)
def test_metadata_that_json_cannot_hold_is_refused_before_embedding(value):
    index = PassageIndex(HashEmbedder())
    good, bad = Passage("a", metadata={"page": 1}), Passage("b", id="b.txt#0", metadata={"tags": [value]})
    with pytest.raises(InvalidInputError, match=r"passages\[1\] \(b.txt#0\): JSON cannot hold its metadata"):
        index.add([good, bad])
    assert len(index) == 0 and index.embedder.calls == 0


def test_metadata_are_the_same_before_and_after_saving(tmp_path):
    index = index_of("a", metadata={"box": (1, 2), 3: "three"})
    index.save(tmp_path / "index")
    loaded = PassageIndex.load(tmp_path / "index", HashEmbedder())
    assert index.passages[0].metadata == loaded.passages[0].metadata == {"box": [1, 2], "3": "three"}


def test_what_a_table_leaves_empty_is_missing_in_saved_metadata(tmp_path):
    """A row of pandas has NaN there, and numbers of numpy elsewhere."""
    row = {"year": np.int64(1889), "height": np.float32(0.5), "architect": math.nan, "tags": ["a", np.float64("nan")]}
    index = index_of("a", metadata=row)
    index.save(tmp_path / "index")
    loaded = PassageIndex.load(tmp_path / "index", HashEmbedder())
    expected = {"year": 1889, "height": 0.5, "architect": None, "tags": ["a", None]}
    assert index.passages[0].metadata == loaded.passages[0].metadata == expected


def test_another_embedder_with_as_many_dimensions_is_noticed(tmp_path):
    class Other(HashEmbedder):
        name = "other"

        def embed(self, texts):
            return super().embed([text + "!" for text in texts])

    index_of("a", "b").save(tmp_path / "index")
    with pytest.raises(InvalidInputError, match="made by hash, and other gives other vectors: use the same embedder"):
        PassageIndex.load(tmp_path / "index", Other())


def test_anything_that_is_a_passage_is_indexed():
    index = PassageIndex(HashEmbedder())
    index.add(["a", {"text": "b", "title": "T"}])
    assert [p.text for p in index.passages] == ["a", "b"]
    with pytest.raises(InvalidInputError, match=r"passages\[0\]: a passage is a Passage, a string"):
        index.add([3])


def test_bad_searches_are_refused():
    index = PassageIndex(HashEmbedder())
    assert index.search("q") == []
    index.add([Passage("a")])
    assert len(index.search("q", 100)) == 1
    with pytest.raises(InvalidInputError, match="question is empty"):
        index.search(" ")
    with pytest.raises(InvalidInputError, match="count must be"):
        index.search("q", 0)


@pytest.mark.slow
def test_a_hundred_thousand_passages_fit_in_memory_with_progress(tmp_path):
    class Quick(HashEmbedder):
        def embed(self, texts):
            vectors = np.full((len(texts), 384), 0.01, dtype=np.float32)
            for i, text in enumerate(texts):
                vectors[i, hash(text) % 384] += 1
            return vectors

    words = "some words of a passage that is about as long as one of Wikipedia usually is " * 5
    index, seen = PassageIndex(Quick()), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index.add(
        (Passage(f"{i} {words}") for i in range(100_000)), progress=lambda done, total: seen.append((done, total))
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    vectors, texts = 100_000 * 384 * 4 / 2**20, 100_000 * len(words) / 2**20
    assert grown < 3 * (vectors + texts)
    assert seen[-1] == (100_000, 100_000) and len(seen) > 100
    assert len(index.search("777", 10)) == 10


def test_the_embedders_batches_change_nothing_but_time(minilm, questions, monkeypatch):
    texts = [passage.text for question in questions[:2] for passage in question.passages]
    assert minilm.batch_size < len(texts)
    expected = minilm.embed(texts)
    monkeypatch.setattr(minilm, "batch_size", 3)
    assert np.abs(minilm.embed(texts) - expected).max() < 1e-5
    for size in (0, -1):
        with pytest.raises(InvalidInputError, match="batch_size must be at least 1"):
            TransformersEmbedder(located("minilm"), batch_size=size)
