"""Files as people have them: other encodings, web pages, damaged or encrypted PDFs, folders with other things."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from specrag.errors import InvalidInputError
from specrag.retrieval import index_documents, read_documents
from tests.documents import compress, encrypt, make_pdf
from tests.fakes import HashEmbedder

RUSSIAN = "Привет, мир. Это текст о погоде в Москве и о том, как её предсказывают."
JAPANESE = "これは日本語の文章です。天気について書いてあります。"


def read(file, content: bytes) -> tuple[str, list[str]]:
    file.write_bytes(content)
    notes: list[str] = []
    (document,) = read_documents(file, notes=notes)
    return document.text, notes


# --- encodings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_followed_and_not_part_of_the_text(tmp_path, encoding):
    assert read(tmp_path / "a.txt", RUSSIAN.encode(encoding)) == (RUSSIAN, [])


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", RUSSIAN),
        ("koi8_r", RUSSIAN),
        ("cp932", JAPANESE),
        ("cp1253", "Καλημέρα κόσμε, αυτό είναι ένα κείμενο για τον καιρό."),
        ("cp1252", "Où est l’hôtel ? Le garçon a mangé une crêpe à l'œuf."),
        ("utf-16-le", "Written on Windows, " + RUSSIAN),
        ("utf-16-be", "Written elsewhere, " + RUSSIAN),
    ],
)
def test_other_encodings_are_guessed_and_the_guess_is_told(tmp_path, encoding, text):
    file = tmp_path / "a.txt"
    assert read(file, text.encode(encoding)) == (text, [f"{file}: its encoding was guessed: {encoding}"])


def test_text_of_seven_bits_with_escapes_is_no_utf8(tmp_path):
    assert read(tmp_path / "a.txt", JAPANESE.encode("iso2022_jp")) == (JAPANESE, [])


def test_damaged_places_in_utf8_cost_these_places_alone(tmp_path):
    file, (first, second) = tmp_path / "a.txt", RUSSIAN.encode().split(b" ", 1)
    text, notes = read(file, first + b" \xff" + second)
    assert text == RUSSIAN.replace(" ", " \ufffd", 1)
    assert notes == [f"{file}: 1 damaged places in UTF-8 were replaced"]
    cut = RUSSIAN.encode("utf-16")[:-1]
    text, notes = read(file, cut)
    assert text == RUSSIAN[:-1] + "\ufffd" and "1 of its characters are damaged" in notes[0]


def test_binary_data_under_a_name_of_text_is_refused(tmp_path):
    for content in (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 10, bytes(range(256)) * 4):
        with pytest.raises(InvalidInputError, match=r"a.txt is no text, but binary data"):
            read(tmp_path / "a.txt", content)
    assert read(tmp_path / "a.txt", b"one\0" + b" word" * 100)[0] == "one" + " word" * 100


@pytest.mark.parametrize(
    ("encoding", "declaration"),
    [
        ("cp1251", '<meta charset="windows-1251">'),
        ("koi8_r", '<meta http-equiv="Content-Type" content="text/html; charset=KOI8-R">'),
        ("cp866", '<?xml version="1.0" encoding="cp866"?>'),
        ("utf-8", '<meta charset="windows-1251">'),  # a server made it UTF-8 and left the declaration
        ("utf-8", '<meta charset="no-such-thing">'),
        ("utf-16", '<meta charset="utf-8">'),  # the mark is right
    ],
)
def test_a_page_is_read_in_the_encoding_that_it_declares(tmp_path, encoding, declaration):
    page = f"{declaration}<title>Погода</title><p>Да</p>"
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    notes: list[str] = []
    (document,) = read_documents(tmp_path / "a.html", notes=notes)
    assert (document.title, document.text, notes) == ("Погода", "Да", [])


# --- web pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>H<sub>2</sub>O</p>", "H2O"),
        ("w<b>ord</b>", "word"),
        ("one<br>two<p>three</p>four", "one\ntwo\n\nthree\n\nfour"),
        ("<ul><li>one<li>two</ul>", "one\n\ntwo"),
        ("<table><tr><td>Height<td>3,120 m</tr><tr><td>Name<td>Alba</tr></table>", "Height 3,120 m\n\nName Alba"),
        ("a line\nthat goes\n\non", "a line that goes on"),
        ("<pre>one\ntwo</pre>", "one\ntwo"),
        ("<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp>字<rt>ji</rt></ruby>", "漢字"),
        ("hyphen&shy;ated", "hyphenated"),
        ("<!-- hidden --><script>var x</script>shown", "shown"),
        ("<div>" * 3000 + "deep", "deep"),
    ],
)
def test_a_page_has_line_breaks_where_a_browser_has_them(tmp_path, page, text):
    assert read(tmp_path / "a.html", page.encode()) == (text, [])


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>secret</p>",
        '<div hidden="hidden"><p>secret</p></div>',
        '<span style="display:none">secret</span>',
        '<span style="color: red; Display : NONE !important;">secret</span>',
        '<div style="visibility: hidden">secret</div>',
        '<input type="hidden" value="secret">',
    ],
)
def test_text_that_a_page_hides_is_not_indexed(tmp_path, hidden):
    assert read(tmp_path / "a.html", f"<p>shown{hidden}</p>".encode()) == ("shown", [])


@pytest.mark.parametrize(
    "page",
    [
        '<p hidden="until-found">shown</p>',
        '<p style="display: block">shown</p>',
        '<p style="background: url(display:none)">shown</p>',
        '<body style="display:none"><p>shown</p></body>',  # a script shows the page when it is complete
        '<p data-hidden class="hidden" aria-hidden="true">shown</p>',
    ],
)
def test_text_that_a_page_shows_is_indexed(tmp_path, page):
    assert read(tmp_path / "a.html", page.encode()) == ("shown", [])


def test_the_name_of_a_drawing_is_not_the_pages_title(tmp_path):
    drawing = "<svg><title>icon</title></svg>"
    for page, title in ((f"{drawing}<p>text", "a"), (f"{drawing}<title>Alba</title><p>text", "Alba")):
        (tmp_path / "a.html").write_text(page)
        assert [document.title for document in read_documents(tmp_path / "a.html")] == [title]


# --- PDF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_a_pdf_that_everybody_may_read_is_read_though_it_is_encrypted(tmp_path, algorithm):
    make_pdf(tmp_path / "plain.pdf", "About Einstein.")
    encrypt(tmp_path / "plain.pdf", tmp_path / "a.pdf", "", algorithm)
    (document,) = read_documents(tmp_path / "a.pdf")
    assert "About Einstein." in document.text
    encrypt(tmp_path / "plain.pdf", tmp_path / "b.pdf", "secret", algorithm)
    with pytest.raises(InvalidInputError, match=r"b.pdf could not be read as PDF: it is encrypted with a password"):
        read_documents(tmp_path / "b.pdf")


def swap_names(content: bytes, draw) -> bytes:
    """``content`` with one of its names, references or brackets in the place of another."""
    tokens = list(re.finditer(rb"/[A-Za-z]+|\d+ 0 R|<<|>>|\[|\]", content))
    one, other = (tokens[draw.integers(len(tokens))] for _ in range(2))
    return content[: one.start()] + other[0] + content[one.end() :]


def flip_bits(content: bytes, draw) -> bytes:
    damaged = bytearray(content)
    for at in draw.integers(0, len(damaged), 3):
        damaged[at] ^= 1 << draw.integers(8)
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage", [swap_names, flip_bits, lambda content, draw: content[: draw.integers(len(content))]]
)
@pytest.mark.parametrize("form", ["plain", "compressed", "encrypted"])
def test_damaged_pdfs_are_read_or_refused_in_one_line(tmp_path, form, damage):
    file, draw = tmp_path / "a.pdf", np.random.default_rng(0)
    make_pdf(file, "About Einstein.", "About Curie.")
    if form == "compressed":
        compress(file, file)
    if form == "encrypted":
        encrypt(file, file, "", "RC4-128")
    whole, refused = file.read_bytes(), 0
    for _ in range(150):
        file.write_bytes(damage(whole, draw))
        try:
            read_documents(file, notes=[])
        except InvalidInputError as error:
            assert "could not be read as PDF: " in str(error)
            refused += 1
    assert refused > 5


def test_pages_without_text_are_named_and_a_pdf_of_them_is_refused(tmp_path):
    make_pdf(tmp_path / "a.pdf", "About Einstein.", "", "About Curie.", "")
    notes: list[str] = []
    found = read_documents(tmp_path / "a.pdf", notes=notes)
    assert [document.page for document in found] == [1, 3]
    assert notes == [f"{tmp_path / 'a.pdf'}: of 4 pages, 2 without text, scanned or empty: 2, 4"]
    make_pdf(tmp_path / "b.pdf", "", "")
    with pytest.raises(InvalidInputError, match="it holds no text: its pages are scanned, or empty"):
        read_documents(tmp_path / "b.pdf")


# --- folders --------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """A folder with a good file and three bad ones."""
    (tmp_path / "good.txt").write_text("Mount Alba is high.")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing")
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere.md")
    return tmp_path


def test_files_that_cannot_be_read_are_named_once_at_the_end_and_the_others_are_indexed(mixed):
    notes: list[str] = []
    index = index_documents(mixed, HashEmbedder(), notes=notes)
    assert [p.text for p in index.passages] == ["Mount Alba is high."]
    assert len(notes) == 3 and all(note.startswith(f"left out: {mixed}") for note in notes)
    for name, note in zip(("binary.txt", "broken.pdf", "gone.md"), notes, strict=True):
        assert name in note
    with pytest.warns(UserWarning, match=r"left out: .*binary.txt(.|\n)*left out: .*broken.pdf"):
        read_documents(mixed)


def test_strict_stops_at_files_that_cannot_be_read_and_names_them_all(mixed):
    with pytest.raises(InvalidInputError, match=r"3 of 4 files could not be read:\n(.|\n)*binary.txt(.|\n)*gone.md"):
        read_documents(mixed, strict=True)
    (mixed / "good.txt").unlink()
    with pytest.raises(InvalidInputError, match="3 of 3 files could not be read"):
        read_documents(mixed)


def test_hidden_folders_and_installed_packages_are_left_out_unless_asked_for(tmp_path):
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "node_modules/c/d.md", "docs/.cache/e.txt", "docs/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.text for document in read_documents(tmp_path)] == ["a.txt", "docs/f.txt"]
    assert len(read_documents(tmp_path, hidden=True)) == 6
    # What is named is read, wherever it lies.
    assert [document.text for document in read_documents(tmp_path / ".git")] == [".git/b.txt"]
    assert [document.text for document in read_documents(tmp_path / ".hidden.txt")] == [".hidden.txt"]


def test_a_pipe_with_the_name_of_a_document_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("text")
    assert [document.text for document in read_documents(tmp_path)] == ["text"]
    with pytest.raises(InvalidInputError, match="is a pipe or a device"):
        read_documents(tmp_path / "pipe.txt")
