"""Speculative RAG as a tool of agents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, field_validator

from langchain_specrag._rebuilt import KnownSettings
from langchain_specrag.chain import create_speculative_rag_chain
from specrag.errors import InvalidInputError

NAME = "search_documents"
DESCRIPTION = "Answers a question from the indexed documents, with the evidence for the answer."
# Names that models give to the question.
_NAMES = ("question", "query", "input", "text")
NO_ANSWER = "The documents do not answer this question."


class QuestionInput(BaseModel):
    """The arguments of ``SpeculativeRAGTool``."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(description="A complete question that stands on its own.", min_length=1, pattern=r"\S")

    @field_validator("question", mode="before")
    @classmethod
    def _unpacked(cls, given: Any) -> Any:
        return unpacked(given)


def unpacked(given: Any) -> Any:
    """The question in what small models write for it: a list of one text, an object around it, or that as JSON text."""
    value = given
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        found = [value[name] for name in _NAMES if isinstance(value.get(name), str)]
        value = found[0] if len(found) == 1 else value
    return value if isinstance(value, str) else given


class SpeculativeRAGTool(KnownSettings, BaseTool):
    """Answers an agent's question from documents. The artifact is the chain's whole result.

    Setup:
        ```bash
        pip install 'specrag[langchain,local]'
        specrag models fetch  # the bundled drafter and embedder
        ```

    Key init args:
        chain: From ``create_speculative_rag_chain``.
        name, description: What the agent knows of the tool.
        handle_tool_error: By default the agent reads why the documents could not be asked (the question is too long,
            say) and may ask another one. ``False`` raises a ``ToolException``.

    Instantiate:
        ```python
        from langchain_specrag import SpeculativeRAGTool

        tool = SpeculativeRAGTool.from_retriever(retriever, description="Answers questions about physics.")
        ```

    Invoke:
        ```python
        tool.invoke({"question": "who discovered radium"})
        ```

    Async:
        ```python
        await tool.ainvoke({"question": "who discovered radium"})
        ```

    Agent:
        ```python
        agent = create_agent(model, [tool])
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    name: str = NAME
    description: str = DESCRIPTION
    args_schema: Any = QuestionInput
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True
    chain: Runnable[Any, Any] = Field(exclude=True)
    no_answer: str = NO_ANSWER

    @classmethod
    def from_retriever(
        cls,
        retriever: Any,
        drafter: Any = None,
        verifier: Any = None,
        *,
        name: str = NAME,
        description: str = DESCRIPTION,
        **settings: Any,
    ) -> SpeculativeRAGTool:
        """A tool over a new chain. The other arguments are those of ``create_speculative_rag_chain``."""
        chain = create_speculative_rag_chain(retriever, drafter, verifier, **settings)
        return cls(chain=chain, name=name, description=description)

    def _run(self, question: str, config: RunnableConfig) -> tuple[str, dict[str, Any]]:
        with _refusals_for_the_agent():
            return self._shown(self.chain.invoke({"input": unpacked(question)}, config))

    async def _arun(self, question: str, config: RunnableConfig) -> tuple[str, dict[str, Any]]:
        with _refusals_for_the_agent():
            return self._shown(await self.chain.ainvoke({"input": unpacked(question)}, config))

    def _shown(self, result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if result["abstained"]:
            return self.no_answer, result
        evidence = f"\nEvidence: {result['rationale']}" if result["rationale"] else ""
        return result["answer"] + evidence, result


@contextmanager
def _refusals_for_the_agent() -> Iterator[None]:
    """What the core refuses goes to the agent. A model or server that fails is for the developer."""
    try:
        yield
    except InvalidInputError as error:
        raise ToolException(f"The question was refused: {error}") from error
