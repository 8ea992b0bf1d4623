"""A question-answering encoder and the scores of its spans (Devlin et al., arXiv 1810.04805, section 4.2).

The encoder reads a question beside a passage and gives every token a start logit s and an end logit e. A span from
token i to token j scores s_i + e_j; that no span answers scores s_0 + e_0, at the first token. The functions on tensors
are shared by reading (``SpanReader``) and training (``specrag.training.reader``), so both normalise alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Stands for minus infinity: sums of two stay finite, and gradients through them are 0.
IMPOSSIBLE = -1e4


def span_scores(
    start_logits: Tensor,  # [rows, tokens]
    end_logits: Tensor,  # [rows, tokens]
    inside: Tensor,  # [rows, tokens], bool: the passage's tokens
    longest: int,
) -> Tensor:  # [rows, tokens, longest]
    """The score of every span over that of no answer: (s_i + e_j) - (s_0 + e_0).

    Entry [r, i, w] belongs to the span of ``w + 1`` tokens that begins at token i. Spans that leave the passage are ``IMPOSSIBLE``.
    """
    starts = start_logits.float().masked_fill(~inside, IMPOSSIBLE)
    ends = end_logits.float().masked_fill(~inside, IMPOSSIBLE)
    ends = torch.nn.functional.pad(ends, (0, longest - 1), value=IMPOSSIBLE).unfold(1, longest, 1)
    nothing = start_logits[:, 0].float() + end_logits[:, 0].float()
    return starts[:, :, None] + ends - nothing[:, None, None]


def grouped_logsumexp(
    values: Tensor,  # [items]
    groups: Tensor,  # [items], from 0
    count: int,
) -> Tensor:  # [count]
    """The log-sum-exp of the items of each group; ``IMPOSSIBLE`` for a group without items."""
    highest = torch.full((count,), IMPOSSIBLE, dtype=values.dtype, device=values.device)
    highest = highest.scatter_reduce(0, groups, values.detach(), "amax")
    sums = torch.zeros_like(highest).index_add(0, groups, (values - highest[groups]).exp())
    return highest + sums.clamp(min=torch.finfo(values.dtype).tiny).log()


def shared_log_normalizer(
    scores: Tensor,  # [rows, tokens, longest], of ``span_scores``
    questions: Tensor,  # [rows], the question of each row, from 0
    count: int,
) -> Tensor:  # [count]
    """log(1 + Σ exp(score)) over the spans of all passages of a question; the 1 is no answer.

    Shared normalisation (Clark and Gardner, arXiv 1710.10723, section 3.2): scores compare across passages.
    """
    by_question = grouped_logsumexp(scores.flatten(1).logsumexp(1), questions, count)
    return torch.logaddexp(by_question, torch.zeros_like(by_question))
