"""RAPID: retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330)."""

from specrag._extras import require

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "local", "RAPID")

from specrag.models.base import ToolCall
from specrag.rapid.chat import RapidChat
from specrag.rapid.conversation import Message
from specrag.rapid.decoding import RapidStats
from specrag.rapid.generator import RapidGenerator
from specrag.rapid.session import LongContext, RapidOutput
from specrag.rapid.settings import RapidSettings

__all__ = [
    "LongContext",
    "Message",
    "RapidChat",
    "RapidGenerator",
    "RapidOutput",
    "RapidSettings",
    "RapidStats",
    "ToolCall",
]
