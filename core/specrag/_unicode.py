"""Text that can be written as UTF-8.

Half a character (a surrogate without its other half) comes out of JSON that cut an emoji, out of text that was cut at a
number of UTF-16 units, and out of names of files that are no UTF-8. Tokenizers, files and servers refuse it.
"""

from __future__ import annotations

import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def well_formed(text: str, *, keep_length: bool = False) -> str:
    """``text`` with U+FFFD in place of half characters.

    Args:
        text: Any text.
        keep_length: Replace each half, also where two of them make a character. Positions in the text stay right.
    """
    if text.isascii() or _HALF.search(text) is None:
        return text
    if keep_length:
        return _HALF.sub("\ufffd", text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def well_formed_values(value: Any) -> Any:
    """The same for every text in lists, tuples and dictionaries, keys too. What needs no change is returned itself."""
    if isinstance(value, str):
        return well_formed(value)
    if type(value) is dict:
        items = [(well_formed_values(key), well_formed_values(item)) for key, item in value.items()]
        same = all(key is k and item is v for (key, item), (k, v) in zip(items, value.items(), strict=True))
        return value if same else dict(items)
    if type(value) in (list, tuple):
        made = [well_formed_values(item) for item in value]
        return value if all(a is b for a, b in zip(made, value, strict=True)) else type(value)(made)
    return value
