"""``specrag serve``: Speculative RAG over indexes and RAPID over uploaded files, behind OpenAI's HTTP API.

``create_app`` makes the application out of ``ServerSettings``; ``specrag.serving.server.run`` serves it with uvicorn.
Needs the extra ``serve``.
"""

from __future__ import annotations

from specrag.serving.app import create_app
from specrag.serving.keys import ApiKeys
from specrag.serving.models import Models
from specrag.serving.settings import ServerSettings

__all__ = ["ApiKeys", "Models", "ServerSettings", "create_app"]
