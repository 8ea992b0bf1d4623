"""A small data set: when was tower number i built? Its answers follow a rule, so that a tiny model can learn them."""

from __future__ import annotations

from specrag import Passage
from specrag.evaluation.data import Question
from specrag.training import make_examples
from tests.fakes import HashEmbedder


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
