"""Training data that a stronger LM writes: rationales and questions, kept as they come."""

from __future__ import annotations

import pytest

from specrag import Passage
from specrag.errors import InvalidInputError, ModelError, SpecRAGError
from specrag.evaluation.data import load_questions, save_questions
from specrag.models import Completion
from specrag.models.base import GeneratedText
from specrag.training import synthesize_questions, synthesize_rationales
from tests.fakes import ScriptedLM
from tests.towers import records


def test_written_rationales_are_kept_as_they_come(tmp_path):
    calls = []

    def reply(prompt):
        calls.append(prompt)
        if len(calls) == 6:
            return ModelError("killed")
        return Completion((GeneratedText(" Because the tower says so. ", None, 5),))

    lm, cache = ScriptedLM(reply), tmp_path / "rationales.jsonl"
    with pytest.raises(ModelError, match="killed"):
        synthesize_rationales(records(8), lm, cache, batch=2)
    assert len(calls) == 6
    cache.write_text(cache.read_text() + '{"key": "half a li')  # what a kill leaves
    rationales = synthesize_rationales(records(8), lm, cache, batch=2)
    assert len(calls) == 6 + 4 and set(rationales) == {str(i) for i in range(8)}
    assert rationales["3"] == "Because the tower says so."
    assert "Answer: in 1803" in calls[3] and "Tower 3 was built" in calls[3]
    assert synthesize_rationales(records(8), lm, cache) == rationales and len(calls) == 10


def written(*pairs: tuple[str, str]) -> Completion:
    return Completion(tuple(GeneratedText(f" {text}", None, 5) for pair in pairs for text in pair))


def test_questions_are_kept_when_their_answer_stands_in_their_own_passage(tmp_path, minilm):
    passages = [
        Passage("The tower was finished by Gustave Eiffel's company in March  1889.", title="Eiffel Tower"),
        Passage("The bridge was finished in 1894 and crosses the Thames.", title="Tower Bridge"),
        Passage("The tower was finished by Gustave Eiffel's company in March  1889.", title="Eiffel Tower"),
    ]
    replies = {
        "Eiffel Tower:": written(
            ("when was the eiffel tower finished", "march 1889."),  # kept, as the passage spells it
            ("when was the eiffel tower finished", "1889"),  # again
            ("when was the eiffel tower painted", "in 1968"),  # not in the passage
            ("who is gustave eiffel of paris", "Gustave Eiffel"),  # given away
            ("finished when", "1889"),  # too short
            ("what does the passage say about the eiffel tower", "March 1889"),  # cannot be asked without it
            ("which river does the tower bridge cross", "the"),  # another passage is nearer
            (
                "who finished the eiffel tower",
                "The tower was finished by Gustave Eiffel's company in March",
            ),  # too long
            ("whose company finished the eiffel tower", "Gustave Eiffel"),  # kept
        ),
        "Tower Bridge:": written(*[("which river does tower bridge cross", "Thames")] * 9),
    }
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return next(made for title, made in replies.items() if f"[1] {title}" in prompt.split("Answer:")[-1])

    lm, cache = ScriptedLM(reply), tmp_path / "kept" / "replies.jsonl"
    for _ in range(2):
        made = synthesize_questions(passages, lm, minilm, cache, per_passage=9)
        assert [(q.question, q.answers, q.passages[0].title, q.gold) for q in made] == [
            ("when was the eiffel tower finished", ("March  1889",), "Eiffel Tower", (0,)),
            ("whose company finished the eiffel tower", ("Gustave Eiffel",), "Eiffel Tower", (0,)),
            ("which river does tower bridge cross", ("Thames",), "Tower Bridge", (0,)),
        ]
        assert len({q.id for q in made}) == 3 and len(asked) == 2  # a passage is asked about once
    save_questions(made, tmp_path / "questions.jsonl")
    assert load_questions(tmp_path / "questions.jsonl") == made
    for wrong in ({"passages": [], "per_passage": 1}, {"passages": passages, "per_passage": 0}):
        with pytest.raises(InvalidInputError, match="at least one of each"):
            synthesize_questions(wrong["passages"], lm, minilm, cache, per_passage=wrong["per_passage"])


@pytest.mark.slow
def test_a_model_writes_a_question_then_its_answer_line_by_line(smollm2, minilm, tmp_path):
    texts = []

    class Watched(ScriptedLM):
        def generate(self, requests, sampling=None, *, top_log_probs=0):
            fed = "".join(f"{stage.header} x" for stage in requests[0].stages)
            assert fed == "Question: x\nAnswer: x\nQuestion: x\nAnswer: x"  # else the model imitates the run-on lines
            made = smollm2.generate(requests)
            texts.extend(part.text for completion in made for part in completion.parts)
            return made

    passage = Passage("Mount Alba is 3,120 metres high. Ada Berg climbed it first, in 1901.", title="Mount Alba")
    synthesize_questions([passage], Watched(lambda prompt: None), minilm, tmp_path / "replies.jsonl", per_passage=2)
    assert len(texts) == 4 and all(text.strip() and "\n" not in text.strip() for text in texts)
    assert not any("Answer:" in text or "Question:" in text for text in texts)


def test_a_damaged_cache_of_replies_is_asked_again_and_a_folder_in_its_place_is_said(tmp_path):
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return Completion((GeneratedText("Because the tower says so.", None, 5),))

    lm, cache = ScriptedLM(reply), tmp_path / "rationales.jsonl"
    expected = synthesize_rationales(records(4), lm, cache)
    good = cache.read_bytes()
    assert synthesize_rationales(records(4), lm, cache) == expected and len(asked) == 4
    for damaged in (b"[]\n", b"null\n", b'{"key": [], "reply": "x"}\n', b"\xff\xfe\n", good[: len(good) // 2]):
        cache.write_bytes(damaged)
        assert synthesize_rationales(records(4), lm, cache) == expected
    cache.unlink()
    cache.mkdir()
    with pytest.raises(SpecRAGError, match="could not be written: Is a directory"):
        synthesize_rationales(records(4), lm, cache)
