"""The deployments of `specrag serve --ray`: their file, their names, and the one-line errors. Ray is not needed."""

from __future__ import annotations

import socket
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from specrag.cli.served import OnRay, Served
from specrag.errors import InvalidInputError
from specrag.serving.deployments import cpus_needed, read_deployments
from tests.serving_parts import RADIUM, index_of
from tests.test_serving_life import refused_at_once

NAMES = ["Server", "Drafter", "Verifier"]


@pytest.fixture
def written(tmp_path):
    def write(text: str):
        (tmp_path / "deployments.yaml").write_text(text)
        return tmp_path / "deployments.yaml"

    return write


@pytest.fixture(scope="module")
def saved(tmp_path_factory, minilm):
    folder = tmp_path_factory.mktemp("indexes") / "radium"
    index_of(RADIUM, minilm).save(folder)
    return folder


@pytest.fixture
def some_ray(monkeypatch):
    """A package of this name is found; what is tested ends before it is imported."""
    module = ModuleType("ray")
    module.__spec__ = ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", module)


GIVEN = """
deployments:
  - name: Drafter
    autoscaling_config: {min_replicas: 2, max_replicas: 4, target_ongoing_requests: 2}
    user_config: {max_batch_size: 4}
  - name: Verifier
    num_replicas: 3
    ray_actor_options: {num_cpus: 0.5, num_gpus: 1}
"""


def test_the_settings_are_read_by_the_names_of_the_deployments(written):
    given = read_deployments(written(GIVEN), NAMES)
    assert given["Drafter"]["autoscaling_config"]["max_replicas"] == 4 and given["Verifier"]["num_replicas"] == 3
    assert cpus_needed(given, NAMES) == 1 + 2 + 3 * 0.5
    assert cpus_needed({}, NAMES) == 3
    automatic = {"num_replicas": "auto", "autoscaling_config": {"min_replicas": 2, "initial_replicas": 4}}
    assert cpus_needed({"Drafter": automatic}, NAMES) == 1 + 4 + 1


def one(settings: str) -> str:
    return f"deployments: [{{name: Drafter, {settings}}}]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deployments: [", "is not YAML: while parsing"),
        ("drafter: 2", "expected 'deployments:' and a list"),
        ("deployments: [2]", r"deployments\[0\] must be a mapping with a name"),
        ("deployments: [{name: Drafter}, {name: Drafter}]", "the deployment Drafter stands there twice"),
        ("deployments: [{name: Reader}]", "no deployment 'Reader': this server has Server, Drafter, Verifier"),
        (one("replicas: 2"), "unknown settings replicas: Drafter has num_replicas, autoscaling_config"),
        (one("num_replicas: 0"), "Drafter.num_replicas must be at least 1, got 0"),
        (one("num_replicas: many"), "Drafter.num_replicas must be a whole number, got 'many'"),
        (one("autoscaling_config: 3"), "Drafter.autoscaling_config must be a mapping, got an int"),
        (one("autoscaling_config: {min_replicas: 0}"), "Drafter.min_replicas must be at least 1, got 0"),
        (one("autoscaling_config: {max: 3}"), "unknown settings max: Drafter.autoscaling_config has min_replicas"),
        (one("num_replicas: 2, autoscaling_config: {max_replicas: 3}"), "give one of them"),
        (one("user_config: {batch: 3}"), "unknown settings batch: Drafter.user_config has max_batch_size"),
        (one("ray_actor_options: {num_cpus: two}"), "Drafter.num_cpus must be a number, got 'two'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_in_one_line(written, text, said):
    with pytest.raises(InvalidInputError, match=said) as raised:
        read_deployments(written(text), NAMES)
    assert "\n" not in str(raised.value) and "deployments.yaml" in str(raised.value)


def test_each_model_in_this_process_has_a_deployment_and_those_on_servers_have_none(saved):
    index = (str(saved),)
    assert OnRay(Served(index=index)).names == ["Server", "Drafter"]
    pooled = Served(index=index, drafter=("minilm-reader", "smollm2"), verifier="smollm2", rapid="smollm2")
    assert OnRay(pooled).names == ["Server", "Drafter", "Drafter2", "Verifier", "Rapid"]
    on_servers = Served(index=index, drafter=("minilm-reader", "m"), verifier="m", server=("http://x/v1",))
    assert OnRay(on_servers).names == ["Server", "Drafter"]
    assert OnRay(Served(rapid="smollm2")).names == ["Server", "Rapid"]


def test_the_processes_of_ray_get_whole_paths(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    served = OnRay(Served(index=(f"books={saved.name}",), rapid="./nothing-here", rapid_drafter=saved.name)).served
    assert served.index == (f"books={saved}",)
    assert (served.rapid, served.rapid_drafter) == ("./nothing-here", str(saved))


def test_the_server_has_one_replica_where_it_keeps_uploads(saved):
    many = {"Server": {"num_replicas": 2}}
    OnRay(Served(index=(str(saved),))).check(many)
    for given in (many, {"Server": {"autoscaling_config": {"max_replicas": 2}}}):
        with pytest.raises(InvalidInputError, match="Server has one replica where RAPID is served"):
            OnRay(Served(rapid="smollm2")).check(given)


def test_options_of_a_config_file_are_those_of_the_command():
    assert Served.of({"rapid": "smollm2", "models": "x"}).models.name == "x"
    assert Served.of({"drafter": "smollm2"}) == Served.of({"drafter": ("smollm2",)})
    with pytest.raises(InvalidInputError, match="unknown options indexes: `specrag serve` has api_key, .*, index, "):
        Served.of({"indexes": ["x"]})
    empty = Served.of({"drafter": "m", "server": "http://127.0.0.1:9/v1", "drafts": None, "escalate_below": None})
    made = empty.load_pipeline(drafts=empty.drafts)  # a name without a value, in YAML
    assert (made.drafts, made.escalate_below) == (5, 0.5)


def test_without_ray_the_commands_say_which_extra_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused_at_once("--index", str(saved), "--ray")
    assert "specrag serve --ray needs the package ray" in said and "pip install 'specrag[ray]'" in said
    assert "give --ray too" in refused_at_once("--index", str(saved), "--deployments", "x")


def test_on_ray_a_start_that_cannot_succeed_ends_with_one_line(saved, some_ray, written, tmp_path):
    def refused(*options: str) -> str:
        return refused_at_once("--index", str(saved), "--ray", *options)

    assert "no file with deployments at" in refused("--deployments", str(tmp_path / "none.yaml"))
    assert "Drafter.num_replicas must be at least 1, got 0" in refused(
        "--deployments", str(written(one("num_replicas: 0")))
    )
    assert "no deployment 'Rapid'" in refused("--deployments", str(written("deployments: [{name: Rapid}]")))
    assert "nowhere" in refused("--drafter", str(tmp_path / "nowhere"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused("--port", str(port))
