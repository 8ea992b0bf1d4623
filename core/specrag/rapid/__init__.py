"""RAPID: retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330)."""

from specrag._extras import require

# ruff: noqa: E402 - the message that says what to install comes before that of `import torch`
require("torch", "local", "RAPID")

from specrag.rapid.chat import Message, RapidChat, ToolCall
from specrag.rapid.decoding import RapidSettings, RapidStats
from specrag.rapid.draft_length import Controller
from specrag.rapid.session import LongContext, RapidGenerator, RapidOutput

__all__ = [
    "Controller",
    "LongContext",
    "Message",
    "RapidChat",
    "RapidGenerator",
    "RapidOutput",
    "RapidSettings",
    "RapidStats",
    "ToolCall",
]
