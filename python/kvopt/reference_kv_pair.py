# SPDX-License-Identifier: Apache-2.0
"""The operator on two layers that share what they pack (MiniCache, arXiv:2405.14366, section 3), in plain torch.

The rule stands in ``csrc/common/kv_store.h`` (KvMergeEvictParams), word for word as it is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvopt.reference_kv import choose_victim, kv_merge_pair
from kvopt.reference_kv_segment import Segment, Store, close_gaps, of_head, segments_of

Merge = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, Tensor]]
Pair = tuple[Segment, Segment]


def kv_merge_evict(
    lower: Store,
    upper: Store,
    position: Tensor,
    victim: Tensor | None,
    order: int,
    first: int,
    recent: int,
    shared: bool,
    age: bool,
    residual: int,
    t: float,
    merge: Merge = kv_merge_pair,
) -> None:
    """As :func:`kvopt.ops_kv.kv_merge_evict` says.

    ``merge`` does what :func:`kvopt.reference_kv.kv_merge_pair` does; a compiled one, rounded as it rounds, for tests.
    """
    pairs = list(zip(segments_of(lower), segments_of(upper), strict=True))
    common: list[int] = []
    if shared:  # before any head changes
        for row in range(lower.positions.shape[0]):
            of_row = [pair for pair in pairs if pair[0].row == row]
            n = min(low.packed + low.plain for low, _ in of_row)
            total = torch.zeros(n, device=lower.positions.device)
            for pair in of_row:
                total = total + _scores(pair)[:n]
            low = of_row[0][0]
            rule = (int(position[row, 0]), order, first, low.recent(recent), age)
            common.append(choose_victim(total, low.positions[:n], *rule) if n else -1)
    for pair in pairs:
        low, _ = pair
        newest = int(of_head(position, low.row, low.head))
        if newest < 0 or low.plain_capacity == 0 or low.plain < low.plain_capacity:  # (i)
            continue
        if low.packed + lower.group <= low.packed_capacity:  # (ii)
            leaving = _nearest(pair, lower.group, residual, merge, t)
            _merge_into(pair, low.packed, leaving, merge, t)
            packed = low.packed + lower.group
        else:  # (iii)
            index = -1 if victim is None else int(of_head(victim, low.row, low.head))
            if not 0 <= index < low.packed + low.plain:
                index = common[low.row] if shared else -1
            if index < 0:
                rule = (newest, order, first, low.recent(recent), age)
                index = choose_victim(_scores(pair), low.positions, *rule)
            packed = low.packed
            if index >= packed:
                leaving = torch.tensor([index - packed], device=low.device)
            else:
                leaving = _nearest(pair, 1, residual, merge, t)
                _merge_into(pair, index, leaving, merge, t, into_group=True)
        for segment in pair:
            close_gaps(segment, leaving)
            segment.write_lengths(packed, segment.plain - leaving.shape[0])


def _scores(pair: Pair) -> Tensor:
    """Of every filled slot, both layers' together."""
    low, up = pair
    if not low.store.scores.numel():
        return torch.zeros(low.packed + low.plain, device=low.device)
    return low.store.scores[low.row, low.slots] + up.store.scores[up.row, up.slots]


def _nearest(pair: Pair, count: int, residual: int, merge: Merge, t: float) -> Tensor:
    """The plain tokens (indices, in order of position) whose keys are nearest in the two layers.

    Of all but the newest ``residual - group``, ``group`` of which are left at least; a NaN is the farthest. Ties: the
    lower position, then the lower slot.
    """
    low = pair[0]
    group, packed_slots = low.store.group, low.store.packed_keys.shape[1]
    protected = max(0, min(residual, low.plain) - group)
    by_age = low.store.positions[low.row, packed_slots + low.plain_slots].argsort(stable=True)
    candidates = by_age[: low.plain - protected]
    slots = low.plain_begin + candidates
    a, b = (s.store.plain_keys[s.row, slots][None, None] for s in pair)
    distance = merge(a, b, t)[3].flatten()
    distance = torch.where(distance.isnan(), math.inf, distance)
    return candidates[distance.argsort(stable=True)[:count].sort().values]


def _merge_into(
    pair: Pair, index: int, plain: Tensor, merge: Merge, t: float, *, into_group: bool = False
) -> None:
    """Merges plain tokens and packs them from packed slot ``index`` of the segment on."""
    low = pair[0]
    into = low.packed_begin + index + torch.arange(plain.shape[0], device=low.device)
    slots = low.plain_begin + plain
    a, b = (torch.stack([s.store.plain_keys[s.row, slots], s.store.plain_values[s.row, slots]]) for s in pair)
    direction, *norms, _ = (x[0] for x in merge(a[None], b[None], t))
    low.pack(into, direction[0], direction[1], into_group=into_group, directions=True)
    for s, norm in zip(pair, norms, strict=True):
        s.store.factors[s.row, into] = norm.T
        at = s.store.packed_keys.shape[1] + slots
        scores = s.store.scores[s.row, at] if s.store.scores.numel() else 0.0
        s.note(into, s.store.positions[s.row, at], scores)
