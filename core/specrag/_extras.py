"""The extras of the distribution, checked where they are first needed.

``pip install specrag`` installs what a client of servers needs. Models in this process, training, and reading PDF and
HTML files need more packages; each set of them is an extra (``pyproject.toml``).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from specrag.errors import MissingExtraError

Extra = Literal["local", "documents", "train", "evaluation", "serve", "ray"]


def require(package: str, extra: Extra, what: str, *, otherwise: str = "") -> None:
    """Check, without importing it, that ``package`` is installed.

    Args:
        package: The name that it is imported by.
        extra: The extra that installs it.
        what: What needs it; the message begins with this.
        otherwise: What the user can do instead of installing the extra.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec(package) is None:
        instead = f", or {otherwise}" if otherwise else ""
        raise MissingExtraError(
            f"{what} needs the package {package}, which is not installed: pip install 'specrag[{extra}]'{instead}"
        )
