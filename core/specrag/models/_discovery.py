"""A look at a server of a pool: what it is, and whether it is well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from specrag.errors import ServerError
from specrag.models._circuit import PASSED_OVER, Server
from specrag.models._connections import Connection
from specrag.models._http import UnavailableError, fetch
from specrag.models._problems import note_problem

# Seconds that a server has to say what it is.
DISCOVERY = 5.0
# Seconds after which one is asked again that answered with an error which may pass, as while it loads its model.
ASK_AGAIN = 5.0


@dataclass(frozen=True)
class Look:
    """Asks a server for the list of its models, and tells it what came of that. It is also the health check.

    Args:
        model: The name of the model that is asked for.
        timeout: Seconds.
        secrets: What must not stand in an error.
    """

    model: str
    timeout: float
    secrets: Sequence[str] = field(default=(), repr=False)

    async def __call__(self, connection: Connection, server: Server) -> None:
        """One that cannot list its models may do its work all the same."""
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
