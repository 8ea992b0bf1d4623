"""Ablations of the scores from stored drafts agree with asking the models again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.rescoring import with_rescored
from specrag.evaluation.run import evaluate
from specrag.evaluation.summary import summarize
from specrag.evaluation.systems import Parts, build
from tests.fakes import shortened


@pytest.mark.slow
def test_other_scores_choose_from_stored_drafts_as_a_new_run_would(tmp_path, reader, minilm, questions):
    asked = [replace(q, passages=tuple(shortened(q.passages)), gold=()) for q in questions[:4]]
    names = ["extractive-pair", "extractive-pair:scores=draft", "extractive-pair:scores=span"]
    parts = Parts(drafter=reader, verifier=reader, embedder=minilm, settings={"calibration": None})
    run = evaluate(build(names, parts), asked, tmp_path / "run")
    again = with_rescored(run, "extractive-pair", [("draft",), ("span",), ("draft", "span")])
    for by, name in (("draft", names[1]), ("span", names[2]), ("draft+span", names[0])):
        made, known = again.of_system(f"extractive-pair by {by}"), run.of_system(name)
        assert [(row.text, row.right) for row in made.values()] == [(row.text, row.right) for row in known.values()]
    assert len(summarize(again).systems) == 6 and len(run.answers) == 12

    with pytest.raises(InvalidInputError, match="no answers of 'oracle'; it has extractive-pair"):
        with_rescored(run, "oracle", [("draft",)])
    with pytest.raises(InvalidInputError, match="have no score self_reflect"):
        with_rescored(run, "extractive-pair", [("self_reflect",)])
    with pytest.raises(InvalidInputError, match="unknown scores"):
        with_rescored(run, "extractive-pair", [("best",)])
    with pytest.raises(InvalidInputError, match=r"a score is named twice in draft\+draft"):
        with_rescored(run, "extractive-pair", [("draft", "draft")])
