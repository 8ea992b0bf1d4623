"""What `specrag serve` serves: its options, checked, and the models that they describe, in this process or on Ray."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag.cli.loading import ModelOptions, load_drafting_model
from specrag.cli.options import check_index, check_there
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Self

    from specrag.models.base import LanguageModel, Reader
    from specrag.models.embedders import Embedder
    from specrag.rapid import RapidGenerator
    from specrag.serving import ApiKeys, Models, ServerSettings
    from specrag.serving.deployments import Deployments
    from specrag.serving.on_ray import Parts
    from specrag.serving.rapid import RapidReplies

KEYS = "SPECRAG_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATHS = ("rapid_datastore", "keys", "calibration", "models")
_LISTS = ("index", "drafter", "server", "verifier_server", "embedder_server")


@dataclass(frozen=True, kw_only=True)
class Served(ModelOptions):
    """The options of `specrag serve` under their names, without those that say where it listens."""

    index: Sequence[str] = ()
    rapid: str | None = None
    rapid_drafter: str | None = None
    rapid_proposer: str = "hybrid"
    rapid_datastore: Path | None = None
    keys: Path | None = None
    drafts: int = 5
    passages_per_draft: int = 2
    top: int = 10
    deadline: float | None = None
    concurrency: int = 4
    queue: int = 32
    max_tokens: int = 1024
    max_upload: int = 32
    drain: float = 30.0
    log_level: str = "info"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Served:
        """The options as a config file has them. One text may stand for a list of one.

        Raises:
            InvalidInputError: One is unknown.
        """
        known = sorted(field.name for field in fields(cls))
        if unknown := [str(name) for name in options if name not in known]:
            raise InvalidInputError(f"unknown options {', '.join(unknown)}: `specrag serve` has {', '.join(known)}")
        given = dict(options)
        for name, value in options.items():
            if isinstance(value, str) and name in (*_PATHS, *_LISTS):
                given[name] = Path(value) if name in _PATHS else (value,)
        return cls(**given)

    def check(self) -> None:
        """Whether it can be served, before a model loads.

        Raises:
            SpecRAGError: A model, an index or a server is not there, or the options do not fit each other.
        """
        if not self.folders and self.rapid is None:
            raise InvalidInputError("nothing to serve: give --index FOLDER, --rapid MODEL, or both")
        self._check_rapid()
        self.check_models()

    @property
    def folders(self) -> dict[str, Path]:
        """The indexes by name: ``NAME=FOLDER``, or a folder under its own name.

        Raises:
            InvalidInputError: A name is taken twice, or has characters that do not belong into one.
            NotFoundError: There is no index.
        """
        found: dict[str, Path] = {}
        for item in self.index:
            name, equals, folder = item.partition("=")
            path = Path(folder if equals else item).expanduser()
            name = name if equals else re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name)
            if not _NAME.fullmatch(name):
                raise InvalidInputError(f"--index {item}: give NAME=FOLDER; a name has letters, digits and . _ -")
            if name in found:
                raise InvalidInputError(f"two indexes are named {name}: give NAME=FOLDER")
            check_index(path)
            found[name] = path
        return found

    def with_whole_paths(self) -> Self:
        whole = super().with_whole_paths()
        return replace(whole, index=tuple(f"{name}={path.absolute()}" for name, path in self.folders.items()))

    def settings(self) -> ServerSettings:
        """The settings of the server; the keys are read.

        Raises:
            InvalidInputError: One is out of range, or the keys cannot be used.
            NotFoundError: There is no file of keys.
        """
        from specrag.serving import ServerSettings

        return ServerSettings(
            load=self.load,
            keys=self._api_keys(),
            concurrency=self.concurrency,
            queue=self.queue,
            top=self.top,
            max_tokens=self.max_tokens,
            max_upload=self.max_upload << 20,
            drain=self.drain,
        )

    def load(self) -> Models:
        """All models in this process."""
        embedder = self.load_embedder()
        return self._models(embedder, None, self.load_rapid(embedder) if self.rapid is not None else None)

    def load_rapid(self, embedder: Embedder | None = None) -> RapidGenerator:
        """RAPID's models. ``embedder``: by default a new one."""
        from specrag.models import TransformersLM, bundled
        from specrag.rapid import RapidGenerator

        def load(name: str) -> TransformersLM:
            return bundled("smollm2", folder=self.models) if name == "smollm2" else TransformersLM(name)

        assert self.rapid is not None  # checked before
        drafter = load(self.rapid_drafter) if self.rapid_drafter is not None else None
        return RapidGenerator(
            load(self.rapid),
            drafter,
            embedder=embedder or self.load_embedder(),
            proposer=self.rapid_proposer,
            datastore=self.rapid_datastore,
        )

    def _models(
        self,
        embedder: Embedder,
        loaded: tuple[Sequence[LanguageModel | Reader], LanguageModel | Reader | None] | None,
        rapid: RapidGenerator | RapidReplies | None,
    ) -> Models:
        from specrag.retrieval import PassageIndex
        from specrag.serving import Models

        indexes = {name: PassageIndex.load(folder, embedder) for name, folder in self.folders.items()}
        if not indexes:
            return Models(rapid=rapid, embedder=embedder)
        rag = self.load_pipeline(
            loaded=loaded,
            embedder=embedder,
            deadline=self.deadline,
            drafts=self.drafts,
            passages_per_draft=self.passages_per_draft,
        )
        return Models(rag=rag, indexes=indexes, rapid=rapid, embedder=embedder)

    def _api_keys(self) -> ApiKeys | None:
        """The keys of the file or the environment, if any."""
        from specrag.serving import ApiKeys

        if self.keys is not None:
            return ApiKeys.read(self.keys)
        written = os.environ.get(KEYS)
        return ApiKeys(written.replace(",", "\n").splitlines()) if written else None

    def _check_rapid(self) -> None:
        proposer, datastore = self.rapid_proposer, self.rapid_datastore
        if self.rapid is None and (self.rapid_drafter is not None or datastore is not None or proposer != "hybrid"):
            raise InvalidInputError("--rapid-drafter, --rapid-proposer and --rapid-datastore need --rapid MODEL")
        if proposer == "rest" and datastore is None:
            raise InvalidInputError("--rapid-proposer rest looks up a datastore: give --rapid-datastore FOLDER")
        if datastore is not None:
            if proposer != "rest":
                raise InvalidInputError(f"--rapid-proposer {proposer} looks up no datastore: give rest")
            check_there(datastore)


