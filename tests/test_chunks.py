"""Retrieval within a long context: chunks, budget, confidence."""

import numpy as np
import pytest
import torch

from specrag.rapid import LongContext, RapidStats
from specrag.rapid.chunks import Chunks, select
from tests.fakes import HashEmbedder
from tests.rapid_parts import DOCUMENT, generator


def test_retrieved_chunks_stand_in_document_order_within_the_budget(smollm2_tokenizer, minilm, questions):
    passages = [p.text for q in questions[:4] for p in q.passages]
    context = smollm2_tokenizer.encode("\n\n".join(passages), add_special_tokens=False)
    gold = questions[3].passages[questions[3].gold[0]].text
    retrieved = Chunks(context, smollm2_tokenizer).retrieve(questions[3].question, 700, minilm)
    tokens = [context[i] for i in retrieved.positions]
    assert len(tokens) <= 700 and 0 < retrieved.confidence <= 1 and retrieved.similar
    assert gold[:60] in smollm2_tokenizer.decode(tokens)
    assert retrieved.positions == sorted(set(retrieved.positions))


def test_the_best_chunks_are_taken_until_the_budget_is_used_and_the_last_one_is_cut():
    similar = np.array([0.31, 0.9, 0.2, 0.5])
    taken = select(similar, length=4 * 512 - 100, budget=700)
    assert taken.positions == [*range(512, 1024), *range(3 * 512, 3 * 512 + 188)]  # chunk 1, then some of 3
    assert select(similar, 4 * 512 - 100, 10_000).positions == [*range(1024), *range(3 * 512, 4 * 512 - 100)]


@pytest.mark.parametrize(("cosine", "confidence"), [(0.31, 0.025), (0.5, 0.5), (0.7, 1.0), (0.95, 1.0)])
def test_the_confidence_grows_with_the_best_cosine(cosine, confidence):
    assert select(np.array([0.1, cosine]), 1000, 600).confidence == pytest.approx(confidence)


def test_where_nothing_is_similar_the_beginning_and_the_end_are_taken():
    for length, budget, expected in ((1000, 101, [*range(51), *range(950, 1000)]), (80, 101, list(range(80)))):
        retrieved = select(np.array([0.3, -0.5]), length, budget)
        assert retrieved.positions == expected and retrieved.confidence == 0 and not retrieved.similar


class Aloof(HashEmbedder):
    """Nothing is similar to a question asked alone."""

    def embed(self, texts):
        return torch.eye(2)[[0] * len(texts) if len(texts) > 1 else [1]].numpy()


def test_retrieving_nothing_falls_back_to_head_and_tail_and_says_so(tiny):
    session = LongContext(DOCUMENT, generator(tiny, candidates=2, retrieval_budget=100, embedder=Aloof()))
    stats = RapidStats()
    tokens, confidence = session.retrieve("zzz", stats)
    context = session.prompt.context
    assert tokens == [*context[:50], *context[-50:]] and confidence == 0
    assert "nothing retrieved" in stats.notes[0]


def test_the_budget_follows_the_design(tiny):
    assert generator(tiny).budget(1000) == 512
    assert generator(tiny).budget(16_000) == 1000
    assert generator(tiny, retrieval_budget=99).budget(16_000) == 99
