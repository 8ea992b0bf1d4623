"""Tool calls in RAPID's conversations: written into prompts, read out of replies."""

import pytest

from specrag.models import TransformersLM
from specrag.models.tokenization import ConversationEncoder
from specrag.rapid import Message, ToolCall
from specrag.rapid.conversation import conversation
from specrag.rapid.tools import check_tools, opens_thought, parse_tool_calls, without_thinking
from tests.rapid_parts import TOOL_TEMPLATE


def test_tool_calls_are_read_out_of_text():
    text, calls, broken = parse_tool_calls(
        'Let me see.\n<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>'
        '<tool_call>{"name": "b"}</tool_call><tool_call>{"arguments": {}}</tool_call>'
    )
    assert text == "Let me see." and [(c.name, dict(c.arguments)) for c in calls] == [("a", {"x": 1}), ("b", {})]
    assert broken == ['{"arguments": {}}']
    assert parse_tool_calls("plain ") == ("plain ", [], [])


def test_what_is_written_into_a_prompt_is_read_back():
    call = ToolCall("weather", {"city": "Paris", "days": [1, 2]})
    text, (read,), broken = parse_tool_calls(f"Let me see.\n{call.rendered()}")
    assert (text, read, broken) == ("Let me see.", call, [])


CALL = '<tool_call>{"name": "delete", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>I could say {CALL} now.</think>\nNo.",
        f"I could say {CALL} now.</think>\nNo.",  # the template wrote the opening tag
        f"No.<think>But {CALL}",  # cut at the limit
        f"<think>a</think>No.<think>{CALL}</think>",
    ],
)
def test_a_call_that_is_quoted_in_a_thought_is_not_made(reply):
    assert parse_tool_calls(reply) == (reply, [], [])
    assert without_thinking(reply) == "No."


def test_a_thought_that_the_template_opened_and_that_was_cut_makes_no_call(tiny):
    assert parse_tool_calls(f"I could say {CALL} or", thinking=True) == (f"I could say {CALL} or", [], [])
    _, calls, _ = parse_tool_calls(f"I could.</think>{CALL}", thinking=True)
    assert [call.name for call in calls] == ["delete"]
    opening = ConversationEncoder(
        tiny.tokenizer, "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    assert opens_thought(opening) and not opens_thought(tiny.encoder)
    assert not opens_thought(ConversationEncoder(tiny.tokenizer, None))


def test_a_call_after_a_thought_is_made_and_the_thought_stays_text():
    text, calls, broken = parse_tool_calls(f"<think>Hm, {CALL}?</think>\n{CALL}")
    assert (text, [c.name for c in calls], broken) == (f"<think>Hm, {CALL}?</think>", ["delete"], [])


def test_a_tag_that_an_argument_quotes_opens_no_thought():
    for tag in ("<think>", "</think>"):
        block = f'<tool_call>{{"name": "find", "arguments": {{"text": "{tag}"}}}}</tool_call>'
        text, (call,), broken = parse_tool_calls(f"Let me see.\n{block}")
        assert (text, call, broken) == ("Let me see.", ToolCall("find", {"text": tag}), [])


@pytest.mark.parametrize(
    "block",
    [
        '{"name": "a", "arguments": "x = 1"}',
        '{"name": "a", "arguments": ""}',
        '{"name": "a", "arguments": [["x", 1]]}',
        '{"name": "a", "arguments": 0}',
        '{"name": "a", "arguments": "[1]"}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '[{"name": "a", "arguments": {}}]',
        "a(x=1)",
        "[" * 100_000,
        "",
    ],
)
def test_a_call_without_a_name_or_without_an_object_of_arguments_is_reported_and_not_guessed(block):
    text, calls, broken = parse_tool_calls(f"So.<tool_call>{block}</tool_call>")
    assert (text, calls, broken) == ("So.", [], [block])


def test_calls_and_results_stand_in_the_conversation(tiny):
    lm = TransformersLM(tiny.model, tiny.tokenizer, chat_template=TOOL_TEMPLATE)
    check_tools(lm.encoder)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = ToolCall("weather", {"city": "Paris"})
    messages = [Message("user", "how?"), Message("assistant", "", (call,)), Message("tool", "sunny in Paris")]
    prompt, question = conversation(lm.encoder, messages, tools=[tool])
    assert '"name": "weather", "parameters"' in prompt.context and call.rendered() in prompt.context
    tokens = prompt.encoded(lm.encoder)
    assert "<tool_response>\nsunny in Paris\n</tool_response>" in lm.tokenizer.decode(
        [*tokens.ids, *tokens.question(lm.encoder, question)]
    )
