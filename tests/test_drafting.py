import math

import pytest

from specrag.errors import InvalidInputError, ModelError
from specrag.models import Completion, GeneratedText
from specrag.schema import Passage
from specrag.speculative._fitting import share
from specrag.speculative.drafting import Assignment, Drafter, split_reply
from specrag.speculative.prompts import Prompts
from tests.fakes import ScriptedLM, part

PASSAGES = (Passage("one two three", title="T"), Passage("four five six"))


def drafter(reply=lambda text: ("because", "42"), **options) -> Drafter:
    return Drafter(ScriptedLM(reply, **options))


def read(completion: Completion, prompts: Prompts = Prompts()):
    return Drafter(ScriptedLM(lambda _: None), prompts).read(completion, Assignment(3, (0, 1), PASSAGES), seconds=1.0)


def test_a_draft_holds_the_parts_and_their_log_probabilities_without_headers():
    draft = read(Completion((part(" It says so. ", -0.25), part(" 42 ", -1.5))))
    assert (draft.rationale, draft.text) == ("It says so.", "42")
    assert draft.log_rationale == pytest.approx(3 * -0.25)
    assert draft.log_answer == pytest.approx(-1.5)
    assert draft.subset == (0, 1) and draft.passages == PASSAGES and not draft.abstained
    assert draft.index == 3 and draft.seconds == 1.0


@pytest.mark.parametrize("answer", ["not in the passages", " Not in the passages. ", "NOT IN THE PASSAGES"])
def test_the_abstention_marker_is_recognised_before_scoring(answer):
    assert read(Completion((part("x"), part(answer)))).abstained


def test_an_answer_that_merely_mentions_the_marker_does_not_abstain():
    assert not read(Completion((part("x"), part("it is not in the passages of arms")))).abstained


@pytest.mark.parametrize("text", ["", "  \n"])
def test_no_answer_is_a_lost_draft(text):
    with pytest.raises(ModelError, match="wrote no answer"):
        read(Completion((part("x"), part(text))))


def test_log_probabilities_that_are_not_numbers_are_a_lost_draft():
    with pytest.raises(ModelError, match="NaN"):
        read(Completion((part("x", math.nan), part("42"))))


def free(text: str) -> GeneratedText:
    """A reply in free form, a token a word, each with the log-probability -(its number)."""
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or (text[i].isspace() and not text[i - 1].isspace())]
    return GeneratedText(text, tuple(-float(i) for i in range(len(ends))), len(ends), tuple(ends))


def test_a_reply_in_free_form_is_split_at_its_headers():
    rationale, answer = split_reply(free("Rationale: it says so\nAnswer: forty two"), Prompts())
    assert (rationale.text.strip(), answer.text) == ("it says so", "forty two")
    assert rationale.log_probs == (-1.0, -2.0, -3.0)  # "Rationale:" was token 0
    assert answer.log_probs == (-5.0, -6.0)


@pytest.mark.parametrize(
    ("reply", "rationale", "answer"),
    [
        ("**Rationale:** because\n\n**Answer:** 42\nmore talk", "because", "42"),
        ("answer: 42", "", "42"),
        ("42", "", "42"),
        ("He said it.\nAnswer: 42", "He said it.", "42"),
        ("Rationale: He said it. Answer: 42", "He said it.", "42"),
        ('Rationale: He wrote "It is." **Answer:** 42\nmore', 'He wrote "It is."', "42"),
        ("Rationale: Of all, Answer: a novel won.\nAnswer: 42", "Of all, Answer: a novel won.", "42"),
        ("Rationale: Of all, Answer: a novel won.", "", "Of all, Answer: a novel won."),
        ("Rationale: the answer: 42 was said. It won.", "", "the answer: 42 was said. It won."),
        ("It won. Answer: 42", "", "It won. Answer: 42"),
    ],
)
def test_formats_that_models_really_write(reply, rationale, answer):
    made = split_reply(GeneratedText(reply, None, 3), Prompts())
    assert (made[0].text.strip(), made[1].text.strip()) == (rationale, answer)
    assert made[0].log_probs is None


def test_a_drafter_that_ignores_the_format_still_drafts():
    draft = read(Completion((free("just the answer"),), staged=False))
    assert (draft.text, draft.rationale) == ("just the answer", "")


def test_passages_are_cut_to_fit_the_window_short_ones_kept_whole():
    lm = drafter(window=400)
    long = Passage("word " * 5000, title="long")
    short = Passage("short one")
    fitted, cut = lm.fit("q", (long, short))
    assert cut and fitted[1].text == short.text and long.text.startswith(fitted[0].text)
    request = lm.request("q", fitted)
    assert lm.lm.count_tokens(request.turns[-1].text) + request.max_tokens <= 400
    assert len(fitted[0].text.split()) > 100  # and not more than needed


def test_passages_that_fit_are_not_even_counted():
    lm = drafter(window=100_000)
    lm.lm.count_tokens = lambda text: pytest.fail("counted")
    assert lm.fit("q", PASSAGES) == (PASSAGES, False)


def test_a_question_that_leaves_no_room_is_refused():
    with pytest.raises(InvalidInputError, match="leaves no room"):
        drafter(window=100).fit("why " * 200, PASSAGES)


@pytest.mark.parametrize(
    ("room", "sizes", "expected"),
    [(10, [3, 3], [3, 3]), (10, [2, 50], [2, 8]), (9, [50, 50, 50], [3, 3, 3]), (10, [1, 4, 90], [1, 4, 5])],
)
def test_room_is_shared_fairly(room, sizes, expected):
    assert share(room, sizes) == expected


def test_limits_below_one_are_refused():
    with pytest.raises(InvalidInputError, match="max_answer_tokens"):
        Drafter(ScriptedLM(lambda _: None), max_answer_tokens=0)
