"""The text of a web page, with line breaks where a browser has them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from specrag._encodings import Decoded, decode

# Elements that begin and end on lines of their own (html.spec.whatwg.org, section 15.3, "display: block" and lists).
_BLOCKS = (
    *(
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "dir",
        "div",
    ),
    *("dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header"),
    *("hgroup", "hr", "html", "legend", "li", "listing", "main", "menu", "nav", "ol", "optgroup", "option", "p", "pre"),
    *("search", "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul", "xmp"),
)
_CELLS = ("td", "th", "button", "input", "img", "select", "textarea")
# Not shown, or shown small above the text (the reading aids of Chinese and Japanese).
_HIDDEN = ("script", "style", "noscript", "template", "rt", "rp", "datalist")
_NOT_SHOWN = re.compile(r"(?i)(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))\s*(?:!|;|$)")
_BETWEEN = {"br": "\n", **dict.fromkeys(_BLOCKS, "\n\n"), **dict.fromkeys(_CELLS, " ")}
_KEPT_AS_IS = ("pre", "textarea", "listing", "xmp")


def read_html(raw: bytes) -> tuple[str | None, Decoded]:
    """The title of a page, if it has one, and its text."""
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector

    decoded = decode(raw, EncodingDetector.find_declared_encoding(raw, is_html=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks like XML, or like the name of a file
        soup = BeautifulSoup(decoded.text, "html.parser")
    title = soup.find(lambda tag: tag.name == "title" and tag.find_parent("svg") is None)
    named = " ".join(title.get_text().split()) if title is not None else ""
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", "".join(_pieces(soup, title))))
    return named or None, Decoded(re.sub(r"\n{3,}", "\n\n", text).strip(), decoded.note)


def _is_hidden(tag: Any) -> bool:
    """Whether a browser does not show ``tag``, as it says itself. What style sheets say is not known."""
    if tag.name in ("html", "body"):  # a script shows them when the page is complete
        return False
    hidden = tag.get("hidden")
    if hidden is not None and str(hidden).strip().lower() != "until-found":  # that is shown when it is searched for
        return True
    if tag.name == "input" and str(tag.get("type", "")).strip().lower() == "hidden":
        return True
    return bool(_NOT_SHOWN.search(str(tag.get("style", ""))))


def _pieces(soup: Any, title: Any) -> Iterator[str]:
    """The texts in ``soup`` in order, with what stands between them. A stack, since pages nest without a limit."""
    from bs4.element import CData, NavigableString, Tag

    open_nodes: list[tuple[Any, bool]] = [(soup, False)]  # a node and whether its line breaks are kept, or a separator
    while open_nodes:
        node, kept = open_nodes.pop()
        if isinstance(node, Tag):
            if node is title or node.name in _HIDDEN or _is_hidden(node):
                continue
            between = _BETWEEN.get(node.name, "")
            kept = kept or node.name in _KEPT_AS_IS
            yield between
            if node.name != "br":
                open_nodes.append((between, True))
            open_nodes += [(child, kept) for child in reversed(node.contents)]
        elif type(node) in (NavigableString, CData, str):  # others are comments and declarations
            yield str(node) if kept else re.sub(r"\s+", " ", node)
