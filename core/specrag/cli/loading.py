"""Models and pipelines as the options of a command describe them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrag import _blocking
from specrag._extras import require
from specrag.cli.console import show_notes
from specrag.cli.options import Statement
from specrag.errors import InvalidInputError

if TYPE_CHECKING:
    from typing_extensions import Self

    from specrag.models.base import LanguageModel, Reader
    from specrag.models.embedders import Embedder
    from specrag.models.transformers import TransformersLM
    from specrag.speculative.pipeline import SpeculativeRAG

# Options that name a model or a tokenizer, of each command that inherits them here.
_NAMES = ("drafter", "verifier", "embedder", "tokenizer", "rapid", "rapid_drafter")


def check_servers(*servers: Sequence[str] | None) -> None:
    """Raise ServerError where nobody listens at any URL of one of ``servers``, before models load."""
    for urls in filter(None, servers):
        from specrag.models._servers import ServerPool

        _blocking.run(ServerPool(list(urls), "").check())


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options of a command that name its models, and what they describe.

    Attributes:
        drafter: Names of the drafters; without any, the default one drafts.
        verifier: Its name; without it, the first drafter that is a language model verifies.
        server, verifier_server: URLs of the servers. Those of the verifier are by default the drafters'.
        tokenizer: Of the models on the servers.
        embedder: Its name; without it, the bundled one.
        embedder_server: URLs of the servers that embed.
        api_key: For all servers.
        calibration: A file of ``specrag calibrate``.
        min_confidence, escalate, escalate_below: Settings of ``SpeculativeRAG``; ``None`` leaves the default.
        models: Where the bundled models are.
    """

    drafter: Sequence[str] | None = None
    verifier: str | None = None
    server: Sequence[str] | None = None
    verifier_server: Sequence[str] | None = None
    tokenizer: str | None = None
    embedder: str | None = None
    embedder_server: Sequence[str] | None = None
    api_key: str | None = field(default=None, repr=False)
    calibration: Path | None = None
    min_confidence: float | None = None
    escalate: str | None = None
    escalate_below: float | None = None
    models: Path | None = None

    def with_whole_paths(self) -> Self:
        """The same, for processes with another working folder: every path to something here is absolute."""
        from specrag.models.bundled import DRAFTING, EMBEDDERS

        def whole(name: str, on_server: bool) -> str:
            if not name or name in DRAFTING or name in EMBEDDERS:
                return name
            try:
                path = Path(name).expanduser()
                here = _is_reader(path) if on_server else path.exists()  # a reader is never on a server
            except (OSError, RuntimeError):  # too long for a path, or nobody's home folder
                return name
            return str(path.absolute()) if here else name

        on_servers = {"drafter": self.server, "verifier": self._judging, "embedder": self.embedder_server}
        changed: dict[str, Any] = {}
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Path):
                changed[name] = value.expanduser().absolute()
            elif name in _NAMES and value is not None:
                on = bool(on_servers.get(name))
                changed[name] = whole(value, on) if isinstance(value, str) else tuple(whole(one, on) for one in value)
        return replace(self, **changed)

    def check_models(self) -> None:
        """Check that there can be models of these names, on servers or here, before any of them loads.

        Raises:
            MissingExtraError: The embedder runs in this process, and the extra ``local`` is not installed.
            ServerError: Nobody listens at any URL of one of the options with servers.
            InvalidInputError: A name is empty, or that of a bundled model of another kind; no model has a use for the
                tokenizer; or the file of the calibration is damaged.
            ModelNotFoundError: A name is mistyped, or there is no such model here and no network.
            NotFoundError: There is no file of the calibration.
        """
        from specrag.models._loading import source_of
        from specrag.models.bundled import DRAFTING, EMBEDDERS

        _check_named(self.drafter, self.server, "--drafter")
        _check_named(self.verifier, self.verifier_server, "--verifier")
        _check_named(self.embedder, self.embedder_server, "--embedder")
        self._check_tokenizer()
        if self.calibration is not None:
            from specrag.speculative.confidence import Calibration

            Calibration.load(self.calibration)
        if not self.embedder_server:
            known = self.embedder and self.embedder not in EMBEDDERS
            _require_torch("TransformersEmbedder" if known else "the bundled embedder")
        check_servers(self.server, self.verifier_server, self.embedder_server)
        no_drafter, no_verifier = "is an embedder and makes no drafts", "is an embedder and scores no drafts"
        for role, names, on, fitting, wrong in (
            ("drafter", self.drafter or (), self.server, DRAFTING, no_drafter),
            ("verifier", _one(self.verifier), self._judging, DRAFTING, no_verifier),
            ("embedder", _one(self.embedder), self.embedder_server, list(EMBEDDERS), "is no embedder"),
        ):
            if on:
                continue
            for name in names:
                _check_bundled(name, fitting, wrong)
                if name not in fitting:
                    source_of(name, role)

    def load_embedder(self) -> Embedder:
        """The embedder: on its servers when there are any, else a local one."""
        if self.embedder_server:
            _check_named(self.embedder, self.embedder_server, "--embedder")
            from specrag.models import OpenAIEmbedder

            return OpenAIEmbedder(list(self.embedder_server), self.embedder or "", self.api_key)
        from specrag.models import TransformersEmbedder, bundled
        from specrag.models.bundled import EMBEDDERS

        if self.embedder is None or self.embedder in EMBEDDERS:
            _require_torch("the bundled embedder")
            return bundled(self.embedder or "minilm", folder=self.models)
        _check_bundled(self.embedder, list(EMBEDDERS), "is no embedder")
        return TransformersEmbedder(self.embedder)

    def load_models(self) -> tuple[list[LanguageModel | Reader], LanguageModel | Reader | None]:
        """The drafters and the verifier. A name that both have on the same servers is loaded once."""
        from specrag.models.bundled import DEFAULT_DRAFTER

        loaded: dict[tuple[str, tuple[str, ...]], LanguageModel | Reader] = {}

        def model(name: str, on: Sequence[str] | None) -> LanguageModel | Reader:
            key = name, tuple(on or ())
            if key not in loaded:
                loaded[key] = load_drafting_model(name, self.models, on, self.api_key, self.tokenizer)
            return loaded[key]

        drafting = [model(name, self.server) for name in self.drafter or (DEFAULT_DRAFTER,)]
        return drafting, model(self.verifier, self._judging) if self.verifier else None

    def load_pipeline(
        self,
        *,
        loaded: tuple[Sequence[LanguageModel | Reader], LanguageModel | Reader | None] | None = None,
        **settings: Any,
    ) -> SpeculativeRAG:
        """The pipeline of the drafters and the verifier.

        The default drafter alone abstains below ``DEFAULT_MIN_CONFIDENCE``, where no other confidence is asked for.

        Args:
            loaded: The drafters and the verifier, where they need not be loaded.
            settings: Further ones of ``SpeculativeRAG``; ``None`` leaves the default.
        """
        from specrag.models.bundled import DEFAULT_MIN_CONFIDENCE
        from specrag.speculative.confidence import Calibration
        from specrag.speculative.pipeline import SpeculativeRAG

        settings |= {name: getattr(self, name) for name in ("min_confidence", "escalate", "escalate_below")}
        given = {name: value for name, value in settings.items() if value is not None}
        if self.calibration is not None:
            given["calibration"] = Calibration.load(self.calibration)
        elif not self.drafter and self.verifier is None:
            given.setdefault("min_confidence", DEFAULT_MIN_CONFIDENCE)
        drafting, judge = loaded or self.load_models()
        return SpeculativeRAG(drafter=drafting[0] if len(drafting) == 1 else drafting, verifier=judge, **given)

    def _check_tokenizer(self) -> None:
        """Raise InvalidInputError where a tokenizer is given, and no model is on a server."""
        from specrag.models.bundled import DEFAULT_DRAFTER, READERS

        names = (*(self.drafter or (DEFAULT_DRAFTER,)), *_one(self.verifier))
        if self.tokenizer is not None and (not self._judging or all(name in READERS for name in names)):
            message = "--tokenizer is that of a model on --server: leave it out, a model here has its own"
            raise InvalidInputError(message)

    @property
    def _judging(self) -> Sequence[str] | None:
        """The servers of the verifier."""
        return self.verifier_server or self.server


