"""What a server is made from: its models, who may use it, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from specrag._fields import check_numbers
from specrag.errors import InvalidInputError
from specrag.serving.keys import ApiKeys
from specrag.serving.models import Models

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The settings of a server. Sizes are in bytes, times in seconds.

    Args:
        load: Makes the models. It is called once, in a thread, after the server has begun to listen.
        keys: Who may use the server; ``None``: everybody.
        concurrency: Requests that are worked on at once.
        queue: Requests that wait for their turn. Further ones get status 429.
        top: Passages that are retrieved for a question.
        max_tokens: The most tokens that a request may ask for; also what it gets where it names no number.
        max_body: The largest JSON body.
        max_upload: The largest upload.
        max_files: Files that one key may have at once.
        file_seconds: A file is deleted so long after its upload.
        sessions: Documents that RAPID keeps in memory, of all keys together.
        session_bytes: The memory that the sessions of one key may take.
        header_timeout: For the headers of a request.
        read_timeout: For each piece of a request's body, and for the whole body at 8 KiB per second.
        send_timeout: A client that takes nothing of its reply for so long is cut off.
        drain: How long running requests may go on after the signal to stop.

    Raises:
        InvalidInputError: A number is too small.
    """

    load: Callable[[], Models]
    keys: ApiKeys | None = None
    concurrency: int = 4
    queue: int = 32
    top: int = 10
    max_tokens: int = 1024
    max_body: int = 4 * MIB
    max_upload: int = 32 * MIB
    max_files: int = 64
    file_seconds: float = 24 * 3600.0
    sessions: int = 4
    session_bytes: int = 4096 * MIB
    header_timeout: float = 10.0
    read_timeout: float = 20.0
    send_timeout: float = 30.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "top", "max_tokens", "max_body", "max_upload", "max_files"):
            self._check(name, at_least=1)
        for name in ("queue", "sessions", "session_bytes", "drain"):
            self._check(name, at_least=0)
        for name in ("file_seconds", "header_timeout", "read_timeout", "send_timeout"):
            self._check(name, at_least=0.001)

    def _check(self, name: str, *, at_least: float) -> None:
        value = getattr(self, name)
        check_numbers(**{name: value})
        if value is None or not value >= at_least:
            raise InvalidInputError(f"{name} must be at least {at_least:g}, got {value!r}")
