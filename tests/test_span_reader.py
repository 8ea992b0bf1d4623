"""The span reader: its scores against brute force, windows, given spans, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from specrag.errors import InvalidInputError, ModelNotFoundError
from specrag.models.bundled import located
from specrag.models.reader import SpanReader, grouped_logsumexp, shared_log_normalizer, span_scores
from specrag.training.reader import reader_loss

QUESTION = "when was the tower finished"
TEXTS = [
    "Work on the tower began in 1887. It was finished in March 1889 and opened in May.",
    "The river is long.",
    "",
    "A tower of iron stands by the river; it was finished late.",
]


def tiny_bert(vocabulary: int, seed: int = 0) -> BertForQuestionAnswering:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return BertForQuestionAnswering(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(located("minilm"))


@pytest.fixture(scope="module")
def reader(tokenizer) -> SpanReader:
    return SpanReader(tiny_bert(len(tokenizer)), tokenizer, longest=6, dtype=torch.float32)


def by_hand(reader: SpanReader, question: str, texts) -> tuple[dict[tuple[int, int, int], float], float]:
    """Every span's log-probability and that of no answer, one passage at a time, span by span."""
    scores = {}
    for number, text in enumerate(texts):
        if not text:
            continue
        encoded = reader.tokenizer(question, text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        inside = [i for i, kind in enumerate(encoded.sequence_ids(0)) if kind == 1]
        with torch.inference_mode():
            made = reader.model(**encoded)
        s, e = made.start_logits[0].tolist(), made.end_logits[0].tolist()
        for i, j in itertools.product(inside, inside):
            if i <= j < i + reader.longest:
                scores[number, offsets[i][0], offsets[j][1]] = s[i] + e[j] - s[0] - e[0]
    total = math.log(1 + sum(math.exp(score) for score in scores.values()))
    return {span: score - total for span, score in scores.items()}, -total


def test_spans_are_normalised_together_over_all_passages_and_no_answer(reader):
    expected, no_answer = by_hand(reader, QUESTION, TEXTS)
    reading = reader.read(QUESTION, TEXTS, spans_per_passage=10_000)
    assert len(reading.spans) == len(expected)
    for span in reading.spans:
        assert span.log_prob == pytest.approx(expected[span.passage, span.start, span.end], abs=1e-4)
    assert reading.log_no_answer == pytest.approx(no_answer, abs=1e-4)
    mass = sum(math.exp(span.log_prob) for span in reading.spans) + math.exp(reading.log_no_answer)
    assert mass == pytest.approx(1, abs=1e-4)
    values = [span.log_prob for span in reading.spans]
    assert values == sorted(values, reverse=True)


def test_so_many_spans_of_each_passage_and_any_batch_size(reader, tokenizer):
    few = reader.read(QUESTION, TEXTS, spans_per_passage=2)
    every = reader.read(QUESTION, TEXTS, spans_per_passage=10_000)
    for number in (0, 1, 3):
        best = [span for span in every.spans if span.passage == number][:2]
        assert [span for span in few.spans if span.passage == number] == best
    alone = SpanReader(reader.model, tokenizer, longest=6, batch_size=1, dtype=torch.float32)
    for a, b in zip(alone.read(QUESTION, TEXTS).spans, reader.read(QUESTION, TEXTS).spans, strict=True):
        assert (a.passage, a.start, a.end) == (b.passage, b.start, b.end)
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


def test_a_given_span_has_the_log_probability_that_reading_gives_it(reader):
    reading = reader.read(QUESTION, TEXTS)
    given = [(span.passage, span.start, span.end) for span in reading.spans]
    assert reader.score(QUESTION, TEXTS, given) == pytest.approx([span.log_prob for span in reading.spans], abs=1e-4)


def test_a_given_span_of_another_tokenizer_takes_the_tokens_that_cover_it(reader):
    start = TEXTS[0].index("arch 1889")  # begins inside the token "march"
    end = start + len("arch 1889")
    whole = TEXTS[0].index("March 1889")
    assert reader.score(QUESTION, TEXTS, [(0, start, end)]) == reader.score(QUESTION, TEXTS, [(0, whole, end)])


def test_a_long_passage_is_read_in_windows_and_every_span_once(reader, tokenizer):
    windowed = SpanReader(reader.model, tokenizer, longest=6, max_tokens=120, dtype=torch.float32)
    text = " ".join(f"In {1700 + i} tower number {i} was finished." for i in range(60))
    reading = windowed.read(QUESTION, [text], spans_per_passage=100_000)
    places = [(span.start, span.end) for span in reading.spans]
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = {(tokens[i][0], tokens[j][1]) for i in range(len(tokens)) for j in range(i, min(i + 6, len(tokens)))}
    assert len(places) == len(set(places)) and set(places) == wanted
    mass = sum(math.exp(span.log_prob) for span in reading.spans) + math.exp(reading.log_no_answer)
    assert mass == pytest.approx(1, abs=1e-3)
    across = [(0, tokens[i][0], tokens[i + 5][1]) for i in range(0, len(tokens) - 5, 7)]  # some lie on a window's edge
    by_place = {(span.start, span.end): span.log_prob for span in reading.spans}
    assert windowed.score(QUESTION, [text], across) == pytest.approx([by_place[a, b] for _, a, b in across], abs=1e-4)


def test_texts_without_words_and_long_questions_are_read(reader):
    nothing = reader.read(QUESTION, ["", " \n"])
    assert (nothing.spans, nothing.log_no_answer) == ((), 0.0)
    long = reader.read("when " * 400 + QUESTION, TEXTS)
    assert long.spans and long.tokens < 4 * (96 + 40)


def test_what_a_reader_refuses(reader, tokenizer, tmp_path):
    with pytest.raises(InvalidInputError, match="the question is empty"):
        reader.read("  ", TEXTS)
    with pytest.raises(InvalidInputError, match="spans_per_passage must be at least 1"):
        reader.read(QUESTION, TEXTS, spans_per_passage=0)
    with pytest.raises(InvalidInputError, match="not inside its text"):
        reader.score(QUESTION, TEXTS, [(1, 0, 400)])
    assert reader.score(QUESTION, TEXTS, [(0, 0, len(TEXTS[0]))]) == [None]  # longer than any span may be
    with pytest.raises(InvalidInputError, match="max_tokens must be at least"):
        SpanReader(reader.model, tokenizer, longest=100, max_tokens=200)
    with pytest.raises(InvalidInputError, match="no character offsets"):
        SpanReader(reader.model, object())
    with pytest.raises(ModelNotFoundError, match="no reader at"):
        SpanReader(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match="could not be loaded as a question-answering model"):
        (tmp_path / "config.json").write_text("{}")
        SpanReader(tmp_path)


# --- the functions --------------------------------------------------------------------------------------


def test_grouped_logsumexp_is_that_of_each_group_and_passes_gradients():
    values = torch.tensor([1.0, 2.0, -3.0, 4.0, 0.5], requires_grad=True)
    groups = torch.tensor([0, 0, 2, 0, 2])
    made = grouped_logsumexp(values, groups, 3)
    plain = values.detach()
    assert made[0].item() == pytest.approx(plain[[0, 1, 3]].logsumexp(0).item(), abs=1e-6)
    assert made[2].item() == pytest.approx(plain[[2, 4]].logsumexp(0).item(), abs=1e-6)
    assert made[1].item() < -9_000
    made[0].backward()
    assert torch.allclose(values.grad[[0, 1, 3]], plain[[0, 1, 3]].softmax(0))


def test_the_loss_is_minus_the_log_of_the_right_spans_probability():
    generator = torch.Generator().manual_seed(3)
    start, end = (torch.randn(3, 7, generator=generator) for _ in range(2))
    inside = torch.zeros(3, 7, dtype=torch.bool)
    inside[:, 2:6] = True
    questions = torch.tensor([0, 0, 1])  # two passages of one question, one of another
    scores = span_scores(start, end, inside, inside, 3)
    spans = {(r, i, w): float(scores[r, i, w]) for r in range(3) for i in range(2, 6) for w in range(3) if i + w < 6}
    for r, i, w in spans:
        assert spans[r, i, w] == pytest.approx(float(start[r, i] + end[r, i + w] - start[r, 0] - end[r, 0]), abs=1e-5)
    outside = [s for (r, i, w), s in _all(scores).items() if (r, i, w) not in spans]
    assert max(outside) < -5_000
    first = math.log(1 + sum(math.exp(s) for (r, _, _), s in spans.items() if r < 2))
    second = math.log(1 + sum(math.exp(s) for (r, _, _), s in spans.items() if r == 2))
    assert shared_log_normalizer(scores, questions, 2).tolist() == pytest.approx([first, second], abs=1e-5)
    gold = torch.tensor(
        [[0, 3, 1], [1, 2, 0]]
    )  # right spans in both passages of the first question; none of the second's
    right = math.log(math.exp(spans[0, 3, 1]) + math.exp(spans[1, 2, 0]))
    loss = float(reader_loss(start, end, inside, questions, gold, 3))
    assert loss == pytest.approx(((first - right) + second) / 2, abs=1e-5)


def _all(scores):
    return {(r, i, w): float(scores[r, i, w]) for r, i, w in itertools.product(*(range(size) for size in scores.shape))}
