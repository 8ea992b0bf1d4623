"""`docs/serving.md`: its examples run against a real server, and its tables are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from specrag.cli.serve import serve
from specrag.serving import Models
from specrag.serving.requests import Extension
from tests.serving_parts import chat, rapid_models, real_models, served

TEXT = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tiny):
    real = real_models()
    models = Models(rag=real.rag, indexes=real.indexes, rapid=rapid_models(tiny).rapid, embedder=real.embedder)
    with served(models) as running:
        yield running


@pytest.mark.parametrize(
    ("number", "shown"), [(0, r"December 1898\n0\.\d+ \['Marie Curie"), (1, "draft: December 1898"), (2, r"\d\n$")]
)
def test_the_examples_run_as_they_stand(server, capsys, number, shown):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    exec(blocks[number].replace("http://127.0.0.1:8000", server.url), {})
    assert re.search(shown, capsys.readouterr().out)


def test_every_metric_field_and_option_is_told(server):
    with server.client() as http:
        told = http.post("/v1/chat/completions", json=chat()).json()["specrag"]
        metrics = set(re.findall(r"^# TYPE (specrag_\w+) ", http.get("/metrics").text, re.MULTILINE))
    assert metrics and all(name.removesuffix("_created") in TEXT for name in metrics)
    for name in (*told, *told["timings"], *Extension.model_fields):
        assert f"`{name}`" in TEXT, name
    as_in_ask = {"tokenizer", "embedder_server", "api_key", "calibration", "min_confidence", "escalate", "models"}
    as_in_ask |= {"escalate_below", "drafts", "passages_per_draft"}
    for name in set(inspect.signature(serve).parameters) - as_in_ask:
        assert f"`--{name.replace('_', '-')}`" in TEXT, name
