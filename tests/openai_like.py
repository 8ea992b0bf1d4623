"""What LlamaIndex's `OpenAILike` gets from `specrag serve`, as JSON: PYTHON tests/openai_like.py URL QUESTION

Run by the Python of another environment: llama-index-llms-openai asks for openai<3.
"""

import asyncio
import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main(url, question):
    llm = OpenAILike(api_base=url, api_key="none", model="speculative-rag", is_chat_model=True, temperature=0)
    messages = [ChatMessage(role="user", content=question)]
    got = {
        "complete": llm.complete(question).text,
        "stream_complete": [*llm.stream_complete(question)][-1].text,
        "chat": llm.chat(messages).message.content,
        "stream_chat": [*llm.stream_chat(messages)][-1].message.content,
        "acomplete": asyncio.run(llm.acomplete(question)).text,
    }
    print(json.dumps(got))


if __name__ == "__main__":
    main(*sys.argv[1:])
