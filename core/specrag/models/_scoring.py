"""Scoring with a model of transformers: the log-probabilities of given tokens.

Packed: all conversations in one row of one forward pass, without padding. Padded: a batch, where the architecture
does not obey the mask that packing needs. Both give the same values, those of each conversation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specrag.models.tokenization import EncodedConversation, shared_beginning

# Tokens of one packed pass. Its mask has the square of this many entries: 64 MiB in float32.
MAX_PACKED_TOKENS = 4096
# Positions whose logits over the whole vocabulary are in memory at once as float32.
SCORED_AT_ONCE = 512

# Tokens that the probes of `obeys_explicit_masks` begin with.
_PROBE_SHARED = 16

#: Per conversation: the log-probability, in nats, of the token at each wanted position.
ByPosition = dict[int, float]


def groups(conversations: Sequence[EncodedConversation]) -> Iterator[list[int]]:
    """Indices of the conversations that share a pass; shortest first, so that little is padding."""
    group: list[int] = []
    for i in sorted(range(len(conversations)), key=lambda i: len(conversations[i].ids)):
        if group and sum(len(conversations[j].ids) for j in (*group, i)) > MAX_PACKED_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def fits_window(model: Any, members: Sequence[EncodedConversation]) -> bool:
    """Whether no member is longer than the model's sliding window: a packed row has one mask, which does not slide."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return window is None or max(len(member.ids) for member in members) <= window


def obeys_explicit_masks(model: Any, tolerance: float) -> bool:
    """Whether packed probes score as the same texts alone. As real conversations do, they begin alike and then differ.

    A position that a model takes from the place in the row (ALiBi) shows only so: the second text's own part then
    stands farther from the shared part than it does alone.

    Args:
        tolerance: The largest difference, in nats, that counts as equal.
    """
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    probes = [
        EncodedConversation(ids, {"own": list(range(_PROBE_SHARED, len(ids)))})
        for ids in probe_rows(model, _PROBE_SHARED, (4, 20, 9))
    ]
    try:
        packed = score_packed(model, probes)
    except (ValueError, TypeError, RuntimeError):
        return False
    alone = [score_padded(model, [probe])[0] for probe in probes]
    return all(abs(a[p] - b[p]) <= tolerance for a, b in zip(packed, alone, strict=True) for p in a)


def probe_rows(model: Any, shared: int, own: Sequence[int]) -> list[list[int]]:
    """Rows of random token ids: ``shared`` that all begin with, then ``own[i]`` of row i."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def drawn(count: int) -> list[int]:
        return torch.randint(vocabulary // 2, (count,), generator=generator).tolist()

    beginning = drawn(shared)
    return [[*beginning, *drawn(count)] for count in own]


def score_packed(model: Any, members: Sequence[EncodedConversation]) -> list[ByPosition]:
    """Score all conversations in one row of one forward pass."""
    row = _pack(members)
    if not row.wanted:
        return [{} for _ in members]
    at = sorted({wanted.before for wanted in row.wanted})
    logits = model(
        input_ids=torch.tensor([row.ids], device=model.device),
        attention_mask=None if len(members) == 1 else _mask(row.owners, model),
        position_ids=torch.tensor([row.positions], device=model.device),
        use_cache=False,
        logits_to_keep=torch.tensor(at, device=model.device),
    ).logits[0]
    place = {before: i for i, before in enumerate(at)}
    values = _log_probs(logits, [place[w.before] for w in row.wanted], [w.token for w in row.wanted])
    scored: list[ByPosition] = [{} for _ in members]
    for wanted, value in zip(row.wanted, values, strict=True):
        scored[wanted.owner][wanted.position] = value
    return scored


@dataclass(frozen=True)
class _Wanted:
    """A token to score: whose it is, its position there, and the index in the row of the token before it."""

    owner: int
    position: int
    token: int
    before: int


@dataclass(frozen=True)
class _PackedRow:
    """[shared beginning][own part of 0][own part of 1]... An ``owner`` of -1 means shared.

    Positions go on from the shared part in each own part.
    """

    ids: list[int]
    owners: list[int]
    positions: list[int]
    wanted: list[_Wanted]


def _pack(members: Sequence[EncodedConversation]) -> _PackedRow:
    shared = shared_beginning([member.ids for member in members]) if len(members) > 1 else 0
    row = _PackedRow(members[0].ids[:shared], [-1] * shared, list(range(shared)), [])
    for owner, member in enumerate(members):
        start = len(row.ids) - shared  # index in the row = this + position, after the shared part
        row.ids.extend(member.ids[shared:])
        row.owners.extend([owner] * (len(member.ids) - shared))
        row.positions.extend(range(shared, len(member.ids)))
        for position in _positions(member):
            before = start + position - 1 if position > shared else position - 1
            row.wanted.append(_Wanted(owner, position, member.ids[position], before))
    return row


def _mask(owners: Sequence[int], model: Any) -> Tensor:  # [1, 1, tokens, tokens]
    """A token sees the shared part and its own conversation, up to itself."""
    owner = torch.tensor(owners, device=model.device)
    seen = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    seen = seen & torch.ones_like(seen).tril()
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    return mask.masked_fill_(~seen, torch.finfo(model.dtype).min)[None, None]


def score_padded(model: Any, members: Sequence[EncodedConversation]) -> list[ByPosition]:
    """Score a right-padded batch, with logits at every position that any conversation wants."""
    longest = max(len(member.ids) for member in members)
    ids = torch.zeros(len(members), longest, dtype=torch.long)
    mask = torch.zeros(len(members), longest, dtype=torch.long)
    for i, member in enumerate(members):
        ids[i, : len(member.ids)] = torch.tensor(member.ids)
        mask[i, : len(member.ids)] = 1
    at = sorted({position - 1 for member in members for position in _positions(member)})
    if not at:
        return [{} for _ in members]
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=None if len(members) == 1 else mask.to(model.device),
        use_cache=False,
        logits_to_keep=torch.tensor(at, device=model.device),
    ).logits
    place = {before: i for i, before in enumerate(at)}
    scored = []
    for row, member in enumerate(members):
        wanted = _positions(member)
        values = _log_probs(logits[row], [place[p - 1] for p in wanted], [member.ids[p] for p in wanted])
        scored.append(dict(zip(wanted, values, strict=True)))
    return scored


def _positions(member: EncodedConversation) -> list[int]:
    """The positions of all named segments, in order."""
    return sorted(position for at in member.segments.values() for position in at)


def _log_probs(
    logits: Tensor,  # [positions, vocabulary]
    rows: Sequence[int],
    tokens: Sequence[int],
) -> list[float]:
    """The log-probability of ``tokens[i]`` under ``logits[rows[i]]``, a bounded number at a time."""
    values: list[float] = []
    for at in range(0, len(rows), SCORED_AT_ONCE):
        some = logits[list(rows[at : at + SCORED_AT_ONCE])].float()
        ids = torch.tensor(tokens[at : at + SCORED_AT_ONCE], device=some.device)
        values += (some.gather(-1, ids[:, None])[:, 0] - some.logsumexp(-1)).tolist()
    return values
