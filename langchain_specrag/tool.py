"""Speculative RAG as a tool of agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ConfigDict, Field

from langchain_specrag.chain import create_speculative_rag_chain
from specrag.errors import InvalidInputError

NAME = "search_documents"
DESCRIPTION = "Answers a question from the indexed documents, with the evidence for the answer."
NO_ANSWER = "The documents do not answer this question."


class QuestionInput(BaseModel):
    """The arguments of ``SpeculativeRAGTool``."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(description="A complete question that stands on its own.", min_length=1, pattern=r"\S")


class SpeculativeRAGTool(BaseTool):
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
            return self._shown(self.chain.invoke({"input": question}, config))

    async def _arun(self, question: str, config: RunnableConfig) -> tuple[str, dict[str, Any]]:
        with _refusals_for_the_agent():
            return self._shown(await self.chain.ainvoke({"input": question}, config))

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
