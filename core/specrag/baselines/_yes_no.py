"""P(yes): how likely a model is to answer "Yes" to a question that is answered with yes or no."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specrag.errors import InvalidInputError, LogProbsUnavailableError
from specrag.models.base import GenerationRequest, LanguageModel, Stage, Turn
from specrag.schema import Usage

# Likely tokens asked for, where a backend can list so many: both words in all their spellings are among them.
_MOST_TOKENS = 200


def check_yes_no(lm: LanguageModel, role: str) -> None:
    """Check that ``lm`` can say how likely its words are.

    Raises:
        InvalidInputError: It is known to give no log-probabilities.
    """
    if lm.capabilities.generation_log_probs is False:
        raise InvalidInputError(
            f"the {role} reads P(yes), and {lm.name} gives no log-probabilities of what it writes: give another model, "
            "or a server that lists likely tokens"
        )


async def yes_probabilities(lm: LanguageModel, prompts: Sequence[str]) -> tuple[list[float], Usage]:
    """P(yes) / (P(yes) + P(no)) at the first token of the reply to each prompt, and the tokens that it took.

    Each word counts in all its spellings ("Yes", " yes"). Where none of a word's spellings is among the tokens that the
    backend lists, the least likely listed one stands in, as an upper bound.

    Raises:
        LogProbsUnavailableError: The model does not list likely tokens.
        ModelError: It failed.
    """
    if not prompts:
        return [], Usage()
    count = min(_MOST_TOKENS, lm.capabilities.most_top_log_probs)
    requests = [GenerationRequest((Turn.of("user", prompt),), (Stage(max_tokens=1),)) for prompt in prompts]
    completions = await lm.agenerate(requests, top_log_probs=count)
    values = []
    for completion in completions:
        tops = completion.parts[0].top_log_probs
        if tops is None:
            raise LogProbsUnavailableError(f"{lm.name} does not list likely tokens, from which P(yes) is read")
        if not tops:  # the reply ended before its first token
            values.append(0.5)
            continue
        yes, no = _word(tops[0], "yes"), _word(tops[0], "no")
        values.append(yes / (yes + no) if yes + no > 0 else 0.5)
    return values, sum((completion.usage for completion in completions), Usage())


def _word(listed: object, word: str) -> float:
    """The summed probability of the spellings of ``word``."""
    tops = dict(listed) if isinstance(listed, dict) else {}
    found = [value for token, value in tops.items() if str(token).strip(" \u2581\u0120.,").casefold() == word]
    return sum(map(math.exp, found)) if found else math.exp(min(tops.values(), default=-math.inf))
