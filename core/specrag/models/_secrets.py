"""Keeps keys and passwords out of errors, notes and logs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"

# What looks like a key whoever wrote it: OpenAI's "sk-...", a bearer token, user and password in an address.
_KEYS = re.compile(r"\b(?:sk|pk|rk|gsk|hf|xai|pplx|nvapi|AIza)[-_]?[A-Za-z0-9*][A-Za-z0-9*_\-]{9,}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{8,}")
_IN_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^\s/@]+@")
# Names of settings that hold a secret.
_SECRET_NAMES = re.compile(
    r"(?i)api.?key|(^|_)key$|secret|password|authorization|credential|cookie|^token$|(access|auth|api|bearer|refresh).?token"
)


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """``text`` without ``secrets``, in any spelling that a URL may give them, and without what looks like a key."""
    for secret in sorted({form for known in secrets for form in _forms(known)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _KEYS.sub(HIDDEN, text)


def secrets_of(settings: Any, depth: int = 0) -> tuple[str, ...]:
    """The secrets among the values of a mapping or the attributes of an object: by their type, or by their name.

    ``depth``: So far, the attributes of attributes are looked at too.
    """
    values = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    found: list[str] = []
    for name, value in list(values.items()):
        reveal = getattr(value, "get_secret_value", None)
        if callable(reveal):
            found.append(str(reveal()))
        elif isinstance(value, str):
            found += [value] * bool(_SECRET_NAMES.search(str(name)))
        elif isinstance(value, Mapping) or (depth > 0 and not callable(value) and not isinstance(value, ModuleType)):
            found += secrets_of(value, depth - 1) if depth > 0 or "header" in str(name).lower() else ()
    return tuple(dict.fromkeys(found))


def _forms(secret: str) -> tuple[str, ...]:
    if len(secret) < 4:  # would hide words of the message
        return ()
    return secret, unquote(secret), quote(secret, safe="")
