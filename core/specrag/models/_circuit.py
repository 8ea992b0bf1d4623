"""One server of a pool and its circuit: whether it gets requests at the moment.

The circuit is closed while the server answers. Every failure opens it for some seconds, twice as many after each
further one. Then it is half open: one request is let through, and its outcome closes the circuit or opens it again.
A late answer is a failure too, with a shorter first pause: a server that works may be late once.

A server that failed without an answer (nobody listened, it hung, it broke off) gets health checks. As long as they
are not answered, its circuit stays open. When they are answered again, its circuit is half open at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Seconds for which a server gets no requests after a failure, while others of the pool do.
PASSED_OVER = 15.0
# The same after it was late: another server, asked later, answered first, or nobody waited any longer.
PASSED_OVER_LATE = 2.0
# The same after several failures in a row: at most so long.
LONGEST_PASSED_OVER = 120.0
# Seconds between two health checks of a server that failed without an answer.
CHECK_EVERY = 1.0


@dataclass(eq=False)
class Server:
    """One base URL: what it is, and its state. Times are monotonic seconds.

    Attributes:
        url: Without credentials and without a slash at the end.
        auth: User and password that stood in the URL.
        vendor: Who made it, as it says; "" where it does not say, ``None`` before it was asked.
        window: Tokens that prompt and completion may have together; ``None`` where it does not say.
        ask_again: It did not say what it is; from then on it is asked again.
        failures: How many requests failed since the last one that did not.
        met: It has answered something, once.
    """

    url: str
    auth: tuple[str, str] | None = field(default=None, repr=False)
    vendor: str | None = None
    window: int | None = None
    ask_again: float = 0.0
    failures: int = 0
    met: bool = False
    _open_until: float = 0.0
    _probed: bool = False
    _unanswered: bool = False  # its last health check
    _silent: bool = False  # it failed without an answer, and no health check has succeeded since
    _lost: bool = False  # nobody listened at its address, or a health check was not answered
    _check_at: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it may get a request: its circuit is closed, or half open with nobody trying it."""
        closed_or_half_open = self._open_until <= time.monotonic() and not (self._probed or self._unanswered)
        return self.failures == 0 or closed_or_half_open

    @property
    def to_check(self) -> bool:
        """Whether a health check is due."""
        return self._silent and not self._probed and self._check_at <= time.monotonic()

    def chosen(self) -> None:
        """It gets a request. In a circuit that is not closed, this is the one that tries it."""
        self._probed = self.failures > 0

    def answered(self) -> None:
        """It gave a usable answer."""
        self.failures, self._open_until, self._probed = 0, 0.0, False
        self._silent = self._lost = self._unanswered = False

    def failed(self, wait: float = 0.0, *, silent: bool = False, down: bool = False, late: bool = False) -> None:
        """A request failed. Requests that were under way at the same time count as one failure.

        Args:
            wait: Seconds for which the server asked for no further requests.
            silent: The server gave no answer at all.
            down: Nobody listened at its address.
            late: It was given up before it had answered or its time was over.
        """
        now = time.monotonic()
        self._silent, self._lost, self._check_at = silent, down, now + CHECK_EVERY
        self._unanswered = self._unanswered and silent
        if self._probed or self._open_until <= now:
            first = PASSED_OVER_LATE if late else PASSED_OVER
            pause = min(LONGEST_PASSED_OVER, first * 2.0 ** min(self.failures, 8))
            self.failures += 1
            self._open_until = now + (wait or pause)
        self._open_until = max(self._open_until, now + wait)
        self._probed = False

    def checked(self, *, answered: bool, well: bool) -> None:
        """A health check ended.

        Args:
            answered: The server answered, whatever the answer is.
            well: Its answer does not say that it is busy or broken.
        """
        now = time.monotonic()
        self._check_at = now + CHECK_EVERY
        self._unanswered = self._silent and not answered
        if well and self._lost:
            self._open_until = now
        self._silent = self._silent and not well
        self._lost = (self._lost or not answered) and not well

    def released(self) -> None:
        """A request ended, and it is not known whether the server works."""
        self._probed = False

    def learn(self, listing: Any, model: str) -> None:
        """Take what it says about ``model`` in the listing of its models, in whatever form that is."""
        listed = listing.get("data") if isinstance(listing, Mapping) else listing
        entries = [entry for entry in (listed if isinstance(listed, list) else ()) if isinstance(entry, Mapping)]
        first: Mapping[str, Any] = entries[0] if entries else {}
        mine = next((entry for entry in entries if entry.get("id") == model), first)
        meta = mine.get("meta")
        window = mine.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, Mapping) else None)
        self.window = window if isinstance(window, int) and not isinstance(window, bool) and window > 0 else None
        self.vendor = str(mine.get("owned_by") or "")

    def __str__(self) -> str:
        return self.url
