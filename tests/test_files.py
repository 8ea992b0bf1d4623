"""Files that appear whole or stay as they were: after a kill, with two writers, on a full disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from specrag import _files
from specrag.errors import InvalidInputError, SpecRAGError
from specrag.retrieval import PassageIndex
from specrag.schema import Passage
from tests.fakes import HashEmbedder
from tests.kills import kill_index, killed


def replace(target: Path, text: str, then=lambda: None) -> None:
    with _files.replacing(target) as part:
        part.write_text(text)
        then()


def test_a_file_or_a_folder_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("old", "new"):
        replace(tmp_path / "file", text)
    for _ in range(2):
        with _files.replacing(tmp_path / "folder") as part:
            part.mkdir()
    with _files.replacing(tmp_path / "a" / "b" / "deep") as part:
        part.write_text("made with its folders")
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a", "file", "folder"] and os.listdir(tmp_path / "a" / "b") == ["deep"]


def test_an_error_while_writing_leaves_the_old_one(tmp_path):
    def fail():
        raise KeyboardInterrupt

    replace(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / "file", "new", then=fail)
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    target = tmp_path / "file"
    replace(target, "old")
    assert killed(lambda: replace(target, "new", then=threading.Event().wait), 0.5)
    assert target.read_text() == "old" and len(os.listdir(tmp_path)) == 3
    replace(target, "newest")
    assert target.read_text() == "newest" and os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link_to_what_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    replace(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["nul\0", "~nobody-of-this-name/x"])
def test_what_is_no_path_is_refused(name):
    with pytest.raises(InvalidInputError, match="cannot be used as a path"):
        _files.whole(name)
    with pytest.raises(InvalidInputError, match="cannot be used as a path"):
        PassageIndex.check_target(name)


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    with pytest.raises(InvalidInputError, match="is a folder: give the path of a file"):
        replace(tmp_path / "folder", "text")
    not_empty = pytest.raises(SpecRAGError, match="could not be written: Directory not empty")
    with not_empty, _files.replacing(tmp_path / "folder") as part:
        part.mkdir()
    assert (tmp_path / "folder" / "precious").exists() and os.listdir(tmp_path) == ["folder"]


def in_children(work, count: int) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def test_two_writers_of_one_file_take_turns(tmp_path):
    def work(i: int) -> None:
        for _ in range(50):
            replace(tmp_path / "file", str(i) * 100_000)

    in_children(work, 3)
    assert (tmp_path / "file").read_text() in [str(i) * 100_000 for i in range(3)]
    assert os.listdir(tmp_path) == ["file"]


def test_an_index_is_whole_while_two_processes_write_it_and_one_reads(tmp_path):
    def index_of(size: int) -> PassageIndex:
        index = PassageIndex(HashEmbedder())
        index.add([Passage(f"{size} {i}") for i in range(size)])
        return index

    indexes = [index_of(100), index_of(200)]
    indexes[0].save(tmp_path / "index")

    def work(i: int) -> None:
        for _ in range(25):
            if i < 2:
                indexes[i].save(tmp_path / "index")
            found = PassageIndex.load(tmp_path / "index", HashEmbedder())
            assert {p.text.split()[0] for p in found.passages} == {str(len(found))}

    in_children(work, 3)
    assert len(os.listdir(tmp_path / "index")) == 3


@pytest.mark.slow
def test_a_killed_process_loses_no_index_and_leaves_nothing(tmp_path):
    outcome = kill_index(tmp_path, 20)
    assert outcome.killed == 20 and outcome.dirty > 0
    assert not outcome.lost and not outcome.refused and not outcome.left, outcome


def on_a_full_disk(work) -> None:
    """Run ``work`` in a child that can write 10,000 bytes to a file and no more."""

    def limited(_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(SpecRAGError, match=r"could not be written: (File too large|the disk is full)"):
            work()

    in_children(limited, 1)


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file_and_index(tmp_path):
    replace(tmp_path / "file", "old")
    on_a_full_disk(lambda: replace(tmp_path / "file", "new" * 10_000))
    assert (tmp_path / "file").read_text() == "old"
    texts, vectors = PassageIndex(HashEmbedder()), PassageIndex(HashEmbedder(512))
    texts.add(["word " * 10_000])
    vectors.add(map(str, range(100)))
    for index in (texts, vectors):
        on_a_full_disk(lambda index=index: index.save(tmp_path / "new"))
    assert os.listdir(tmp_path) == ["file"]
    texts.save(tmp_path / "index")
    before = sorted(os.listdir(tmp_path / "index"))
    on_a_full_disk(lambda: vectors.save(tmp_path / "index"))
    assert sorted(os.listdir(tmp_path / "index")) == before
    assert len(PassageIndex.load(tmp_path / "index", HashEmbedder())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SpecRAGError, match="could not be written: Permission denied"):
        replace(tmp_path / "file", "text")


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """A rename would take its place, for every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidInputError, match="is a device, a pipe or a socket"), _files.replacing(pipe) as part:
        part.write_text("x")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and [file.name for file in tmp_path.iterdir()] == ["pipe"]
