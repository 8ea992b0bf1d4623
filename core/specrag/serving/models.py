"""The models of a server, and the names under which it serves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specrag.errors import InvalidInputError
from specrag.models.embedders import Embedder
from specrag.rapid import RapidGenerator
from specrag.retrieval import PassageIndex
from specrag.serving.errors import ApiError, not_found
from specrag.serving.keys import Owner
from specrag.serving.rapid import RapidReplies
from specrag.speculative.pipeline import SpeculativeRAG

SPECULATIVE, RAPID, EMBEDDER = "speculative-rag", "rapid", "embedder"


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a server serves.

    Args:
        rag: Answers questions over the indexes.
        indexes: By the names that requests use. The first is asked where a request names none.
        rapid: Answers questions about uploaded files and long conversations: models in this process, or workers.
        embedder: Serves ``/v1/embeddings``.

    Raises:
        InvalidInputError: There is nothing to serve, or only one of the pipeline and its indexes.
    """

    rag: SpeculativeRAG | None = None
    indexes: Mapping[str, PassageIndex] = field(default_factory=dict)
    rapid: RapidGenerator | RapidReplies | None = None
    embedder: Embedder | None = None

    def __post_init__(self) -> None:
        if bool(self.indexes) != (self.rag is not None):
            raise InvalidInputError("a pipeline needs an index, and an index a pipeline: give both or none")
        if self.rag is None and self.rapid is None:
            raise InvalidInputError("nothing to serve: give an index, a model for RAPID, or both")

    def names(self, owner: Owner) -> list[str]:
        """The names of the models that ``owner`` may use."""
        asked = [name for name in self.indexes if owner.may_ask(name)]
        names = [SPECULATIVE, *(f"{SPECULATIVE}/{name}" for name in asked)] if asked else []
        names += [RAPID] * (self.rapid is not None)
        return names + [EMBEDDER] * (self.embedder is not None)

    def described(self, name: str) -> dict[str, Any]:
        """OpenAI's model object."""
        return {"id": name, "object": "model", "created": 0, "owned_by": "specrag"}

    def index(self, owner: Owner, model: str, wanted: str | None) -> tuple[str, PassageIndex]:
        """The index that a request asks, with its name.

        Args:
            model: ``speculative-rag``, or ``speculative-rag/NAME``.
            wanted: The name in the request's extension field.

        Raises:
            ApiError: There is no such index, or ``owner`` may not ask it: both are the same 404. Or the two names
                differ.
        """
        _, _, named = model.partition("/")
        if named and wanted and named != wanted:
            raise ApiError(400, f"two indexes are named: {named!r} and {wanted!r}", param="specrag.index")
        param = "specrag.index" if wanted else "model"
        name = wanted or named or next((name for name in self.indexes if owner.may_ask(name)), "")
        if name not in self.indexes or not owner.may_ask(name):
            raise not_found(f"the index {name[:80]!r}", param, "index_not_found" if wanted else "model_not_found")
        return name, self.indexes[name]