def load_model(
    name: str,
    server: Sequence[str] | None,
    api_key: str | None = None,
    tokenizer: str | None = None,
    models: Path | None = None,
) -> LanguageModel:
    """The language model ``name``: on the servers when there are any, else a local one (folder, file or hub id).

    Raises:
        InvalidInputError: It is the name of a bundled model that writes nothing.
    """
    if server:
        from specrag.models import OpenAILM

        return OpenAILM(name, list(server), api_key=api_key, tokenizer=tokenizer)
    from specrag.models import TransformersLM, bundled
    from specrag.models.bundled import DRAFTING

    check_generating([name])
    if name in DRAFTING:
        return bundled(name, folder=models)
    # The blocks of a GGUF file are read as they are on a CPU: in a quarter of the memory, and faster.
    return TransformersLM(name, quantization="gguf" if name.endswith(".gguf") and not _gpu_found() else None)


def check_generating(names: Sequence[str]) -> None:
    """Raise InvalidInputError where one of ``names`` is that of a bundled model that writes no text."""
    from specrag.models.bundled import DRAFTING, READERS

    for name in names:
        _check_bundled(name, [one for one in DRAFTING if one not in READERS], "writes nothing")


def load_generating(name: str, models: Path | None = None) -> TransformersLM:
    """The language model ``name``, in this process."""
    from specrag.models import TransformersLM

    model = load_model(name, None, models=models)
    assert isinstance(model, TransformersLM)  # without servers there is no other kind
    return model


