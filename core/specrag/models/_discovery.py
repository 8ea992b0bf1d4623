"""Asks a server of a pool which models it has, and whether it works."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from specrag.errors import ServerError
from specrag.models._circuit import PASSED_OVER, Server
from specrag.models._connections import Connection
from specrag.models._http import UnavailableError, fetch
from specrag.models._problems import note_problem

# Seconds that a server has for the list of its models.
DISCOVERY = 5.0
# Seconds until a server is asked again that answered with a passing error, for example while it loads its model.
ASK_AGAIN = 5.0


@dataclass(frozen=True)
class Look:
    """Asks a server for the list of its models, and records the result in ``Server``. It is also the health check.

    Args:
        model: The name of the model that the pool uses.
        timeout: Seconds.
        secrets: What must not stand in an error.
    """

    model: str
    timeout: float
    secrets: Sequence[str] = field(default=(), repr=False)

    async def __call__(self, connection: Connection, server: Server) -> None:
        """Ask. A server that answers but cannot list its models counts as working."""
        known = server.vendor is not None
        try:
            listing = await fetch(
                connection.client, server, "GET", "models", None, timeout=self.timeout, secrets=self.secrets
            )
        except UnavailableError as error:
            note_problem(f"{server}: {error}")
            server.ask_again = time.monotonic() + (ASK_AGAIN if error.reached else PASSED_OVER)
            if known or error.reached:
                server.checked(answered=error.reached, well=False)
            else:
                server.failed(silent=True, down=error.refused)
        except ServerError:
            server.vendor = server.vendor or ""
            server.checked(answered=True, well=True)
        else:
            server.learn(listing, self.model)
            server.checked(answered=True, well=True)
