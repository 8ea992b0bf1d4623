"""From conversations to token ids and back: chat templates, segment boundaries, incremental decoding.

Needs a tokenizer only, no model and no torch. So the client of a server scores exactly the tokens that a model in this
process would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from specrag._unicode import well_formed
from specrag.errors import InvalidInputError, kind_of
from specrag.models.base import GenerationRequest, Segment, ToolCall, Turn, stop_strings
from specrag.models.templates import CLOSE, OPEN, ChatTemplate, written_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of a conversation, and per named segment the positions of its tokens."""

    ids: list[int]
    segments: dict[str, list[int]]


class ConversationEncoder:
    """Renders conversations with a tokenizer's chat template, or as plain text, and tokenises them.

    Args:
        tokenizer: A fast tokenizer of transformers (character offsets are needed).
        chat_template: ``"auto"``: the tokenizer's own where it has one; ``None``: plain text; a template; or the name
            of one, where the tokenizer has several.

    Attributes:
        template: The template for conversations without tools; ``None`` for plain text.
        tool_template: The template for conversations with tools.

    Raises:
        InvalidInputError: The tokenizer gives no character offsets, or has several templates and none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = "auto") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidInputError(
                f"{kind_of(tokenizer)} gives no character offsets: load a fast tokenizer (a tokenizer.json file)"
            )
        self.tokenizer = tokenizer
        self._layout = ChatTemplate.of(tokenizer, chat_template)
        self.template = self._layout.default if self._layout else None
        self.tool_template = self._layout.with_tools if self._layout else None

    @cached_property
    def _specials(self) -> list[str]:
        return sorted((s for s in self.tokenizer.get_added_vocab() if len(s) > 1 and not s.isspace()), key=len)

    def sanitize(self, text: str) -> str:
        """``text`` with a space inside each control token, so that no passage can open or close a turn."""
        text = well_formed(text).replace(OPEN, "").replace(CLOSE, "")
        for special in self._specials:
            if special in text:
                text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _sanitized(self, value: Any) -> Any:
        """``value`` as plain JSON, with every text in it sanitised."""
        if isinstance(value, Mapping):
            return {self.sanitize(str(key)): self._sanitized(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._sanitized(item) for item in value]
        return value if isinstance(value, bool | int | float) or value is None else self.sanitize(str(value))

    def encode_text(self, text: str) -> list[int]:
        """The ids of a bare piece of text, without special tokens."""
        return list(self.tokenizer.encode(well_formed(text), add_special_tokens=False))

    def render_generation(self, request: GenerationRequest, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, including the first stage's header; ``tools`` (JSON schemas) go to the chat template."""
        pieces = self._pieces(request.turns, generate=True, tools=tools)
        return "".join(piece.text for piece in pieces) + request.stages[0].header

    def encode_generation(self, request: GenerationRequest) -> list[int]:
        return self.encode_rendered(self.render_generation(request))

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a rendered prompt; special tokens are added only where no template wrote them."""
        return list(self.tokenizer.encode(well_formed(text), add_special_tokens=self.template is None))

    def pieces(self, turns: Sequence[Turn]) -> list[Segment]:
        """The conversation to score, as pieces of text in order; it ends with the last named one.

        Raises:
            InvalidInputError: No segment is named.
        """
        return up_to_last_named(self._pieces(turns, generate=False))

    def encode_scored(self, turns: Sequence[Turn]) -> EncodedConversation:
        """Tokenise a whole conversation at once; each token belongs to the segment in which its characters end.

        Raises:
            InvalidInputError: No segment is named.
        """
        pieces = self.pieces(turns)
        encoding = self.tokenizer(
            "".join(piece.text for piece in pieces),
            add_special_tokens=self.template is None,
            return_offsets_mapping=True,
        )
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        return EncodedConversation(ids, assign_tokens(pieces, [end for _, end in offsets], [a for a, _ in offsets]))

    def _pieces(
        self, turns: Sequence[Turn], *, generate: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Segment]:
        safe = [self._safe(turn) for turn in turns]
        if self._layout is None:
            return plain_pieces([written_out(turn).segments for turn in safe], generate=generate)
        return self._layout.pieces(safe, generate=generate, tools=[self._sanitized(tool) for tool in tools])

    def _safe(self, turn: Turn) -> Turn:
        """``turn`` with all that others wrote sanitised."""
        segments = stripped([s if s.control else Segment(self.sanitize(s.text), s.name) for s in turn.segments])
        calls = (ToolCall(self.sanitize(c.name), self._sanitized(c.arguments)) for c in turn.tool_calls)
        return Turn(turn.role, tuple(segments), tuple(calls))


def assign_tokens(pieces: Sequence[Segment], ends: Sequence[int], starts: Sequence[int]) -> dict[str, list[int]]:
    """The positions of the tokens of each named piece.

    A token without characters (one that a tokenizer adds) belongs to no piece. Neither does the first token, which
    nothing predicts.

    Args:
        pieces: The text, in order.
        ends, starts: Per token, the index of its first character and of the one after its last.
    """
    segments: dict[str, list[int]] = {piece.name: [] for piece in pieces if piece.name is not None}
    bounds, at = [], 0
    for piece in pieces:
        at += len(piece.text)
        bounds.append(at)
    index = 0
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end <= start or position == 0:
            continue
        while index < len(bounds) - 1 and bounds[index] < end:
            index += 1
        name = pieces[index].name
        if name is not None:
            segments[name].append(position)
    return segments


def plain_pieces(contents: Sequence[Sequence[Segment]], *, generate: bool) -> list[Segment]:
    """Turns as plain text with a blank line between them; with ``generate`` one after the last, for the reply."""
    pieces = [piece for content in contents for piece in (*content, Segment(_PLAIN_SEPARATOR))]
    return pieces if generate else pieces[:-1]


def up_to_last_named(pieces: Sequence[Segment]) -> list[Segment]:
    """``pieces`` up to the last named one: no score depends on what follows.

    Raises:
        InvalidInputError: No piece is named.
    """
    last = max((i for i, piece in enumerate(pieces) if piece.name is not None), default=None)
    if last is None:
        raise InvalidInputError("nothing to score: no segment of the conversation has a name")
    return list(pieces[: last + 1])


def stripped(segments: list[Segment]) -> list[Segment]:
    """The segments without white space at the two ends: some templates strip a turn, others do not."""
    for at, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while segments:
            text = strip(segments[at].text)
            segments[at] = Segment(text, segments[at].name, segments[at].control)
            if text or len(segments) == 1:
                break
            segments.pop(at)
    return segments


def shared_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many token ids all ``rows`` begin with. The last of each row does not count: it stays the row's own."""
    shortest = min(map(len, rows)) - 1
    first = rows[0]
    for i in range(shortest):
        if any(row[i] != first[i] for row in rows):
            return i
    return max(shortest, 0)


