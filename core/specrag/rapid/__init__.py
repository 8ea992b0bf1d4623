"""RAPID: retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330)."""

from specrag.rapid.chat import Message, RapidChat
from specrag.rapid.decoding import RapidStats
from specrag.rapid.generator import RapidGenerator
from specrag.rapid.session import LongContext, RapidOutput
from specrag.rapid.settings import RapidSettings
from specrag.rapid.tools import ToolCall

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
