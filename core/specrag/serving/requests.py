"""The bodies of requests, checked.

A field that OpenAI's API has is taken. One that would change the answer and cannot be obeyed is refused with its name;
one that changes nothing (``user``, ``metadata``, ...) is passed over. A field that OpenAI's API does not have is
refused, as it is there; ``specrag`` is the extension.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

_STOPS = 4  # as many as OpenAI's API takes
Name = Annotated[str, Field(min_length=1, max_length=256)]
Chance = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Extension(BaseModel):
    """The field ``specrag`` of a request.

    Attributes:
        index: The index to ask, in place of the first.
        top: Passages to retrieve.
        deadline: Seconds after which the best draft so far is the answer.
        file_ids: Uploaded files that RAPID reads, in this order.
        events: Tell each draft and verdict as it is made, in a streamed answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    index: Name | None = None
    top: Annotated[int, Field(ge=1, le=100)] | None = None
    deadline: Annotated[float, Field(gt=0, le=3600)] | None = None
    file_ids: Annotated[list[Name], Field(max_length=64)] = []
    events: bool = False


class StreamOptions(BaseModel):
    """OpenAI's options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class Message(BaseModel):
    """A message of a conversation. ``content``: a text, or OpenAI's parts."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None


class Generation(BaseModel):
    """What chat completions and completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # What each field may be at most: other values would change the answer.
    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
    }

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Chance | None = None
    max_tokens: Count | None = None
    specrag: Extension = Extension()

    n: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    user: Any = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Any) -> tuple[str, ...]:
        stops = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise PydanticCustomError("string_type", "a string that is not empty, or a list of these, is expected")
        if len(stops) > _STOPS:
            raise PydanticCustomError("too_long", "at most 4 strings are taken")
        return tuple(stops)

    @field_validator("*", mode="after")
    @classmethod
    def _check_supported(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = cls.supported.get(info.field_name or "")
        if allowed is not None and value is not None and not any(_equal(value, one) for one in allowed):
            listed = " or ".join(repr(one) for one in allowed)
            raise PydanticCustomError("unsupported_value", "this server takes {listed} alone", {"listed": listed})
        return value

    @property
    def longest(self) -> int | None:
        """The number of tokens asked for."""
        return self.max_tokens


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.supported,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None

    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    supported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Generation.supported,
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (0,),
        "suffix": ("",),
    }

    prompt: Any
    best_of: Any = None
    echo: Any = None
    logprobs: Any = None
    suffix: Any = None

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> str:
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str):
            raise PydanticCustomError("string_type", "one text is expected; token ids and several texts are not taken")
        return value


class EmbeddingRequest(BaseModel):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Name
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: Any = None

    @field_validator("input")
    @classmethod
    def _check_input(cls, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise PydanticCustomError(
                "string_type", "a text that is not empty, or a list of these, is expected; token ids are not taken"
            )
        if len(texts) > 2048:
            raise PydanticCustomError("too_long", "at most 2,048 texts are taken")
        return texts


def _equal(value: Any, allowed: Any) -> bool:
    """Equality that tells ``True`` from 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
