import pytest

from specrag.errors import InvalidInputError
from specrag.evaluation.long_documents import LENGTHS, LongDocuments, holds_answer, spread
from specrag.evaluation.records import Question
from specrag.schema import Passage
from specrag.text import passage_text


def words(text):
    return len(text.split())


CORPUS = [Passage(f"filler number {i} says nothing of use at all", title=f"page {i}") for i in range(400)]
EVIDENCE = Passage("the treasure lies under the old oak", title="Treasure")
QUESTION = Question("q1", "where is the treasure", ("under the old oak",), (Passage("else"), EVIDENCE), gold=(1,))


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_evidence_stands_at_its_depth_and_the_document_is_as_long_as_asked(tokens, depth):
    made = LongDocuments(CORPUS, words, tokens).make(QUESTION, depth)
    assert tokens - 12 < words(made.context) == made.metadata["tokens"] <= tokens
    (gold,) = made.gold
    assert made.passages[gold] == EVIDENCE and made.metadata["depth"] == depth
    assert made.context == "\n\n".join(map(passage_text, made.passages))
    before = words("\n\n".join(map(passage_text, made.passages[:gold])))
    assert before / (made.metadata["tokens"] - words(passage_text(EVIDENCE))) == pytest.approx(depth, abs=12 / tokens)


def test_the_bounds_of_the_depth_are_the_first_and_the_last_passage():
    documents = LongDocuments(CORPUS, words, 200)
    first, last = documents.make(QUESTION, 0.0), documents.make(QUESTION, 1.0)
    assert first.gold == (0,) and last.gold == (len(last.passages) - 1,)
    assert set(first.passages) == set(last.passages), "the depth does not choose the filler"


def test_a_document_depends_on_the_seed_and_the_question_alone():
    made = LongDocuments(CORPUS, words, 300, seed=3).make(QUESTION)
    documents = LongDocuments(CORPUS, words, 300, seed=3)
    documents.make(Question("other", "q", ("none of it",), (EVIDENCE,), (0,)))
    assert documents.make(QUESTION).context == made.context
    assert LongDocuments(CORPUS, words, 300, seed=4).make(QUESTION).context != made.context
    depths = [documents.make(Question(str(i), "q", ("none",), (EVIDENCE,), (0,))).metadata["depth"] for i in range(200)]
    assert 0.4 < sum(depths) / 200 < 0.6 and min(depths) < 0.05 and max(depths) > 0.95


def test_no_filler_holds_an_answer():
    telling = [Passage(f"they say it is Under the Old-Oak, {i}") for i in range(50)]
    made = LongDocuments([*telling, *CORPUS], words, 2000).make(QUESTION, 0.5)
    assert sum(holds_answer(p, QUESTION.answers) for p in made.passages) == 1
    assert not set(telling) & set(made.passages)


def test_yes_and_no_give_nothing_away():
    yes_no = Question("y", "is it", ("No",), (EVIDENCE,), gold=(0,))
    corpus = [Passage(f"there is no end {i}") for i in range(20)]
    assert len(LongDocuments(corpus, words, 60).make(yes_no).passages) > 5


def test_evidence_of_two_passages_stands_together_in_order():
    two = Question("t", "q", ("oak", "elm"), (Passage("an oak"), Passage("x"), Passage("an elm")), gold=(0, 2))
    made = LongDocuments(CORPUS, words, 200).make(two, 0.5)
    first, second = made.gold
    assert second == first + 1
    assert (made.passages[first].text, made.passages[second].text) == ("an oak", "an elm")


def test_questions_that_share_a_document():
    asked = [Question(str(i), f"q{i}", (f"secret{i}",), (Passage(f"it is secret{i}"),), (0,)) for i in range(3)]
    telling = [Passage("we know secret2")]
    made = LongDocuments([*telling, *CORPUS], words, 400).share(asked, spread(3))
    assert len({q.context for q in made}) == 1 and spread(3) == [0.25, 0.5, 0.75]
    places = [q.gold[0] / len(q.passages) for q in made]
    assert places == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
    assert all(q.passages[q.gold[0]].text == f"it is secret{q.id}" for q in made)
    assert telling[0] not in made[0].passages


def test_a_small_corpus_is_repeated_only_on_request():
    with pytest.raises(InvalidInputError, match=r"fill \d+ of 500 tokens: give more passages"):
        LongDocuments(CORPUS[:5], words, 500).make(QUESTION)
    made = LongDocuments(CORPUS[:5], words, 500, repeat=True).make(QUESTION, 0.5)
    assert 488 < words(made.context) <= 500 and made.passages[made.gold[0]] == EVIDENCE
    with pytest.raises(InvalidInputError, match="give more passages"):
        LongDocuments([EVIDENCE], words, 500, repeat=True).make(QUESTION)


def test_joined_texts_that_take_more_tokens_than_their_parts_still_fit():
    def counts_gaps(text):
        return words(text) + 5 * text.count("\n\n") if text.strip() else 0

    made = LongDocuments(CORPUS, counts_gaps, 300).make(QUESTION, 0.5)
    assert counts_gaps(made.context) <= 300 and made.passages[made.gold[0]] == EVIDENCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.make(Question("g", "q", ("a",), (EVIDENCE,))), "'g' has no gold passage"),
        (lambda d: d.make(QUESTION, 1.5), r"expected a depth in \[0, 1\]"),
        (lambda d: d.share([QUESTION], [0.1, 0.2]), r"for each of 1 questions, got \[0.1, 0.2\]"),
        (lambda d: LongDocuments(CORPUS, words, 5).make(QUESTION), "the evidence alone takes 8 tokens"),
        (lambda d: LongDocuments([], words, 50), "holds no passage"),
        (lambda d: LongDocuments(CORPUS, words, 0), "tokens must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(change, message):
    with pytest.raises(InvalidInputError, match=message):
        change(LongDocuments(CORPUS, words, 100))


def test_with_a_real_tokenizer_and_real_passages(questions, smollm2_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    corpus = [p for q in questions for p in q.passages]
    asked = next(q for q in questions if q.gold)
    documents = LongDocuments(corpus, count, LENGTHS[0], repeat=True)
    made = documents.make(asked, 0.5)
    assert LENGTHS[0] - 400 < count(made.context) <= LENGTHS[0]
    assert sum(holds_answer(p, asked.answers) for p in made.passages) <= len(asked.gold)