def _one(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _require_torch(kind: str) -> None:
    require("torch", "local", kind, otherwise="name one with --embedder and --embedder-server")


def _check_named(name: object, server: Sequence[str] | None, option: str) -> None:
    """Raise InvalidInputError where a server is given without the name of its model."""
    if server and not name:
        of = "--server" if option == "--drafter" else f"{option}-server"
        raise InvalidInputError(f"{of} needs {option}: the model's name on the server")


def _check_bundled(name: str, fitting: Sequence[str], wrong: str) -> None:
    """Raise InvalidInputError where the bundled model ``name`` is not among those that are ``fitting``."""
    from specrag.models._hub import BUNDLED_NAMES

    if name in BUNDLED_NAMES and name not in fitting:
        raise InvalidInputError(f"the bundled model {name!r} {wrong}: give {' or '.join(map(repr, fitting))}")


def note_confidence(rag: SpeculativeRAG) -> None:
    """Say on stderr where a reader drafts, as by default, and the other models cost its answers their confidence."""
    if rag.roles.readers and rag.roles.calibrated is None:
        names, judge = rag.roles.names
        pair = f"{', '.join(names)}, verified by {judge or 'nobody'}"
        show_notes([f"no confidence, and no abstention in doubt: no calibration for {pair} (see `specrag calibrate`)"])


def load_drafting_model(
    name: str, models: Path | None, server: Sequence[str] | None, api_key: str | None, tokenizer: str | None
) -> LanguageModel | Reader:
    """A drafter or verifier: a reader, which is never on a server, or a language model."""
    from specrag.models import bundled
    from specrag.models.bundled import DRAFTING, READERS, drafting_model

    if name in READERS:
        return bundled(name, folder=models)
    if name in DRAFTING and not server:
        # Int8 weights halve the drafting time on a CPU. A GPU does not need them.
        return bundled(name, folder=models, **({} if _gpu_found() else {"quantization": "int8"}))
    if name not in DRAFTING and (reader := drafting_model(name, models=models)) is not None:
        return reader
    if _finds_spans(Path(name).expanduser()):
        from specrag.models import SpanReader

        return SpanReader(name)
    return load_model(name, server, api_key, tokenizer, models)


def _is_reader(folder: Path) -> bool:
    """Whether a span reader is in ``folder``, of specrag or of transformers."""
    from specrag.models.bundled import READER_SETTINGS

    return (folder / READER_SETTINGS).exists() or _finds_spans(folder)


def _finds_spans(folder: Path) -> bool:
    """Whether a question-answering encoder of transformers is in ``folder``."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return any(str(name).endswith("ForQuestionAnswering") for name in config["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _gpu_found() -> bool:
    try:
        import torch
    except ImportError:  # then loading the model says what to install
        return False
    return torch.cuda.is_available()


def with_statement(rag: SpeculativeRAG, statement: Statement) -> SpeculativeRAG:
    """The same pipeline with another self-reflection statement in its prompts."""
    from specrag.speculative.prompts import SELF_REFLECTION_STATEMENTS
    from specrag.speculative.verification import with_self_reflection

    text = SELF_REFLECTION_STATEMENTS[int(statement.value) - 1]
    scoring = with_self_reflection(rag.scoring)
    return rag.replace(prompts=replace(rag.texts, statement=text), scoring=scoring)
