"""Training a drafter: the examples, a run that learns, a run that is killed, and the adapter without peft."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specrag import Passage, Prompts, SpeculativeRAG
from specrag.engine.lora import read_lora
from specrag.errors import InvalidInputError, ModelError, ModelNotFoundError
from specrag.evaluation.data import Question, load_questions, save_questions
from specrag.models import Completion, TransformersLM, bundled
from specrag.models.base import GeneratedText
from specrag.models.bundled import adapter_folder
from specrag.speculative.drafting import Drafter
from specrag.text import MAX_EVIDENCE_WORDS
from specrag.training import (
    Mixture,
    TrainingSettings,
    average_adapters,
    evaluate_drafter,
    extractive_rationale,
    make_examples,
    synthesize_questions,
    synthesize_rationales,
    train,
)
from specrag.training.examples import IGNORED, encode_example, in_batches
from specrag.training.rationales import answer_in
from specrag.training.substitution import Substitutes, answer_kind
from tests.conftest import tiny_llama
from tests.fakes import HashEmbedder, ScriptedLM


def records(count: int = 24) -> list[Question]:
    return [
        Question(
            id=str(i),
            question=f"when was tower {i} built",
            answers=(f"in {1800 + i}",),
            passages=(Passage(f"Towers are tall. Tower {i} was built in {1800 + i}. It stands.", title=f"Tower {i}"),),
            gold=(0,),
        )
        for i in range(count)
    ]


def made(count: int = 24, **options):
    return make_examples(records(count), HashEmbedder(), **options)


# --- rationales -----------------------------------------------------------------------------------------


def test_the_rationale_is_the_sentence_with_the_answer_under_its_title():
    passage = Passage("Berlin is big. Paris has held the record since 1889. In 1889 it rained.", title="Paris")
    assert answer_in(passage, ["1889", "89"]) == "1889"
    assert extractive_rationale("since when has paris held the record", "1889", passage) == (
        "Paris: Paris has held the record since 1889."
    )
    long = Passage("word " * 60 + "the answer is Rome and more words follow here " + "word " * 60)
    cut = extractive_rationale("what", "Rome", long)
    assert cut is not None and "Rome" in cut and len(cut.split()) <= MAX_EVIDENCE_WORDS
    assert extractive_rationale("what", "Oslo", passage) is None
    assert answer_in(Passage("the United  States, of America"), ["united states of america"]) == (
        "United  States, of America"
    )
    assert answer_in(Passage("category"), ["cat"]) is None
    initials = Passage("It rained. Toto was written by L. Frank Baum and drawn by Dr. W. W. Denslow. He barks.")
    assert extractive_rationale("who wrote toto", "L. Frank Baum", initials) == (
        "Toto was written by L. Frank Baum and drawn by Dr. W. W. Denslow."
    )
    scattered = Passage("It was 28% in 2008. Later it fell to 20 of 100.")
    assert extractive_rationale("how much", "20", scattered) == "Later it fell to 20 of 100."


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


# --- examples -------------------------------------------------------------------------------------------


def test_examples_show_what_drafts_will_see():
    rounds = made(60, variants=4, mixture=Mixture(unanswerable=0.3, gold_alone=0.1, wide=0.1))
    assert len(rounds) == 4 and [len(part) for part in rounds] == [60] * 4
    examples = [e for part in rounds for e in part]
    unanswerable = [e for e in examples if not e.answerable]
    assert 0.2 < len(unanswerable) / len(examples) < 0.4
    for e in examples:
        asked = re.search(r"\d+", e.question).group()
        gold = [p for p in e.passages if p.title == f"Tower {asked}"]
        assert bool(gold) == e.answerable and len({p.text for p in e.passages}) == len(e.passages)
        if e.answerable:
            assert e.answer == f"in {1800 + int(asked)}" and e.answer in e.rationale
        else:
            assert Prompts().is_abstention(e.answer) and len(e.passages) == 2
    assert {len(e.passages) for e in examples if e.answerable} == {1, 2, 3, 4}
    first = [
        e.passages[0].title == f"Tower {re.search(r'[0-9]+', e.question).group()}" for e in examples if e.answerable
    ]
    assert 0.3 < sum(first) / len(first) < 0.8  # gold first or last
    assert rounds[0] != rounds[1] and made(60, variants=4)[0] == made(60, variants=1)[0]


def test_an_example_is_examined_by_any_of_its_right_answers():
    example = made(24, mixture=Mixture(unanswerable=0))[0][0]
    example = dataclasses.replace(example, right=(*example.right, "the year three"))
    for written, right in ((example.answer, 1.0), ("It was the year three.", 1.0), ("in 1700", 0.0)):
        assert evaluate_drafter(ScriptedLM(lambda prompt, w=written: ("why", w)), [example]).right == right


def test_an_answer_gives_way_to_another_of_its_kind():
    kept, changed = Mixture(unanswerable=0), Mixture(unanswerable=0, substituted=1)
    for before, after in zip(made(mixture=kept)[0], made(mixture=changed)[0], strict=True):
        gold = next(p.text for p in after.passages if p.title == before.rationale.split(":")[0])
        assert after.answer != before.answer and re.fullmatch(r"in 18\d\d", after.answer)
        assert after.question == before.question and after.right == (after.answer,)
        assert after.answer in gold and after.answer in after.rationale
        assert not any(before.answer in text for text in (gold, after.rationale))
    some = made(60, mixture=Mixture(unanswerable=0, substituted=0.5))[0]
    own = sum(e.answer == f"in {1800 + int(re.search('[0-9]+', e.question).group())}" for e in some)
    assert 15 < own < 45


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("when was it built", "in March 1889", ("when", "date 3")),
        ("when was it opened", "4 May", ("when", "date 2")),
        ("when is it open", "in June", ("when", "date 2")),
        ("who was it", "June Carter", ("who", "name")),
        ("what year was it", "1889", ("what", "date 1")),
        ("how many are there", "about forty", ("how many", "number")),
        ("author of the book", "Ann of the North", ("", "name")),
        ("what is it made of", "riveted iron", None),
    ],
)
def test_kinds_of_answers(question, answer, kind):
    assert answer_kind(question, answer) == kind


@pytest.mark.parametrize(
    ("text", "answers", "question", "rationale"),
    [
        ("Ann Low wrote it.", ("Ann Low",), "who wrote Ann Low's book", "Ann Low wrote it."),  # the question names it
        ("Ann Low wrote it.", ("Ann Low",), "who wrote it", "She wrote it."),  # the rationale does not
        ("Ann Low (Mrs Low) wrote it.", ("Ann Low", "Mrs Low"), "who wrote it", "Ann Low wrote it."),  # it stays
        ("It is made of iron.", ("iron",), "what is it made of", "It is made of iron."),  # of no kind
        ("Bob May and Ann Low met.", ("Ann Low",), "who met Bob May", "Bob May and Ann Low met."),  # no other
    ],
)
def test_an_answer_stays_where_another_makes_no_sense(text, answers, question, rationale):
    record = Question("1", question, answers, (Passage(text),), (0,))
    other = Question("2", "who wrote that", ("Bob May",), (Passage("Bob May wrote that."),), (0,))
    substitutes = Substitutes([(record, answers[0]), (other, "Bob May")])
    assert substitutes.substitute(record, answers[0], rationale, np.random.default_rng(0)) is None
    plain = Question("3", "who wrote this", ("Cy Fox",), (Passage("Cy Fox wrote this.", title="Cy Fox"),), (0,))
    changed = substitutes.substitute(plain, "Cy Fox", "Cy Fox: Cy Fox wrote this.", np.random.default_rng(0))
    assert changed is not None and changed[1] in ("Ann Low", "Bob May")
    assert changed[0].passages[0] == Passage(f"{changed[1]} wrote this.", title=changed[1])
    assert changed[2] == f"{changed[1]}: {changed[1]} wrote this."


def test_a_part_of_a_multi_hop_question_does_not_answer_it():
    hops = [
        Question(
            str(i),
            f"who {i}",
            ("Ann",),
            (Passage(f"Ann wrote book {i}."), Passage(f"Book {i} won."), Passage(f"Other {i}.")),
            (0, 1),
        )
        for i in range(40)
    ]
    for e in make_examples(hops, HashEmbedder(), mixture=Mixture(unanswerable=0.5, gold_alone=0, wide=0))[0]:
        i = e.question.split()[1]
        gold = {p.text for p in e.passages} & {f"Ann wrote book {i}.", f"Book {i} won."}
        assert len(gold) == 2 if e.answerable else len(gold) < 2


def test_useless_records_are_refused():
    with pytest.raises(InvalidInputError, match="none of the 1 records can be used"):
        make_examples([Question("1", "q", ("x",), (Passage("no"),), (0,))], HashEmbedder())
    with pytest.raises(InvalidInputError, match="need at least 3"):
        made(2)
    with pytest.raises(InvalidInputError, match="sum to at most 1"):
        Mixture(unanswerable=0.9, wide=0.2)
    with pytest.raises(InvalidInputError, match="substituted must lie in"):
        Mixture(substituted=1.5)


def test_an_example_has_exactly_the_tokens_of_a_draft(smollm2):
    """What the model would generate token by token from the same prompt, if it wrote the example's draft."""
    example = made()[0][1]
    drafter = Drafter(smollm2)
    end = smollm2.tokenizer.eos_token_id
    encoded = encode_example(example, drafter, smollm2.encoder, end)
    prompt = smollm2.encoder.encode_generation(drafter.request(example.question, example.passages))
    assert encoded.ids[: len(prompt)] == prompt and set(encoded.labels[: len(prompt)]) == {IGNORED}
    decode = smollm2.tokenizer.decode
    assert decode(encoded.ids[len(prompt) :]) == f" {example.rationale}\nAnswer: {example.answer}{decode([end])}"
    counted = [token for token in encoded.labels if token != IGNORED]
    assert decode(counted) == f" {example.rationale}\n {example.answer}{decode([end])}"
    assert encoded.completion == len(encoded.ids) - len(prompt)


