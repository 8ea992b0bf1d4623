"""Options of a request that a server or a library refuses: which one an error names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# How an error says that an option is not there. Without it, only a value was wrong.
_REFUSES = re.compile(
    r"(?i)\b(un|not |n't )support|unexpected|unrecogni[sz]ed|\bunknown\b|\bextra (fields|inputs)"
    r"|not (allowed|permitted|available)|no such|use '?max_completion_tokens|does(n't| not) (accept|allow)"
    r"|invalid (field|parameter|argument)"
)


def refused_option(message: str, options: Iterable[str]) -> str | None:
    """The one of ``options`` that an error says is not supported; ``None`` where it says nothing of the kind."""
    if not _REFUSES.search(message):
        return None
    named = [name for name in options if re.search(rf"(?<![A-Za-z_]){re.escape(name)}(?![A-Za-z_])", message)]
    return max(named, key=len, default=None)


def names_log_probs(message: str) -> bool:
    """Whether an error is about log-probabilities or the echo of a prompt."""
    return re.search(r"(?i)log_?prob|\becho\b", message) is not None
