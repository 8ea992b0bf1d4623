"""Tool calls in RAPID's conversations: written into prompts, read out of replies."""

from specrag.models import TransformersLM
from specrag.rapid import Message, ToolCall
from specrag.rapid.chat import conversation
from specrag.rapid.tools import check_tools, parse_tool_calls
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


def test_calls_and_results_stand_in_the_conversation(tiny):
    lm = TransformersLM(tiny.model, tiny.tokenizer, chat_template=TOOL_TEMPLATE)
    check_tools(lm.encoder)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = ToolCall("weather", {"city": "Paris"})
    messages = [Message("user", "how?"), Message("assistant", "", (call,)), Message("tool", "sunny in Paris")]
    prompt, question = conversation(lm.encoder, messages, tools=[tool])
    assert '"name": "weather", "parameters"' in prompt.context and call.rendered() in prompt.context
    assert question == "<tool_response>\nsunny in Paris\n</tool_response>"