def test_batches_hold_like_lengths_and_every_example_once(smollm2):
    drafter = Drafter(smollm2)
    encoded = [[encode_example(e, drafter, smollm2.encoder, 0) for e in part] for part in made(24, variants=2)]
    ordered = in_batches(encoded, 4, seed=1)
    assert sorted(map(str, ordered)) == sorted(str(e) for part in encoded for e in part)
    spread = [
        max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in (ordered[i : i + 4] for i in range(0, 48, 4))
    ]
    whole = max(len(e.ids) for e in ordered) - min(len(e.ids) for e in ordered)
    assert sorted(spread)[len(spread) // 2] < whole / 2
    assert in_batches(encoded, 4, seed=1) == ordered != in_batches(encoded, 4, seed=2)


# --- training -------------------------------------------------------------------------------------------

SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "checkpoint_steps": 4,
    "precision": "float32",
}


TRAINED_WITH = dataclasses.replace(Prompts(), draft="{passages}\n\nAsked: {question}")


def tiny(smollm2) -> TransformersLM:
    return TransformersLM(tiny_llama(len(smollm2.tokenizer), initializer_range=0.02), smollm2.tokenizer)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_loss_falls_and_the_result_loads(smollm2, tmp_path, method):
    lm, losses = tiny(smollm2), []
    settings = TrainingSettings(method=method, learning_rate=1e-2, **SETTINGS)
    out = train(
        lm,
        made(24, variants=4),
        tmp_path / "out",
        settings=settings,
        held=made(4)[0],
        prompts=TRAINED_WITH,
        card={"data": "towers"},
        progress=lambda step, steps, logged: losses.append(logged["loss"]) if "loss" in logged else None,
    )
    assert losses[-1] < losses[0] - (0.2 if method == "lora" else 3)  # nats; random frozen weights leave a LoRA little
    assert TRAINED_WITH.drafts_like(Prompts.of_drafter(out))
    card = (out / "README.md").read_text()
    assert "towers" in card and "held part" in card and "Made by" in card
    assert json.loads((out / "training.json").read_text())["examples"] == 96
    if method == "lora":
        base = tiny(smollm2)
        read = TransformersLM(base.model, base.tokenizer, adapter=out)
        more = train(tiny(smollm2), made(24), tmp_path / "more", settings=settings, adapter=out)
        assert json.loads((more / "training.json").read_text())["training"]["train_loss"] < losses[0] - 0.2
        with pytest.raises(InvalidInputError, match="made for another model"):
            train(
                tiny(smollm2),
                made(4),
                tmp_path / "no",
                settings=settings,
                adapter=adapter_folder("smollm2-rag-drafter"),
            )
        with pytest.raises(InvalidInputError, match="leave method='full'"):
            train(tiny(smollm2), made(4), tmp_path / "no", settings=TrainingSettings(method="full"), adapter=out)
    else:
        read = TransformersLM(out)
    assert SpeculativeRAG(drafter=read).texts.drafts_like(TRAINED_WITH)
    conversation = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        trained, loaded = lm.model(conversation).logits, read.model(conversation).logits
    assert torch.allclose(trained, loaded, atol=2e-2)
    assert not torch.allclose(loaded, tiny(smollm2).model(conversation).logits, atol=2e-2)


