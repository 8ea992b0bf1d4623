"""`specrag serve` on Ray Serve: the same application, with its models in deployments of their own.

``application`` makes the deployments, ``run`` deploys them and waits for a signal to stop. Replicas, routing, batching,
autoscaling and restarts are Ray Serve's. Needs the extra ``ray``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import RayServeException

from specrag.errors import InvalidInputError, SpecRAGError
from specrag.models.base import Completion, LanguageModel, Reader, Score, Turn
from specrag.rapid import RapidChat, RapidGenerator
from specrag.serving.app import create_app
from specrag.serving.deployments import RAPID, SERVER, Deployments
from specrag.serving.logs import configure
from specrag.serving.models import Models
from specrag.serving.rapid import RapidReplies
from specrag.serving.remote import Calls, RemoteRapid, remote_model
from specrag.serving.settings import ServerSettings
from specrag.serving.workers import Call, ModelWorker, RapidWorker

NAME = "specrag"
#: Errors that say that a replica has died.
LOST = (RayActorError, WorkerCrashedError, NodeDiedError)
#: Requests that a replica of a model works on or has waiting; the others wait at the server.
ONGOING = 16
# Requests of one replica of the server. Its own queue refuses those that are too many, with status 429.
_CONNECTIONS = 1024
# Seconds for a call of the server to reach it.
_CONNECT = 5.0
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Exit): ")
# Ray Serve's own logs. The server logs its requests itself.
_LOGS = {"enable_access_log": False, "log_level": "WARNING"}

Model = LanguageModel | Reader


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the deployments run. All of it is sent to other processes.

    Args:
        models: What loads each drafter and the verifier, by the names of their deployments.
        rapid: What loads the models of RAPID; ``None``: it is not served.
        load: Makes the server's models out of those that run in the deployments, by their names, and RAPID.
        settings: Of the server; ``load`` is not used.
        log_level: Of the server.
    """

    models: Mapping[str, Callable[[], Model]] = field(default_factory=dict)
    rapid: Callable[[], RapidGenerator] | None = None
    load: Callable[[Mapping[str, Model], RapidReplies | None], Models]
    settings: ServerSettings
    log_level: str = "info"


class ModelReplica(ModelWorker):
    """A drafter or a verifier. Requests to a language model that come at the same time share a batch."""

    def reconfigure(self, batching: Mapping[str, Any]) -> None:
        """Set the size of batches, and the seconds that one waits to be full: ``deployments.BATCHING``."""
        for batched in (self._generate, self._score):
            if "max_batch_size" in batching:
                batched.set_max_batch_size(batching["max_batch_size"])
            if "batch_wait_timeout_s" in batching:
                batched.set_batch_wait_timeout_s(batching["batch_wait_timeout_s"])

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def _generate(self, calls: list[Call]) -> list[Completion | Exception]:
        return await self.generate_together(calls)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def _score(self, conversations: list[Sequence[Turn]]) -> list[Score | Exception]:
        return await self.score_together(conversations)


class RapidReplica(RapidWorker):
    """RAPID. A replica keeps the sessions of the latest documents, and Ray Serve knows which."""

    @serve.multiplexed(max_num_models_per_replica=ServerSettings.sessions)
    async def session(self, key: str) -> RapidChat:
        return await super().session(key)


