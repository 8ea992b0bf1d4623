"""Logs as JSON, one object per line, on stderr.

At the default level they hold no question, no text of a document, no reply and no key: what a request asked is named
by the request's id alone. Of an exception they tell the type and the place. At the level "debug" they hold all of it.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

LOGGER = "specrag.serving"
log = logging.getLogger(LOGGER)


class JsonLines(logging.Formatter):
    """One JSON object per record. The fields of a record are its attribute ``fields``.

    Args:
        texts: Show the messages of exceptions, which may hold texts of documents, and their tracebacks.
    """

    def __init__(self, *, texts: bool = False) -> None:
        super().__init__()
        self._texts = texts

    def format(self, record: logging.LogRecord) -> str:
        """The line of ``record``."""
        shown: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        shown |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            shown["error"] = type(record.exc_info[1]).__name__
            shown["at"] = _place(record.exc_info[2])
            if self._texts:
                shown["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(shown, ensure_ascii=False, default=str)


def _place(trace: TracebackType | None) -> str | None:
    """Where an exception was raised: file and line."""
    last = traceback.extract_tb(trace)[-1:] if trace is not None else []
    return f"{last[0].filename}:{last[0].lineno}" if last else None


def configure(level: str) -> None:
    """Send the logs of this package and of uvicorn to stderr as JSON lines; ``level`` is a name of ``logging``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(texts=level == "debug"))
    for name in (LOGGER, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # the requests are told here, without their queries
