"""The text of a web page, with line breaks where a browser has them."""

from __future__ import annotations

import re
import warnings

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
_KEPT_AS_IS = ("pre", "textarea", "listing", "xmp")


def read_html(raw: bytes) -> tuple[str | None, Decoded]:
    """The title of a page, if it has one, and its text."""
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector

    decoded = decode(raw, EncodingDetector.find_declared_encoding(raw, is_html=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it looks like XML, or like the name of a file
        soup = BeautifulSoup(decoded.text, "html.parser")
    for hidden in soup(_HIDDEN):
        hidden.decompose()
    title = None
    if soup.title is not None:
        title = " ".join(soup.title.get_text().split()) or None
        soup.title.decompose()
    for piece in soup.find_all(string=True):
        if type(piece).__name__ == "NavigableString" and piece.find_parent(_KEPT_AS_IS) is None:
            piece.replace_with(re.sub(r"\s+", " ", piece))
    for tag, between in [*((block, "\n\n") for block in soup(_BLOCKS)), *((cell, " ") for cell in soup(_CELLS))]:
        tag.insert_before(between)
        tag.insert_after(between)
    for broken in soup("br"):
        broken.replace_with("\n")
    text = re.sub(r" ?\n ?", "\n", re.sub(r"[^\S\n]+", " ", soup.get_text()))
    return title, Decoded(re.sub(r"\n{3,}", "\n\n", text).strip(), decoded.note)
