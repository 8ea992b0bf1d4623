"""The deployments of `specrag serve --ray`: their names, and the file that says how many replicas each has.

The file has the form of the section ``deployments`` in a config file of Ray Serve, in YAML or JSON. Names and counts
are checked here, without Ray; the values of the other settings are Ray Serve's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from specrag._fields import check_numbers, check_whole_numbers
from specrag.errors import InvalidInputError, NotFoundError, a

#: The deployment that listens for requests. Each drafter, the verifier and RAPID have one of their own.
SERVER, DRAFTER, VERIFIER, RAPID = "Server", "Drafter", "Verifier", "Rapid"
#: Settings that a deployment may have, under Ray Serve's names.
SETTINGS = (
    "num_replicas",
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "ray_actor_options",
    "user_config",
    "graceful_shutdown_timeout_s",
    "graceful_shutdown_wait_loop_s",
    "health_check_period_s",
    "health_check_timeout_s",
)
AUTOSCALING = (
    "min_replicas",
    "initial_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "metrics_interval_s",
    "look_back_period_s",
    "upscale_delay_s",
    "downscale_delay_s",
    "upscaling_factor",
    "downscaling_factor",
    "aggregation_function",
)
_COUNTS = ("min_replicas", "initial_replicas", "max_replicas")
#: What ``user_config`` may hold: how many requests a replica of a language model puts into one batch, at most, and the
#: seconds that it waits for them.
BATCHING = ("max_batch_size", "batch_wait_timeout_s")

Deployments = Mapping[str, Mapping[str, Any]]


def drafter_names(count: int) -> list[str]:
    """The deployments of ``count`` drafters: Drafter, Drafter2, ..."""
    return [DRAFTER if at == 1 else f"{DRAFTER}{at}" for at in range(1, count + 1)]


def read_deployments(file: Path, names: Sequence[str]) -> Deployments:
    """The settings that ``file`` gives, by the names of the deployments.

    Args:
        names: Of the deployments that there are.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is not YAML, names a deployment or a setting that is not there, or asks for no replica.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no file with deployments at {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    listed = content.get("deployments") if isinstance(content, Mapping) and set(content) == {"deployments"} else None
    if not isinstance(listed, list):
        raise InvalidInputError(f"{file}: expected 'deployments:' and a list, as in a config file of Ray Serve")
    found: dict[str, Mapping[str, Any]] = {}
    for at, given in enumerate(listed):
        name = given.get("name") if isinstance(given, Mapping) else None
        if not isinstance(name, str):
            raise InvalidInputError(f"{file}: deployments[{at}] must be a mapping with a name")
        if name in found:
            raise InvalidInputError(f"{file}: the deployment {name} stands there twice")
        found[name] = {key: value for key, value in given.items() if key != "name"}
    try:
        return checked(found, names)
    except InvalidInputError as error:
        raise InvalidInputError(f"{file}: {error}") from None


def checked(given: Deployments, names: Sequence[str]) -> Deployments:
    """``given``, where it can be used.

    Raises:
        InvalidInputError: See ``read_deployments``.
    """
    for name, settings in given.items():
        if name not in names:
            raise InvalidInputError(f"there is no deployment {name!r}: this server has {', '.join(names)}")
        _check_known(name, settings, SETTINGS)
        replicas, scaling = settings.get("num_replicas"), settings.get("autoscaling_config")
        if replicas not in (None, "auto"):
            _check_count(name, "num_replicas", replicas)
        if scaling is not None:
            if replicas not in (None, "auto"):
                raise InvalidInputError(f"{name} has num_replicas and autoscaling_config: give one of them")
            _check_known(f"{name}.autoscaling_config", scaling, AUTOSCALING)
            for count in _COUNTS:
                if count in scaling:
                    _check_count(name, count, scaling[count])
        if settings.get("user_config") is not None:
            _check_known(f"{name}.user_config", settings["user_config"], BATCHING)
        if (options := settings.get("ray_actor_options")) is not None:
            _check_mapping(f"{name}.ray_actor_options", options)
            check_numbers(**{f"{name}.num_cpus": options.get("num_cpus")})
    return given


def cpus_needed(given: Deployments, names: Sequence[str]) -> float:
    """How many CPUs the first replicas of all deployments need: one each, where nothing else is given."""
    needed = 0.0
    for name in names:
        settings = given.get(name, {})
        scaling = settings.get("autoscaling_config") or {}
        replicas = settings.get("num_replicas")
        if replicas in (None, "auto"):
            replicas = scaling.get("initial_replicas") or scaling.get("min_replicas") or 1
        each = (settings.get("ray_actor_options") or {}).get("num_cpus")
        needed += (1 if each is None else each) * replicas
    return needed


def check_one_server(given: Deployments) -> None:
    """Whether there is one replica of the server, as uploaded files need it.

    Raises:
        InvalidInputError: There may be more.
    """
    settings = given.get(SERVER, {})
    if settings.get("num_replicas") not in (None, 1) or settings.get("autoscaling_config") is not None:
        raise InvalidInputError(
            f"{SERVER} has one replica where RAPID is served: it keeps the uploaded files. Give {RAPID} more replicas"
        )


def _check_mapping(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InvalidInputError(f"{where} must be a mapping, got {a(given)}")


def _check_known(where: str, given: Any, known: Sequence[str]) -> None:
    _check_mapping(where, given)
    if unknown := [str(name) for name in given if name not in known]:
        raise InvalidInputError(f"unknown settings {', '.join(unknown)}: {where} has {', '.join(known)}")


def _check_count(deployment: str, name: str, value: Any) -> None:
    check_whole_numbers(least=1, **{f"{deployment}.{name}": value})
