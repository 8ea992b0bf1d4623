"""Prompts over long contexts: rendered as the template would, cut where no question can move the boundary."""

from specrag.models.base import Turn
from specrag.rapid.prompt import PromptTokens, conversation_prompt, document_prompt


def rendered(lm, *messages: tuple[str, str]) -> str:
    return lm.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages], tokenize=False, add_generation_prompt=True
    )


def text_of(lm, prompt, question: str) -> str:
    """The prompt with ``question`` in it, by way of its tokens."""
    tokens = prompt.encoded(lm.encoder)
    return lm.tokenizer.decode([*tokens.ids, *tokens.question(lm.encoder, question)])


def test_a_document_stands_before_the_question_in_the_users_turn(tiny):
    prompt = document_prompt(tiny.encoder, "  The report.\n")
    assert prompt.context == "The report."
    assert text_of(tiny, prompt, "why?") == rendered(tiny, ("user", "The report.\n\nwhy?"))


def test_a_document_of_a_conversation_stands_in_its_first_user_turn(tiny):
    turns = [Turn.of("system", "S"), Turn.of("user", "Q1"), Turn.of("assistant", "A1"), Turn.of("user", "Q2")]
    prompt = document_prompt(tiny.encoder, "The report.", turns)
    expected = rendered(tiny, ("system", "S"), ("user", "The report.\n\nQ1"), ("assistant", "A1"), ("user", "Q2"))
    assert prompt.context == "The report." and text_of(tiny, prompt, "Q2") == expected


def test_a_conversation_is_the_context_of_its_last_turn(tiny):
    turns = [Turn.of("user", "Q1"), Turn.of("assistant", "A1"), Turn.of("user", "Q2")]
    prompt = conversation_prompt(tiny.encoder, turns)
    assert prompt.head == "" and "A1" in prompt.context and "Q2" not in prompt.context
    assert text_of(tiny, prompt, "Q2") == rendered(tiny, ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"))


def test_without_a_template_document_and_question_are_plain_text(unigram_lm):
    prompt = document_prompt(unigram_lm.encoder, "the report")
    assert (prompt.head, prompt.context) == ("", "the report")
    assert text_of(unigram_lm, prompt, "the question").split() == ["the", "report", "the", "question"]


def test_no_text_can_stand_where_the_question_or_the_document_belongs(tiny):
    markers = "\ue0f2\ue0f3"
    for prompt in (
        document_prompt(
            tiny.encoder, f"The {markers}report.", [Turn.of("system", f"S{markers}"), Turn.of("user", "x")]
        ),
        conversation_prompt(tiny.encoder, [Turn.of("user", f"The {markers}report."), Turn.of("user", "x")]),
    ):
        text = text_of(tiny, prompt, "why?")
        assert "The report." in text and text.count("why?") == 1 and not set(markers) & set(text)


def test_no_question_moves_the_boundary_of_the_context(tiny):
    tokens = document_prompt(tiny.encoder, "The report ends here").encoded(tiny.encoder)
    for question in ("why?", "\n\nwhy?", " ing?", "<|im_end|>"):
        assert tokens.question(tiny.encoder, question)[:1] == tokens.question(tiny.encoder, "x")[:1]


def test_prompts_share_what_they_begin_with_alike():
    prompt = PromptTokens((1, 2), (3, 4, 5), "tail")
    assert prompt.ids == (1, 2, 3, 4, 5)
    assert [prompt.shared_with(other) for other in ([], [1, 2, 9], [1, 2, 3, 4, 5, 6], [7])] == [0, 2, 5, 0]
    assert prompt.with_tail("other").ids == prompt.ids and prompt.with_tail("tail") is prompt