@serve.ingress()
class Server:
    """The application, over models that are handles to the other deployments.

    Args:
        parts: What it serves.
        models: Handles, by the names of the deployments.
        rapid: The handle of RAPID's.
    """

    def __init__(self, parts: Parts, models: Mapping[str, Any], rapid: Any) -> None:
        configure(parts.log_level)
        remote = {name: remote_model(handle, LOST) for name, handle in models.items()}
        loaded = parts.load(remote, RemoteRapid(Calls(rapid, LOST)) if rapid is not None else None)
        self._app = create_app(replace(parts.settings, load=lambda: loaded))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, as Ray Serve asks for it."""
        return self._app

    async def running(self) -> bool:
        """True. A handle that has asked it knows the replicas."""
        return True

    async def drain(self, seconds: float) -> int:
        """Refuse new requests from now on, and wait ``seconds`` at most for those that run. How many still do."""
        state, end = self._app.state.serving, time.monotonic() + seconds
        state.draining = True
        while state.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return int(state.in_flight)


def application(parts: Parts, given: Deployments) -> Any:
    """The deployments, bound to each other: what ``serve.run`` and a config file of Ray Serve take.

    Args:
        given: Settings by the names of the deployments, checked (``deployments.checked``).

    Raises:
        InvalidInputError: Ray Serve refuses a setting.
    """

    def deployment(kind: Any, name: str, **own: Any) -> Any:
        settings = {"graceful_shutdown_timeout_s": parts.settings.drain, **own, **given.get(name, {})}
        try:
            return serve.deployment(kind).options(name=name, logging_config=_LOGS, **settings)
        except (TypeError, ValueError) as error:  # pydantic's are ValueErrors
            raise InvalidInputError(f"the deployment {name}: {' '.join(str(error).split())}") from None

    models = {
        name: deployment(ModelReplica, name, max_ongoing_requests=ONGOING).bind(load)
        for name, load in parts.models.items()
    }
    workers = None
    if parts.rapid is not None:
        made = deployment(RapidReplica, RAPID, max_ongoing_requests=ServerSettings.sessions)
        workers = made.bind(parts.rapid, parts.settings.session_bytes)
    server = deployment(Server, SERVER, max_ongoing_requests=_CONNECTIONS)
    return server.bind(parts, models, workers)


@contextlib.contextmanager
def cluster() -> Iterator[bool]:
    """The block has a cluster: that of the variable ``RAY_ADDRESS``, else one of its own; it yields whether it is one.

    Without an address, Ray would join a cluster that somebody else has started on this machine.
    """
    own = not os.environ.get("RAY_ADDRESS")
    ray.init(logging_level=logging.WARNING, **({"address": "local", "include_dashboard": False} if own else {}))
    try:
        yield own
    finally:
        ray.shutdown()


def run(made: Any, host: str, port: int, drain: float, *, cpus: float, told: Callable[[], None]) -> None:
    """Deploy ``made`` and serve it until a signal to stop; then running requests end.

    Args:
        host, port: Where Ray Serve listens.
        drain: Seconds for running requests.
        cpus: How many the deployments need at least.
        told: Called when all deployments run.

    Raises:
        InvalidInputError: This machine has fewer CPUs.
        SpecRAGError: A deployment cannot start.
    """
    with cluster() as own, contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's would not wait for requests
        there = ray.cluster_resources().get("CPU", 0)
        if own and cpus > there:
            raise InvalidInputError(
                f"the deployments need {cpus:g} CPUs and Ray found {there:g}: "
                "give them smaller ray_actor_options.num_cpus with --deployments, or a cluster with RAY_ADDRESS"
            )
        serve.start(http_options={"host": host, "port": port}, logging_config=_LOGS)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            _deploy(made)
            told()
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            _drain(drain)
        finally:
            serve.delete(NAME)
            if own:
                serve.shutdown()


def _deploy(made: Any) -> None:
    try:
        serve.run(made, name=NAME, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        there = serve.status().applications.get(NAME)
        told = [each.message for each in there.deployments.values()] if there is not None else [str(error)]
        raise SpecRAGError(f"the deployments could not start: {last_error(told)}") from None


def last_error(messages: Sequence[str]) -> str:
    """The last line with an exception among what Ray says, without the exception's type where it is one of ours."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    last = (raised or [line for line in lines if line] or ["no reason is known"])[-1]
    return last.partition(": ")[2] if last.startswith("specrag.errors.") else last


def _drain(seconds: float) -> None:
    """Wait for running requests, where the server runs: Ray Serve would stop the models before them."""
    with contextlib.suppress(Exception):
        server = serve.get_app_handle(NAME)
        server.running.remote().result(timeout_s=_CONNECT)  # a broadcast goes to the replicas that a handle knows
        server.broadcast("drain", seconds).results(timeout_s=seconds + _CONNECT)
