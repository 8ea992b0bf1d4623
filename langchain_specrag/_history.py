"""Questions in a conversation: a follow-up as a question that stands on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda

from specrag.errors import InvalidInputError, kind_of

#: The conversation so far, in the chain's input.
HISTORY = "chat_history"
#: The question that stands on its own, in the chain's result.
STANDALONE = "standalone_question"
#: The note on an answer that did not use the conversation.
HISTORY_NOTE = (
    "chat_history is not used: give create_speculative_rag_chain(condense=model), or a question that stands on its own"
)
_INSTRUCTION = (
    "Rewrite the last question so that it can be understood without the conversation before it. "
    "Do not answer it. Reply with the question alone; if it stands on its own already, repeat it."
)


def condensing(model: Any) -> Runnable[Any, str]:
    """From the chain's input to the question that stands on its own; without a conversation the question as it is.

    Raises:
        InvalidInputError: ``model`` is no LangChain model.
    """
    if not isinstance(model, Runnable):
        raise InvalidInputError(f"condense must be a LangChain model, got {kind_of(model)}")
    prompt = ChatPromptTemplate.from_messages(
        [("system", _INSTRUCTION), MessagesPlaceholder(HISTORY), ("human", "{input}")]
    )
    rewritten = RunnableLambda(_with_list) | prompt | model | StrOutputParser()
    steps: Runnable[Any, str] = RunnableBranch((_without_history, _question), rewritten)
    return steps.with_config(run_name="condense_question")


def _without_history(inputs: Mapping[str, Any]) -> bool:
    return not inputs.get(HISTORY)


def _question(inputs: Mapping[str, Any]) -> str:
    return str(inputs["input"])


def _with_list(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The input with its conversation as a list of messages; a text is what the user said."""
    said = inputs[HISTORY]
    return {"input": inputs["input"], HISTORY: [("human", said)] if isinstance(said, str) else list(said)}


def question_to_retrieve(inputs: Mapping[str, Any]) -> str:
    """What to retrieve for.

    Raises:
        InvalidInputError: There is no question, or it is no text.
    """
    question = inputs.get(STANDALONE) or inputs.get("input")
    if not isinstance(question, str):
        found = f"{kind_of(question)}" if "input" in inputs else f"only {', '.join(map(str, inputs)) or 'nothing'}"
        raise InvalidInputError(f"the chain takes a mapping with 'input', the question as text; got {found}")
    return question
