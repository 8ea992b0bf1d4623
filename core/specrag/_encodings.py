"""Bytes of text files as text: byte-order marks, what a page declares, UTF-8, and at last a guess that is told."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from specrag.errors import InvalidInputError

_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python's own tables that hold what browsers read under these names (encoding.spec.whatwg.org/#names-and-labels).
_READ_AS = {
    **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk", "hz"), "gb18030"),
    **{"shift_jis": "cp932", "euc_kr": "cp949", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874"},
    **dict.fromkeys(("utf-16", "utf-16-le", "utf-16-be", "utf-32"), "utf-8"),  # then the declaration was not readable
}
# What files are written in that are not UTF-8. More of charset-normalizer's hundred would be found by mistake only.
_GUESSED = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "iso8859_2", "koi8_r", "cp866"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "cp874"),
)
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")


@dataclass(frozen=True)
class Decoded:
    """A file's text. ``note`` says what was guessed or replaced; ``None`` when nothing was."""

    text: str
    note: str | None = None


def marked(start: bytes) -> str | None:
    """The encoding that a byte-order mark names, as Python's codecs name it; ``None`` when there is no mark.

    Args:
        start: The first four bytes of a file, or more.
    """
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), None)


def decode(raw: bytes, declared: str | None = None) -> Decoded:
    """The text of a file.

    Args:
        raw: The file's bytes.
        declared: The encoding that the file says it has, where there is such a thing.

    Raises:
        InvalidInputError: It is no text but binary data.
    """
    if encoding := marked(raw[:4]):
        return _marked(raw, encoding)
    if b"\0" in raw:
        return _with_nulls(raw)
    if b"\x1b$" in raw and (text := _strictly(raw, "iso2022_jp_2")) is not None:  # of 7 bits: it passes as UTF-8
        return Decoded(text)
    if (text := _strictly(raw, "utf-8")) is not None:
        return Decoded(text)
    if declared and (text := _strictly(raw, _python_name(declared))) is not None:
        return Decoded(text)
    return _almost_utf8(raw) or _guessed(raw)


def _marked(raw: bytes, encoding: str) -> Decoded:
    text = raw.decode(encoding, errors="replace")
    bad = text.count("\ufffd") if _strictly(raw, encoding) is None else 0
    return Decoded(text, f"{bad} of its characters are damaged and were replaced" if bad else None)


def _with_nulls(raw: bytes) -> Decoded:
    """UTF-16 without a mark, or UTF-8 with a few NULs in it."""
    even, odd = raw[::2].count(0), raw[1::2].count(0)
    if max(even, odd) > 10 * min(even, odd) and max(even, odd) > len(raw) / 100:
        encoding = "utf-16-be" if even > odd else "utf-16-le"
        text = _strictly(raw, encoding)
        if text is not None and "\0" not in text:
            return Decoded(text, f"its encoding was guessed: {encoding}")
    text = _strictly(raw, "utf-8")
    nulls = raw.count(0)
    if text is None or nulls > len(raw) / 100:
        raise InvalidInputError("is no text, but binary data")
    return Decoded(text.replace("\0", ""), f"{nulls} NUL characters were left out")


def _almost_utf8(raw: bytes) -> Decoded | None:
    """UTF-8 with damaged places: more of its characters beyond ASCII are right than wrong."""
    text = raw.decode("utf-8", errors="replace")
    bad = text.count("\ufffd") - raw.count("\ufffd".encode())
    right = sum(character > "\x7f" for character in text) - bad
    return Decoded(text, f"{bad} damaged places in UTF-8 were replaced") if right > bad else None


def _guessed(raw: bytes) -> Decoded:
    from charset_normalizer import from_bytes

    found = list(from_bytes(raw, cp_isolation=list(_GUESSED)))
    western = _strictly(raw, "cp1252")
    share = len(_BEYOND_ASCII.findall(raw)) / sum(byte > 0x40 for byte in raw)  # of the letters, roughly
    if western is not None and share < 0.3 and (not found or not found[0].coherence):
        return Decoded(western, "its encoding was guessed: cp1252")  # no language was recognised: the commonest
    if not found:
        return Decoded(raw.decode("cp1252", errors="replace"), "its encoding is not known: read as cp1252")
    best = next((match for match in found if match.encoding == "cp1252" and _equal(match, found[0])), found[0])
    return Decoded(str(best), f"its encoding was guessed: {best.encoding}")


def _equal(one: object, other: object) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("chaos", "coherence"))


def _strictly(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except (UnicodeError, LookupError):
        return None


def _python_name(declared: str) -> str:
    try:
        name = codecs.lookup(declared.strip()).name
    except (LookupError, ValueError):
        return "utf-8"
    return _READ_AS.get(name, name)
