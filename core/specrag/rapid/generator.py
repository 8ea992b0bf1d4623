"""RapidGenerator: the models and the settings of RAPID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrag.errors import InvalidInputError
from specrag.models.base import Turn
from specrag.models.embedders import Embedder
from specrag.models.transformers import TransformersLM
from specrag.rapid.compatibility import same_shape, shared_vocabulary
from specrag.rapid.datastore import Datastore
from specrag.rapid.draft_length import Estimates
from specrag.rapid.prompt import conversation_prompt
from specrag.rapid.session import LongContext, RapidOutput
from specrag.rapid.settings import RapidSettings

# In contexts of at least this many tokens, reading only 4,096 retrieved tokens saves time.
_LONG_CONTEXT = 32_768


class RapidGenerator:
    """Retrieval-augmented speculative decoding (Chen et al., arXiv 2502.20330).

    A target reads the long context. A drafter reads only the part of it that the question retrieves, and proposes
    candidate tokens. The target verifies several of them in one forward pass. By default, candidates are copied where
    the text repeats itself or the context, and the drafter proposes the others (``proposer="hybrid"``).

    Args:
        target: A ``TransformersLM``, or (model, tokenizer). It answers.
        drafter: The same. It may be smaller, or larger and on another device; its tokenizer must be the target's.
            ``None``: the target itself (self-speculation; the weights are shared).
        settings: A ``RapidSettings``, or a mapping of its fields.
        embedder: For retrieval; by default the bundled MiniLM, loaded when first needed.
        changes: Fields of ``RapidSettings``, in place of those in ``settings``.

    Attributes:
        datastore: What ``"rest"`` looks up; ``None`` for other proposers.
        estimates: Costs and acceptance of the latest generation. Sessions on other contexts begin with them.
        opened: What ``RapidChat.open`` loaded the models from, where it did.

    Raises:
        InvalidInputError: A setting is unknown or out of range, the models do not share a tokenizer, a ``"sparse"``
            proposer has a drafter that is not a copy of the target, or a datastore is damaged or of another tokenizer.
        NotFoundError: There is no such datastore.
    """

    def __init__(
        self,
        target: TransformersLM | tuple[Any, Any],
        drafter: TransformersLM | tuple[Any, Any] | None = None,
        settings: RapidSettings | Mapping[str, Any] | None = None,
        *,
        embedder: Embedder | None = None,
        **changes: Any,
    ) -> None:
        self.settings = RapidSettings.of(settings, **changes)
        self.opened: tuple[str | None, ...] | None = None
        self.target = target if isinstance(target, TransformersLM) else TransformersLM(*target)
        if drafter is None:
            self.drafter = self.target
        else:
            self.drafter = drafter if isinstance(drafter, TransformersLM) else TransformersLM(*drafter)
        self.vocabulary = shared_vocabulary(self.target, self.drafter)
        proposer = self.settings.proposer
        if proposer.endswith("sparse") and not same_shape(self.target, self.drafter):
            raise InvalidInputError(
                f"proposer={proposer!r} drafts on the target's own keys and values: leave drafter out, "
                "or give a quantized copy of the target"
            )
        self.datastore: Datastore | None = None
        if proposer == "rest":
            self.datastore = Datastore.open(str(self.settings.datastore))
            self.datastore.check_tokenizer(self.target.tokenizer)
        self._embedder = embedder
        self.estimates = Estimates()

    @property
    def embedder(self) -> Embedder:
        """What retrieval embeds with."""
        if self._embedder is None:
            from specrag.models.bundled import bundled

            self._embedder = bundled("minilm")
        return self._embedder

    def budget(self, context_tokens: int) -> int:
        """Tokens of retrieved context for a context of ``context_tokens``.

        Without ``retrieval_budget`` it is max(512, |C| / 16) on the CPU and below 32k tokens, else
        max(|C| / 24, min(4096, |C|)).
        """
        if self.settings.retrieval_budget is not None:
            return self.settings.retrieval_budget
        if context_tokens < _LONG_CONTEXT or self.target.device.type == "cpu":
            return max(512, context_tokens // 16)
        return max(context_tokens // 24, min(4096, context_tokens))

    def generate(self, messages: Sequence[Mapping[str, str]], **options: Any) -> RapidOutput:
        """Answer the last user turn of a conversation. What stands before it is the context.

        Args:
            messages: ``{"role", "content"}`` mappings, the last of role ``"user"``.
            options: As in ``LongContext.stream``.

        Raises:
            InvalidInputError: The last message is not the user's, or there is nothing before it.
        """
        if not messages or messages[-1].get("role") != "user":
            raise InvalidInputError("the last message must be the user's: it is the query")
        if len(messages) < 2:
            raise InvalidInputError("there is no context before the query: give earlier messages, or use LongContext")
        turns = [Turn.of(message["role"], message["content"]) for message in messages]  # type: ignore[arg-type]
        session = LongContext(conversation_prompt(self.target.encoder, turns), self)
        return session.ask(messages[-1]["content"], **options)
