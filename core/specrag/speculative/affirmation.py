"""The probability of "Yes" where a model lists the likeliest tokens at one position."""

from __future__ import annotations

import math


def yes_log_probability(top: object, affirmation: str = "Yes") -> float | None:
    """Log of the summed probability of ``affirmation``'s spellings ("Yes", " Yes", "yes").

    ``top`` maps the text of each listed token to its log-probability in nats. Where none of the spellings is listed,
    the lowest listed log-probability stands in, which is an upper bound. ``None`` where nothing is listed; NaN where a
    log-probability is not a number.
    """
    if not isinstance(top, dict) or not top:
        return None
    wanted = affirmation.strip().casefold()
    values = [value for token, value in top.items() if str(token).strip(" \u2581\u0120").casefold() == wanted]
    if not values:
        return float(min(top.values()))
    high = max(values)
    if math.isnan(sum(values)):
        return math.nan
    if math.isinf(high):
        return -math.inf
    return float(min(0.0, high + math.log(sum(math.exp(value - high) for value in values))))
