# SPDX-License-Identifier: Apache-2.0
"""Tokens of which some are to stay, and how they get into a store that already holds packed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvopt import ops_kv, reference_kv
from kvopt.cache.store import Store

_LEAVES, _STAYS, _ENTERS = 0.0, 1.0, 2.0


@dataclass
class Candidates:
    """What was kept, then the new tokens, both in the order of positions.

    Attributes:
        keys, values: (B, H, n, D).
        positions: (B, 1 or H, n) int32, -1 where there is none.
        scores: (B, H, n) float32; None for none.
        old: how many of the n were kept before.
        order: (B, H, old) int64, the index in its segment of each of those.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None = None
    old: int = 0
    order: Tensor | None = None


def joined(kept: Candidates, new: Candidates) -> Candidates:
    """Both together; the scores are those of the kept ones alone."""
    heads = kept.positions.shape[1]
    return Candidates(
        torch.cat([kept.keys, new.keys], dim=2),
        torch.cat([kept.values, new.values], dim=2),
        torch.cat([kept.positions, new.positions.expand(-1, heads, -1)], dim=2),
        *(kept.scores, kept.old, kept.order),
    )


def append_chosen(
    stores: Sequence[Store],
    candidates: Sequence[Candidates],
    chosen: Tensor,
    most: int,
) -> None:
    """Adds the chosen new tokens one after another, in place of kept ones that leave. What is packed stays as it is.

    Args:
        stores: written; of one layer, or of the two of a pair. Each segment has room for what was chosen for it, or was
            full.
        candidates: of each, of which :attr:`Candidates.old` lie in the store; in a pair the same tokens.
        chosen: (B, 1 or H, m) int32 indices of those that stay, n where there is none.
        most: at least as many as are chosen in any segment.
    """
    one = candidates[0]
    old, order = one.old, one.order
    assert order is not None
    rows, heads, n, dim = one.keys.shape
    stays = torch.zeros(rows, heads, n + 1, dtype=torch.bool, device=chosen.device)
    stays.scatter_(2, chosen.long().expand(-1, heads, -1), True)
    # In place of the scores, marks tell the operator who makes room. As many leave as enter once a segment is full.
    marks = torch.where(stays[:, :, :old], _STAYS, _LEAVES)
    marks = stores[0].scatter(torch.zeros_like(marks).scatter_(2, order, marks))
    with torch.inference_mode(False):
        marked = [replace(store, scores=marks.clone()) for store in stores]
    enters = stays[:, :, old:n]
    place = (~enters).int().argsort(dim=-1, stable=True)[:, :, : min(most, n - old)]
    positions = one.positions[:, :, old:].expand(-1, heads, -1).gather(2, place)
    positions = positions.masked_fill(~enters.gather(2, place), -1).permute(2, 0, 1).contiguous()
    at = place[..., None].expand(-1, -1, -1, dim)
    vectors = [
        [x[:, :, old:].gather(2, at).permute(2, 0, 1, 3).contiguous() for x in (part.keys, part.values)]
        for part in candidates
    ]
    merge = stores[0].shape.merge
    for step, position in enumerate(positions):
        if merge is not None:
            lower, upper = marked
            ops_kv.kv_merge_evict(
                *(lower, upper),
                position,
                order=reference_kv.LOWEST_SCORE,
                residual=merge.residual(stores[0].shape.codec),
                t=merge.share,
            )
        for store, (keys, values) in zip(marked, vectors, strict=True):
            ops_kv.kv_evict_append(
                *(store, keys[step], values[step], position),
                new_score=_ENTERS,
                order=reference_kv.LOWEST_SCORE,
            )
    for store, part in zip(stores, candidates, strict=True):
        if store.shape.scored and part.scores is not None:
            _write_scores(store, part.positions.expand(-1, heads, -1), part.scores)


def _write_scores(store: Store, positions: Tensor, scores: Tensor) -> None:
    """Gives every token of ``store`` the score that ``scores`` (B, H, n) have for its position."""
    have = store.gather(store.positions, store.widest, -1)
    # -1 in the middle, the padding of new tokens, becomes a repetition: searchsorted finds the first.
    at = torch.searchsorted(positions.cummax(dim=-1).values.contiguous(), have.contiguous())
    found = scores.gather(2, at.clamp(max=positions.shape[2] - 1))
    store.scores.copy_(store.scatter(found))
