"""The file of a page: the template filled, the data in it as JSON, and everything that would do harm as mere text."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from specrag._unicode import well_formed

# In this order: a script uses what stands before it.
_SCRIPTS = ("elements.js", "example.js", "table.js", "page.js")
#: Characters of JSON from which on the data are compressed: 300 questions with their passages are 4 MB, packed 1 MB.
PACKED_FROM = 200_000
# NUL and its like have no look of their own. The characters at U+2400 stand for them.
_CONTROL = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Table:
    """The table above the examples.

    Attributes:
        columns: Its headings; the first column names the system.
        rows: A text for each column, per system.
        notes: Sentences below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def write(
    data: Mapping[str, Any],
    *,
    title: str,
    kicker: str,
    facts: Sequence[tuple[str, str]] = (),
    summary: Table | None = None,
) -> str:
    """The text of a page.

    Args:
        data: What the scripts read; see ``specrag._page.examples``.
        title: The heading, and the name of the browser's tab.
        kicker: A line above the heading: what kind of page this is.
        facts: Names and values below the heading.
        summary: The table of systems.
    """
    script, style = _part(*_SCRIPTS), _part("page.css")
    kind, written = _embedded(data)
    values = {
        "title": title or "untitled",
        "kicker": kicker,
        "facts": facts,
        "summary": summary and {"columns": summary.columns, "rows": summary.rows, "notes": summary.notes},
        "single": bool(data.get("single")),
    }
    return _template().render(
        **plain(values),
        script=_trusted(script),
        style=_trusted(style),
        policy=f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:",
        data=_trusted(written),
        data_type=kind,
    )


def framed(page: str, *, title: str) -> str:
    """``page`` in a frame of its own, for a notebook: neither's styles and scripts reach the other."""
    return (
        '<iframe sandbox="allow-scripts" loading="lazy" '
        'style="width: 100%; height: 34rem; border: 1px solid #8886; border-radius: 8px; resize: vertical" '
        f'title="{html.escape(plain(title))}" '
        f'srcdoc="{html.escape(page.replace("<html ", "<html class=framed ", 1))}"></iframe>'
    )


def plain(value: Any) -> Any:
    """``value`` as JSON and HTML can hold it.

    Half characters become U+FFFD, control characters their visible signs, and numbers that JSON lacks ``None``.
    """
    if isinstance(value, str):
        return well_formed(value, keep_length=True).translate(_CONTROL)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, Real):
        return round(float(value), 4) if math.isfinite(value) else None
    return plain(str(value))


def _embedded(data: Mapping[str, Any]) -> tuple[str, str]:
    """The type of the script element that holds the data, and its content, which holds no markup."""
    text = json.dumps(plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if len(text) < PACKED_FROM:
        return "application/json", text.replace("<", "\\u003c")
    packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
    return "application/gzip", base64.b64encode(packed).decode()


@functools.cache
def _part(*names: str) -> str:
    """Files of this package, joined."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_part("page.html"))


def _trusted(text: str) -> Any:
    """``text`` as the template puts it in unchanged: it is ours, or was made harmless."""
    from markupsafe import Markup

    return Markup(text)


def _digest(text: str) -> str:
    """How the page's policy names the one script, and the one style, that may be used."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
