"""The tokens of one part of a completion, collected over one reply of a server or several that continue each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrag.models._logprobs import ListedToken, all_listed, ends_in, ends_of_beginning, listed_tokens, stop_hides
from specrag.models.base import GeneratedText
from specrag.models.chat import ended_at_limit
from specrag.models.tokenization import ConversationEncoder, IncrementalDecoder

#: The note on a draft whose tokens the server lists wrongly.
UNCLEAR = "the server's log-probabilities do not add up to the text that it wrote, so they are left out"


class WrittenPart:
    """What was written so far.

    Args:
        encoder: Of the served model.
        stop: The strings that end the part.

    Attributes:
        text: Without the last stop string; ``text_with_stop``: with it.
        tokens: How many tokens were written, as far as the server says.
        listed: Whether the server lists the tokens of the last reply; ``None``: there were none to list.
    """

    def __init__(self, encoder: ConversationEncoder | None, stop: Sequence[str] = ()) -> None:
        self._encoder, self._stop = encoder, tuple(stop)
        self.text = ""
        self.text_with_stop = ""
        self.tokens = 0
        self.listed: bool | None = None
        self._ids: list[int] = []
        self._tokens: list[ListedToken] = []
        self._whole = True  # every token is listed
        self._hidden = 0  # tokens of the last reply that are not listed; 0 where no stop string ended it

    def add(self, choice: Mapping[str, Any], written: int) -> str | None:
        """Take the choice of the next reply; the stop string that ended it, where that is known.

        Args:
            written: The tokens that the server counted; 0 where it did not.
        """
        tokens = listed_tokens(choice.get("logprobs")) or []
        cut = ended_at_limit(choice)
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
            ids = [token.id for token in tokens if token.id is not None]
        text = str(choice.get("text") or "")
        self.listed = bool(tokens) if tokens or text else None
        self._whole &= (bool(tokens) or not text) and all_listed(tokens, written, cut=cut, stop=self._stop)
        self._hidden = 0 if cut else max(0, written - len(tokens))
        self._ids += ids
        self._tokens += tokens
        self.tokens += written or max(len(ids), len(tokens))
        named = choice.get("stop_reason")
        stopped = named if isinstance(named, str) else None
        self.text = self.text_with_stop + text
        self.text_with_stop = self.text + (stopped or "")
        return stopped

    def part(self, *, cut: bool, with_top: bool) -> GeneratedText:
        """The part as it was written; ``cut``: it ended at the limit of its tokens."""
        ends, kept = self._kept()
        values = [token.log_prob for token in self._tokens[:kept]]
        known = [value for value in values if value is not None]
        sure = bool(known) and len(known) == len(values) and self._whole
        return GeneratedText(
            text=self.text,
            log_probs=tuple(known) if sure else None,
            tokens=kept if sure else self.tokens,
            token_ends=tuple(ends[:kept]) if sure else None,
            finish="length" if cut else "stop",
            top_log_probs=tuple(token.top for token in self._tokens) if with_top and self._tokens else None,
        )

    def notes(self, part: GeneratedText) -> tuple[str, ...]:
        """Why ``part`` has no log-probabilities though tokens were listed."""
        return (UNCLEAR,) if self._tokens and part.log_probs is None and part.text.strip() else ()

    def split(self, *, with_stop: bool = False) -> tuple[list[int], str]:
        """The ids whose characters all belong to the text, and the rest of the text after them."""
        text = self.text_with_stop if with_stop else self.text
        ends = self._decoded()
        if ends is None:
            return [], text  # the server did not say which tokens it wrote: the whole text is tokenised anew
        kept = _inside(ends, len(text))
        return self._ids[:kept], text[ends[kept - 1] if kept else 0 :]

    def _decoded(self) -> list[int] | None:
        """The ends of the tokens with the listed ids; ``None`` where the text does not begin with these."""
        if not self._ids or self._encoder is None:
            return None
        decoder = self._decoder(self._ids)
        begins = decoder.text.startswith(self.text) or self.text.startswith(decoder.text)
        return decoder.ends if begins else None

    def _decoder(self, ids: Sequence[int]) -> IncrementalDecoder:
        """A decoder that has decoded ``ids``."""
        assert self._encoder is not None
        decoder = IncrementalDecoder(self._encoder.tokenizer)
        for token in ids:
            decoder.add(token)
        decoder.flush()
        return decoder

    def _spelled(self, text: str) -> list[int]:
        """Where the tokens of ``text`` end."""
        assert self._encoder is not None
        return self._decoder(self._encoder.encode_text(text)).ends

    def _kept(self) -> tuple[list[int], int]:
        """The ends of all tokens, and how many are of the text: not of the stop string, no end of sequence."""
        ends = self._decoded() if len(self._ids) == len(self._tokens) else None
        if ends is None:
            ends = ends_in(self.text, self._tokens)
        if ends is None:
            ends = ends_of_beginning(self.text, self._tokens)
        if not ends:
            return [], 0
        rest = self.text[ends[-1] :]
        if rest and not stop_hides(rest, self._hidden, self._stop, self._spelled if self._encoder else None):
            return [], 0
        return ends, _inside(ends, len(self.text))


def hidden_blank(choice: Mapping[str, Any], stop: Sequence[str], written: int) -> bool:
    """Whether a stop string of white space ended a reply before it began, which the server does not say.

    llama.cpp then counts tokens that it neither shows nor lists.
    """
    nothing = not choice.get("text") and not listed_tokens(choice.get("logprobs"))
    unsaid = "stop_reason" not in choice and choice.get("finish_reason") == "stop"
    return nothing and unsaid and written > 0 and any(string.isspace() for string in stop)


def _inside(ends: Sequence[int], last: int) -> int:
    """How many of the tokens end in the first ``last`` characters; those without characters at the end do not count."""
    kept = sum(1 for end in ends if end <= last)
    while kept and (ends[kept - 2] if kept > 1 else 0) == ends[kept - 1] == last:
        kept -= 1  # no characters: an end of sequence
    return kept
