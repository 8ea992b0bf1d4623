"""The built package: what `pip install specrag` brings works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import specrag

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = (
    "specrag/_page/elements.js",
    "specrag/_page/example.js",
    "specrag/_page/page.css",
    "specrag/_page/page.html",
    "specrag/_page/page.js",
    "specrag/_page/table.js",
    "specrag/data/demo.jsonl",
    "specrag/data/calibrations/minilm-reader.json",
    "specrag/data/calibrations/smollm2-rag-drafter.json",
    "specrag/data/minilm-reader/reader.json",
    "specrag/data/minilm-reader/reader.safetensors",
    "specrag/data/mpnet-reader/adapter_config.json",
    "specrag/data/mpnet-reader/adapter_model.safetensors",
    "specrag/data/mpnet-reader/reader.json",
    "specrag/data/mpnet-reader/reader.safetensors",
    "specrag/data/smollm2-rag-drafter/adapter_config.json",
    "specrag/data/smollm2-rag-drafter/adapter_model.safetensors",
    "specrag/data/smollm2-rag-drafter/prompts.json",
    *(
        f"specrag/engine/native/{name}.{suffix}"
        for name in ("attention", "decoder", "kernels", "pack", "plain", "pool", "products")
        for suffix in "ch"
    ),
    "specrag/engine/native/blocks.h",
    "specrag/engine/native/exports.c",
    "specrag/engine/native/simd.h",
)


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints. It sees neither the tree nor the variables that point to it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the source distribution and the wheel made from it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The scripts' folder of an environment with the wheel, which borrows all other packages from this one.

    A .pth file adds this environment's packages. Those .pth files among them that make the tree importable, as an
    editable install does, are not read again.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", vars=paths))
    wheel = next(built.glob("*.whl"))
    options = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", *options, wheel, cwd=folder)
    return scripts


def test_the_wheel_and_the_source_hold_what_they_should(built):
    name = f"specrag-{specrag.__version__}"
    with zipfile.ZipFile(built / f"{name}-py3-none-any.whl") as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(f"{name}.dist-info/METADATA").decode()
    assert {*DATA, f"{name}.dist-info/licenses/LICENSE"} <= files
    packages = ("specrag", "langchain_specrag", "llamaindex_specrag")
    assert {f"{package}/py.typed" for package in packages} <= files
    assert {file.split("/")[0] for file in files} == {*packages, f"{name}.dist-info"}
    assert f"Version: {specrag.__version__}" in metadata and "Project-URL: Changelog" in metadata
    with tarfile.open(built / f"{name}.tar.gz") as source:
        kept = set(source.getnames())
    for file in ("Makefile", "pyproject.toml", "tests/test_wheel.py", "docs/index.md", "core/specrag/data/demo.jsonl"):
        assert f"{name}/{file}" in kept
    assert not any("__pycache__" in file or "/.venv" in file for file in files | kept)


def test_all_three_packages_are_imported_from_the_wheel(installed, tmp_path):
    code = (
        "import specrag, langchain_specrag, llamaindex_specrag\n"
        "from importlib.metadata import distribution\n"
        "for module in (specrag, langchain_specrag, llamaindex_specrag):\n"
        "    print(module.__file__)\n"
        "    assert all(getattr(module, name) is not None for name in module.__all__)\n"
        "print(distribution('specrag').version)\n"
    )
    *homes, version = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert len(homes) == 3 and all(Path(home).is_relative_to(installed.parent) for home in homes), homes
    assert version == specrag.__version__


def test_the_installed_command_says_its_version_and_answers_a_question(installed, tmp_path):
    assert run(installed / "specrag", "--version", cwd=tmp_path).split() == ["specrag", specrag.__version__]
    shown = run(installed / "specrag", "demo", "--questions", "1", cwd=tmp_path)
    assert "expected:" in shown and "of 1 right" in shown