_KILLED = """
import os, sys
import tests.test_training as t
from tests.conftest import tiny_llama
from specrag.models import TransformersLM, bundled
smollm2 = bundled("smollm2")
def progress(step, steps, logged):
    if step == 10:
        os._exit(9)  # as a kill does: nothing is put in order
t.train(t.tiny(smollm2), t.made(24, variants=3), sys.argv[1], settings=t.TrainingSettings(**t.SETTINGS), progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(smollm2, tmp_path):
    whole = train(tiny(smollm2), made(24, variants=3), tmp_path / "whole", settings=TrainingSettings(**SETTINGS))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "killed")], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    steps = []
    again = train(
        tiny(smollm2),
        made(24, variants=3),
        tmp_path / "killed",
        settings=TrainingSettings(**SETTINGS),
        progress=lambda step, *_: steps.append(step),
    )
    assert min(steps) == 9 and max(steps) == 18  # from the checkpoint of step 8
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) == len(b) == 28
    with pytest.raises(InvalidInputError, match="run with other examples or settings"):
        train(tiny(smollm2), made(24), tmp_path / "killed", settings=TrainingSettings(**SETTINGS))


def test_settings_are_checked_at_the_door(smollm2, tmp_path):
    for wrong, said in [
        ({"method": "qlora"}, "method must be"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"batch_size": 3, "micro_batch_size": 2}, "multiple of micro_batch_size"),
    ]:
        with pytest.raises(InvalidInputError, match=said):
            TrainingSettings(**wrong)
    with pytest.raises(InvalidInputError, match="at most max_tokens=3"):
        train(tiny(smollm2), made(4), tmp_path, settings=TrainingSettings(max_tokens=3))


# --- adapters without peft ------------------------------------------------------------------------------


def test_an_adapter_of_another_model_changes_nothing(smollm2, tmp_path):
    lm = tiny(smollm2)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    with pytest.raises(InvalidInputError, match="made for another model"):
        TransformersLM(lm.model, lm.tokenizer, adapter=adapter_folder("smollm2-rag-drafter"))
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter"):
        TransformersLM(lm.model, lm.tokenizer, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (adapter_folder("smollm2-rag-drafter") / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(InvalidInputError, match="no plain LoRA"):
        TransformersLM(lm.model, lm.tokenizer, adapter=tmp_path)


def adapter(folder: Path, factors: dict[str, torch.Tensor], prompts: Prompts | None = None, **config) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    named = {f"base_model.model.model.layers.0.mlp.up_proj.lora_{name}.weight": t for name, t in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    if prompts is not None:
        prompts.save_drafting(folder)
    return folder


def test_the_mean_of_adapters_is_an_adapter(tmp_path):
    model = tiny_llama(64)
    size = tuple(model.model.layers[0].mlp.up_proj.weight.shape)
    a, b, c = torch.randn(3, 2, size[1]).bfloat16()
    out = torch.randn(size[0], 2).bfloat16()
    own = Prompts(abstention="nothing")
    parts = [adapter(tmp_path / str(i), {"A": x, "B": out}, own, seed=i) for i, x in enumerate((a, b, c))]
    mean = average_adapters(parts, tmp_path / "mean")
    # With B in common the mean of the factors is the mean of the updates.
    ((_, delta),) = read_lora(model, mean)
    expected = torch.stack([read_lora(model, part)[0][1] for part in parts]).mean(0)
    assert torch.allclose(delta, expected, atol=0.05, rtol=0.02) and delta.abs().max() > 1
    assert Prompts.of_drafter(mean) == own
    assert {t.dtype for t in load_file(mean / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_adapters_that_do_not_belong_together_have_no_mean(tmp_path):
    factors = {"A": torch.ones(2, 3), "B": torch.ones(3, 2)}
    one = adapter(tmp_path / "one", factors, Prompts())
    wider = adapter(tmp_path / "wider", {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}, Prompts())
    scaled = adapter(tmp_path / "scaled", factors, Prompts(), lora_alpha=8)
    asked = adapter(tmp_path / "asked", factors, Prompts(draft="{passages} {question}"))
    for given, message in (
        ([one], "at least two"), ([one, wider], "shape"), ([one, scaled], "scale"), ([one, asked], "prompts"),
    ):  # fmt: skip
        with pytest.raises(InvalidInputError, match=message):
            average_adapters(given, tmp_path / "mean")
    with pytest.raises(InvalidInputError, match="another folder"):
        average_adapters([one, scaled], one)
    with pytest.raises(ModelNotFoundError, match="no LoRA adapter"):
        average_adapters([one, tmp_path / "none"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_bundled_adapter_takes_no_second_one(tmp_path):
    with pytest.raises(InvalidInputError, match="an adapter of 'smollm2' itself"):
        bundled("smollm2-rag-drafter", adapter=tmp_path)


@pytest.mark.slow
def test_the_shipped_drafter_is_small_and_drafts(questions):
    file = adapter_folder("smollm2-rag-drafter") / "adapter_model.safetensors"
    assert file.stat().st_size < 20e6
    shown = make_examples([q for q in questions if q.answers], HashEmbedder(), mixture=Mixture(unanswerable=0))[0]
    found = evaluate_drafter(bundled("smollm2-rag-drafter", quantization="int8"), shown)
    assert found.right >= 0.25 and found.wrongly_abstained <= 0.3, found  # as published it has none of them right