@dataclass(frozen=True)
class OnRay:
    """The same on Ray Serve: which deployments there are, and what each of them loads.

    Args:
        served: The options.
    """

    served: Served

    def __post_init__(self) -> None:
        object.__setattr__(self, "served", self.served.with_whole_paths())  # Ray's processes have their own folders

    @property
    def names(self) -> list[str]:
        """The deployments."""
        from specrag.serving.deployments import RAPID, SERVER

        return [SERVER, *self._loaders(), *([RAPID] if self.served.rapid is not None else [])]

    def check(self, given: Deployments) -> None:
        """Whether ``given`` are settings of these deployments.

        Raises:
            InvalidInputError: See ``deployments.checked`` and ``deployments.check_one_server``.
        """
        from specrag.serving.deployments import check_one_server, checked

        checked(given, self.names)
        if self.served.rapid is not None:
            check_one_server(given)

    def parts(self) -> Parts:
        """What the deployments run."""
        from specrag.serving.on_ray import Parts

        served = self.served
        settings = served.settings()
        if settings.keys is not None:
            settings.keys.check_indexes(list(served.folders))
        rapid = served.load_rapid if served.rapid is not None else None
        return Parts(models=self._loaders(), rapid=rapid, load=self.load, settings=settings, log_level=served.log_level)

    def load(self, remote: Mapping[str, LanguageModel | Reader], rapid: RapidReplies | None) -> Models:
        """The server's models: those of the deployments, and those on other servers."""
        *drafting, judge = [remote.get(role.deployment) or role.load() for role in self._roles()]
        made = [model for model in drafting if model is not None]
        return self.served._models(self.served.load_embedder(), (made, judge), rapid)

    def _loaders(self) -> dict[str, Callable[[], Any]]:
        """What loads the model of each deployment. Models on other servers need none."""
        return {role.deployment: role.load for role in self._roles() if role.deployed}

    def _roles(self) -> list[_Role]:
        """The drafters, and last the verifier."""
        from specrag.models.bundled import DEFAULT_DRAFTER
        from specrag.serving.deployments import VERIFIER, drafter_names

        served = self.served
        drafters = served.drafter or (DEFAULT_DRAFTER,)
        roles = [
            _Role(served, deployment, name, served.server)
            for deployment, name in zip(drafter_names(len(drafters)), drafters, strict=True)
        ]
        return [*roles, _Role(served, VERIFIER, served.verifier, served.verifier_server or served.server)]


@dataclass(frozen=True)
class _Role:
    """A drafter or the verifier. ``name``: of the model; ``None``: there is none. ``on``: the servers that have it."""

    served: Served
    deployment: str
    name: str | None
    on: Sequence[str] | None

    @property
    def deployed(self) -> bool:
        """Whether a deployment runs it."""
        from specrag.models.bundled import READERS

        return bool(self.served.index) and self.name is not None and (not self.on or self.name in READERS)

    def load(self) -> LanguageModel | Reader | None:
        if self.name is None:
            return None
        served = self.served
        return load_drafting_model(self.name, served.models, self.on, served.api_key, served.tokenizer)


def application(options: Mapping[str, Any]) -> Any:
    """The deployments for a config file of Ray Serve: ``import_path: specrag.cli.served:application``.

    Args:
        options: The ``args`` of the file: those of `specrag serve`, with underscores.

    Raises:
        SpecRAGError: See ``Served.check``.
    """
    from specrag.serving import on_ray

    served = Served.of(options)
    served.check()
    return on_ray.application(OnRay(served).parts(), {})
