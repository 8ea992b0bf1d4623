"""Instruction-tuning examples for the drafter: question and passages -> rationale, then answer (paper, section 3.2).

An example holds what a draft will see: a few passages in any order.
When none of them answers the question, the rationale says so and the answer is the abstention marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specrag.errors import InvalidInputError
from specrag.evaluation.data import Question
from specrag.models.base import GenerationRequest
from specrag.models.embedders import Embedder
from specrag.models.tokenization import ConversationEncoder
from specrag.schema import Passage
from specrag.speculative.drafting import Drafter
from specrag.speculative.prompts import RIGHT, WRONG, Prompts
from specrag.text import passage_text, spelled, yes_or_no
from specrag.training.rationales import answer_in, extractive_rationale, supporting_rationale
from specrag.training.substitution import Substitutes

#: The rationale of an example whose passages do not answer the question.
NO_EVIDENCE = "The passages do not say."
# Questions whose similarities to all passages are in memory at once.
_CHUNK = 512
#: The label of a token that has no loss.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """What a drafter reads (``question``, ``passages``) and what it should write (``rationale``, ``answer``).

    Attributes:
        answerable: Whether the passages answer the question.
        right: An answer is right when it contains one of these; by default ``answer`` itself.
        verdict: What the drafter shall say of this draft behind it, where it is its own (``judged_drafts``).
        imitated: Whether the drafter shall learn to write this draft.
    """

    question: str
    passages: tuple[Passage, ...]
    rationale: str
    answer: str
    answerable: bool = True
    right: tuple[str, ...] = ()
    verdict: bool | None = None
    imitated: bool = True


@dataclass(frozen=True)
class Mixture:
    """Which passages the examples show, as shares of all examples.

    The first three are shares in [0, 1], together at most 1.
    All other examples show the gold passages with one distractor, in random order.

    Args:
        unanswerable: Distractors only, or a part of a multi-hop record's gold passages.
        gold_alone: The gold passages and nothing else.
        wide: The gold passages with two or three distractors.
        negatives: Distractors are drawn from this many nearest passages (the hard ones), and one in five from farther
            away.
        substituted: Share of the answerable examples in which another record's answer of the same kind replaces the
            answer, in passages and rationale, so that the drafter must read it and cannot recall it. In [0, 1].
    """

    unanswerable: float = 0.22
    gold_alone: float = 0.18
    wide: float = 0.08
    negatives: int = 10
    substituted: float = 0.0

    def __post_init__(self) -> None:
        shares = [self.unanswerable, self.gold_alone, self.wide]
        if min(shares) < 0 or sum(shares) > 1:
            raise InvalidInputError(f"the shares of a mixture must lie in [0, 1] and sum to at most 1, got {shares}")
        if not 0 <= self.substituted <= 1:
            raise InvalidInputError(f"substituted must lie in [0, 1], got {self.substituted}")
        if self.negatives < 1:
            raise InvalidInputError(f"negatives must be at least 1, got {self.negatives}")


def make_examples(
    records: Sequence[Question],
    embedder: Embedder,
    *,
    variants: int = 1,
    mixture: Mixture = Mixture(),
    rationales: Mapping[str, str] | None = None,
    corpus: Sequence[Passage] = (),
    prompts: Prompts = Prompts(),
    seed: int = 0,
) -> list[list[Example]]:
    """``variants`` rounds of examples, with one example per record and round, each with its own distractors and order.

    Distractors are the passages of all records and of ``corpus`` that are nearest to the question and hold none of
    its answers. A record whose gold passages do not contain its answer is left out, unless it has a rationale, or its
    answer is yes or no: then the example's answer is "Yes" or "No", whatever the passages contain.

    Args:
        rationales: By record id (``synthesize_rationales``). A record without one gets the extractive rationale.

    Raises:
        InvalidInputError: No record can be used.
    """
    known = [p for record in records for p in record.passages]
    corpus = list({passage_text(p): p for p in (*known, *corpus)}.values())
    usable = [(record, *found) for record in records if (found := _target(record, rationales or {})) is not None]
    if not usable:
        raise InvalidInputError(
            f"none of the {len(records)} records can be used: a gold passage must contain the answer verbatim, "
            "the answer must be yes or no, or a rationale must be given"
        )
    if len(corpus) < 3:
        raise InvalidInputError(f"the records have {len(corpus)} different passages: distractors need at least 3")
    texts = [passage_text(p) for p in corpus]
    vectors = embedder.embed(texts)
    folded = [text.casefold() for text in texts]
    random = np.random.default_rng(seed)
    pools = []
    for at in range(0, len(usable), _CHUNK):  # similarities of all questions at once would fill the memory
        part = [record for record, *_ in usable[at : at + _CHUNK]]
        near = embedder.embed([record.question for record in part]) @ vectors.T
        pools += [_distractors(record, row, texts, folded, mixture) for record, row in zip(part, near, strict=True)]
    substitutes = Substitutes((record, answer) for record, answer, _ in usable)
    return [
        [
            _example(
                record,
                answer,
                rationale,
                [[corpus[i] for i in part] for part in pool],
                mixture,
                prompts,
                substitutes,
                random,
            )
            for (record, answer, rationale), pool in zip(usable, pools, strict=True)
        ]
        for _ in range(variants)
    ]


def _target(record: Question, rationales: Mapping[str, str]) -> tuple[str, str] | None:
    """The answer and the rationale to write from the gold passages; ``None`` when the record cannot be used."""
    given = rationales.get(record.id)
    if said := yes_or_no(record.answers):
        shown = given or supporting_rationale(record.question, [record.passages[i] for i in record.gold])
        return (said, " ".join(shown.split())) if record.gold and shown else None
    for i in record.gold:
        answer = answer_in(record.passages[i], record.answers)
        if answer is None:
            continue
        rationale = given or extractive_rationale(record.question, answer, record.passages[i])
        if rationale:
            return answer, " ".join(rationale.split())
    return (record.answers[0], " ".join(given.split())) if given and record.gold else None


def _distractors(
    record: Question, near: np.ndarray, texts: Sequence[str], folded: Sequence[str], mixture: Mixture
) -> tuple[list[int], list[int]]:
    """The positions of the hard distractors, nearest first, and of some farther ones."""
    own = {passage_text(record.passages[i]) for i in record.gold}
    answers = spelled(record.answers)
    wanted, looked_at = 5 * mixture.negatives, 20 * mixture.negatives
    while True:  # nearly always the nearest few hundred hold enough of them
        looked_at = min(looked_at, len(near))
        nearest = np.argpartition(-near, looked_at - 1)[:looked_at]
        ordered = nearest[np.argsort(-near[nearest], kind="stable")]
        found = [
            int(at) for at in ordered if texts[at] not in own and not any(answer in folded[at] for answer in answers)
        ][:wanted]
        if len(found) == wanted or looked_at == len(near):
            break
        looked_at *= 10
    return found[: mixture.negatives], found[mixture.negatives :]


def _example(
    record: Question,
    answer: str,
    rationale: str,
    pool: Sequence[Sequence[Passage]],
    mixture: Mixture,
    prompts: Prompts,
    substitutes: Substitutes,
    random: np.random.Generator,
) -> Example:
    kind = random.random()
    answerable = kind >= mixture.unanswerable
    if (
        answerable
        and random.random() < mixture.substituted
        and (found := substitutes.substitute(record, answer, rationale, random))
    ):
        record, answer, rationale = found
    gold = [record.passages[i] for i in record.gold]
    if not answerable:
        part = list(random.permutation(len(gold))[: len(gold) - 1]) if len(gold) > 1 and random.random() < 0.5 else []
        kept, others = [gold[i] for i in part], max(2 - len(part), 1)
    else:
        kept, others = gold, 1
        if kind < mixture.unanswerable + mixture.gold_alone:
            others = 0
        elif kind < mixture.unanswerable + mixture.gold_alone + mixture.wide:
            others = int(random.integers(2, 4))
    passages = kept + _drawn(pool, others, random)
    shown = tuple(passages[i] for i in random.permutation(len(passages)))
    if answerable:
        return Example(record.question, shown, rationale, answer, right=tuple(record.answers))
    return Example(record.question, shown, NO_EVIDENCE, prompts.abstention, answerable=False)


def _drawn(pool: Sequence[Sequence[Passage]], count: int, random: np.random.Generator) -> list[Passage]:
    hard, far = list(pool[0]), list(pool[1])
    drawn: list[Passage] = []
    for _ in range(count):
        source = far if far and random.random() < 0.2 else hard or far
        if source:
            drawn.append(source.pop(int(random.integers(len(source)))))
    return drawn


# --- tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedExample:
    """Token ids and labels of one example. The label is ``IGNORED`` where a token has no loss."""

    ids: list[int]
    labels: list[int]

    @property
    def completion(self) -> int:
        """Tokens from the first one with a loss to the end."""
        return next((len(self.labels) - i for i, label in enumerate(self.labels) if label != IGNORED), 0)


def encode_example(example: Example, drafter: Drafter, encoder: ConversationEncoder, end: int) -> EncodedExample:
    """Exactly the tokens of drafting. Headers are prefilled there, so they have no loss here.

    The loss covers the rationale, the line break that ends it, the answer, and ``end`` (the id that ends a reply).
    An example with a verdict adds that; when it is not ``imitated``, the loss covers the verdict alone.

    Raises:
        InvalidInputError: The example has a verdict, and the drafter's prompts ask for none.
    """
    request: GenerationRequest = drafter.request(example.question, example.passages)
    ids = encoder.encode_generation(request)
    labels = [IGNORED] * len(ids)

    def add(tokens: Sequence[int], targets: Sequence[int] = ()) -> None:
        ids.extend(tokens)
        labels.extend([*targets, *[IGNORED] * (len(tokens) - len(targets))])

    rationale = encoder.encode_text(" " + encoder.sanitize(example.rationale))
    answer_header = encoder.encode_text(request.stages[1].header)
    answer = encoder.encode_text(" " + encoder.sanitize(example.answer))
    if example.imitated:
        add(rationale, rationale)
        add(answer_header, answer_header[:1])  # its line break ends the rationale; the rest is prefilled
        add(answer, answer)
    else:
        add([*rationale, *answer_header, *answer])
    if example.verdict is None:
        add([end], [end] if example.imitated else ())
        return EncodedExample(ids, labels)
    if len(request.stages) < 3:
        raise InvalidInputError("an example has a verdict, and the prompts have no verdict_header: give them one")
    # In drafting, the header comes in place of the end that the drafter writes.
    add(encoder.encode_text(request.stages[2].header), [end] if example.imitated else ())
    said = encoder.encode_text(f" {RIGHT if example.verdict else WRONG}")
    add(said, said)
    return EncodedExample(ids, labels)


def in_batches(rounds: Sequence[Sequence[EncodedExample]], batch_size: int, seed: int = 0) -> list[EncodedExample]:
    """All rounds in training order. A round has batches of similar length, and the batches are shuffled."""
    random = np.random.default_rng(seed)
    ordered: list[EncodedExample] = []
    for examples in rounds:
        shuffled = [examples[int(i)] for i in random.permutation(len(examples))]
        pool = 50 * batch_size
        batches: list[list[EncodedExample]] = []
        for at in range(0, len(shuffled), pool):
            alike = sorted(shuffled[at : at + pool], key=lambda e: len(e.ids))
            batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
        last = [b for b in batches if len(b) < batch_size]
        full = [b for b in batches if len(b) == batch_size]
        random.shuffle(full)  # type: ignore[arg-type]
        ordered += [e for b in (*full, *last) for e in b]
    return ordered