class IncrementalDecoder:
    """Turns token ids into text as they come; bytes that do not yet make a character are held back.

    To decode a token takes a few tokens before it (leading spaces, merged bytes), never the whole text. So each ``add``
    costs the same, however long the text is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # where the ids begin that are decoded again with the next ones
        self._done = 0  # ids before this one are in ``text``
        self.text = ""
        self.ends: list[int] = []  # per id, the length of ``text`` that includes its last character

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._done])
        now = self._decode(self._ids[self._context :])
        piece = ""
        if not now.endswith("\ufffd"):
            piece = now[len(before) :]
            self._context, self._done = self._done, len(self._ids)
        self.text += piece
        self.ends.append(len(self.text))
        return piece

    def flush(self) -> str:
        """The text of what is held back, when no token follows; an unfinished character becomes U+FFFD."""
        before = self._decode(self._ids[self._context : self._done])
        piece = self._decode(self._ids[self._context :])[len(before) :]
        self._context = self._done = len(self._ids)
        self.text += piece
        if self.ends:
            self.ends[-1] = len(self.text)
        return piece


class StopStrings:
    """The strings that end a text while it is being generated.

    Args:
        strings: Any of them ends the text; none may be empty.
        after_visible: Stop strings count only from the first visible character on.

    Raises:
        InvalidInputError: A string is empty or no text.
    """

    def __init__(self, strings: str | Sequence[str], *, after_visible: bool = False) -> None:
        self._strings, self._after_visible = stop_strings(strings), after_visible
        self._longest = max(map(len, self._strings), default=0)

    def find(self, text: str, known: int = 0) -> int | None:
        """The index in ``text`` at which the first stop string begins; ``None`` if there is none.

        ``known``: How many characters were searched before. Only a stop string that reaches beyond them is looked for.
        """
        start = max(0, known - self._longest)
        if self._after_visible:
            start = max(start, len(text) - len(text.lstrip()))
        found = [at for string in self._strings if (at := text.find(string, start)) >= 0]
        return min(found, default=None)

    def held_back(self, text: str) -> int:
        """The number of characters at the end of ``text`` that may be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(len(string) > length and text.endswith(string[:length]) for string in self._strings):
                return length
        return 0
