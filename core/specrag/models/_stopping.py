"""A forward pass of a model of transformers that ends early where nobody waits for its result any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from specrag._abandoned import stop_if_abandoned


@contextlib.contextmanager
def stoppable(model: Any) -> Iterator[None]:
    """Before each of its layers, the model looks whether its result is still wanted.

    Our own forward pass needs a model without hooks, so these are there for a long pass only: a prompt, a scored row.
    """

    def look(*_: Any) -> None:
        stop_if_abandoned()

    hooks = [layer.register_forward_pre_hook(look) for layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: Any) -> list[nn.Module]:
    """The decoder layers of ``model``; none where they are not in one list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))
