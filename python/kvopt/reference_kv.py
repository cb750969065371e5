# SPDX-License-Identifier: Apache-2.0
"""The operators on a KV cache in plain torch: readable, slow, and the contract of the compiled ones.

B rows, H KV heads, D numbers per vector, Q packed and P plain slots per row, G = group; the fields of a store, what is
packed how, and which slot a token goes to stand in ``csrc/common/kv_store.h``, word for word as it is done here. Every
device agrees with this file in positions, lengths, slots and codes, ties included, and within rounding in the rest.

Sums are taken in float32, or in float64 for a float64 store; ``compute`` asks for another type, for tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvopt.reference_kv_segment import Segment, Store, close_gaps, of_head, segments_of

OLDEST, LOWEST_SCORE = range(2)  # orders of eviction
KEEP_SCORES, ADD_SCORES, REPLACE_SCORES, MAXIMUM_SCORES = range(4)  # updates of attention

_QUERY_TILE = 256


def _compute_type(dtype: torch.dtype, compute: torch.dtype | None) -> torch.dtype:
    return compute or (torch.float64 if dtype == torch.float64 else torch.float32)


def kv_select_scores(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    maximum: bool,
    compute: torch.dtype | None = None,
) -> Tensor:
    """As :func:`kvopt.ops_kv.kv_select_scores` says; the result in ``compute`` if that was given, else float32."""
    rows, heads, n, dim = key.shape
    wide = _compute_type(key.dtype, compute)
    grouped = query.reshape(rows, heads, query.shape[1] // heads, query.shape[2], dim)
    transposed = key.to(wide)[:, :, None].transpose(-1, -2)
    scores = torch.zeros(rows, heads, n, dtype=wide, device=key.device)
    for first in range(0, query.shape[2], _QUERY_TILE):
        tile = slice(first, first + _QUERY_TILE)
        present = (key_positions[:, :, None] >= 0) & (
            key_positions[:, :, None] <= query_positions[:, None, tile, None]
        )
        logits = grouped[:, :, :, tile].to(wide) @ transposed * scale
        logits = logits.masked_fill(~present[:, :, None], -math.inf)
        seen = present.any(-1, keepdim=True)[:, :, None]
        weights = torch.where(seen, logits.softmax(-1), 0.0)
        if maximum:
            scores = torch.maximum(scores, weights.amax((2, 3)))
        else:
            scores += weights.sum((2, 3))
    return scores if compute else scores.float()


def kv_quant_pack(
    store: Store,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    token_scores: Tensor | None,
    chosen: Tensor,
    counts: Tensor,
) -> None:
    """As :func:`kvopt.ops_kv.kv_quant_pack` says."""
    group, packed_slots = store.group, store.packed_keys.shape[1]
    wanted = counts.tolist()
    for s in segments_of(store):
        count = max(0, min(wanted[s.row][s.head], chosen.shape[2], s.packed_capacity + s.plain_capacity))
        index = of_head(chosen, s.row, s.head)[:count].long()
        packed = -(-max(0, count - s.plain_capacity) // group) * group
        s.write_lengths(packed, count - packed)
        key, value = keys[s.row, s.head, index], values[s.row, s.head, index]
        if packed:
            s.pack(s.packed_slots, key[:packed], value[:packed])
        store.plain_keys[s.row, s.plain_slots] = key[packed:]
        store.plain_values[s.row, s.plain_slots] = value[packed:]
        slots = torch.cat([s.packed_slots, packed_slots + s.plain_slots])
        scores = 0.0 if token_scores is None else token_scores[s.row, s.head, index]
        s.note(slots, of_head(key_positions, s.row, s.head)[index], scores)


def kv_quant_unpack(
    store: Store, slots: int, compute: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kvopt.ops_kv.kv_quant_unpack` says; keys and values in ``compute`` if that was given."""
    rows, heads = store.segments.shape[:2]
    dtype = store.plain_keys.dtype
    shape = (rows, heads, slots, store.plain_keys.shape[2])
    keys = torch.zeros(shape, dtype=compute or dtype, device=store.positions.device)
    values = torch.zeros_like(keys)
    positions = store.positions.new_full((rows, heads, slots), -1)
    for s in segments_of(store):
        key, value = s.read(_compute_type(dtype, compute))
        count = min(slots, key.shape[0])
        keys[s.row, s.head, :count] = key[:count].to(keys.dtype)
        values[s.row, s.head, :count] = value[:count].to(keys.dtype)
        positions[s.row, s.head, :count] = s.positions[:count]
    return keys, values, positions


def _priorities(scores: Tensor, positions: Tensor, newest: int, order: int, age: bool) -> Tensor:
    if order == OLDEST:
        return positions.double()
    if age:
        scores = scores / (newest - positions).clamp(min=1).float()
    return torch.where(scores.isnan(), math.inf, scores)


def choose_victim(
    scores: Tensor, positions: Tensor, newest: int, order: int, first: int, recent: int, age: bool
) -> int:
    """The index, among n slots with ``scores`` (ignored for OLDEST) and ``positions`` (n,), of the one that leaves.

    The lowest priority; ties: the lowest position, then the lowest index. Slots with first ≤ position ≤ newest - recent
    only; if there are none, those with first ≤ position; if none either, all. ``age`` divides a score by
    max(1, newest - position). A NaN counts as +infinity.
    """
    eligible = (positions >= first) & (positions <= newest - recent)
    if not eligible.any():
        eligible = positions >= first
    if not eligible.any():
        eligible = torch.ones_like(eligible)
    priority = _priorities(scores, positions, newest, order, age)
    left = eligible.nonzero()[:, 0]
    left = left[priority[left] == priority[left].min()]
    return int(left[positions[left].argmin()])


def kv_evict_append(
    store: Store,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    token_score: Tensor | None,
    new_score: float,
    victim: Tensor | None,
    order: int,
    first: int,
    recent: int,
    shared: bool,
    age: bool,
) -> None:
    """As :func:`kvopt.ops_kv.kv_evict_append` says."""
    group, packed_slots, rows = store.group, store.packed_keys.shape[1], store.positions.shape[0]
    segments = list(segments_of(store))
    common: list[int] = []
    if shared:  # before any head changes
        for row in range(rows):
            of_row = [s for s in segments if s.row == row]
            n = min(s.packed + s.plain for s in of_row)
            total = torch.zeros(n, device=store.positions.device)
            for s in of_row:
                if store.scores.numel():
                    total = total + store.scores[row, s.slots[:n]]
            rule = (int(position[row, 0]), order, first, of_row[0].recent(recent), age)
            common.append(choose_victim(total, of_row[0].positions[:n], *rule) if n else -1)
    for s in segments:
        newest = int(of_head(position, s.row, s.head))
        if newest < 0 or s.packed_capacity + s.plain_capacity == 0:
            continue
        score = new_score if token_score is None else token_score[s.row, s.head]
        new_key, new_value = key[s.row, s.head], value[s.row, s.head]

        if s.plain < s.plain_capacity:  # (i)
            slot = s.plain_begin + s.plain
            s.write_lengths(s.packed, s.plain + 1)
        elif s.packed + group <= s.packed_capacity:  # (ii)
            into = torch.arange(s.packed, s.packed + group, device=s.device) + s.packed_begin
            if s.plain_capacity == 0:
                s.pack(into, new_key[None], new_value[None])
                s.write_lengths(s.packed + 1, 0)
                s.note(into, of_head(position, s.row, s.head), score)
                continue
            by_age = store.positions[s.row, packed_slots + s.plain_slots].argsort(stable=True)
            _move_to_packed(s, into, s.plain_begin + by_age[:group])
            rest = s.plain_capacity - group
            close_gaps(s, by_age[:group])
            slot = s.plain_begin + rest
            s.write_lengths(s.packed + group, rest + 1)
        else:  # (iii)
            index = -1 if victim is None else int(of_head(victim, s.row, s.head))
            if not 0 <= index < s.packed + s.plain:
                index = common[s.row] if shared else -1
            if index < 0:
                scores = store.scores[s.row, s.slots] if store.scores.numel() else s.positions.float()
                index = choose_victim(scores, s.positions, newest, order, first, s.recent(recent), age)
            if index >= s.packed:
                slot = s.plain_begin + index - s.packed
            else:
                into = torch.tensor([s.packed_begin + index], device=s.device)
                if s.plain_capacity == 0:
                    s.pack(into, new_key[None], new_value[None], into_group=True)
                    s.note(into, of_head(position, s.row, s.head), score)
                    continue
                oldest = s.plain_begin + store.positions[s.row, packed_slots + s.plain_slots].argmin()
                _move_to_packed(s, into, oldest[None], into_group=True)
                slot = int(oldest)
        store.plain_keys[s.row, slot] = new_key
        store.plain_values[s.row, slot] = new_value
        at = torch.tensor([packed_slots + slot], device=s.device)
        s.note(at, of_head(position, s.row, s.head), score)


def _move_to_packed(s: Segment, into: Tensor, plain: Tensor, *, into_group: bool = False) -> None:
    store, row, packed_slots = s.store, s.row, s.store.packed_keys.shape[1]
    keys, values = store.plain_keys[row, plain], store.plain_values[row, plain]
    s.pack(into, keys, values, into_group=into_group)
    scores = store.scores[row, packed_slots + plain] if store.scores.numel() else 0.0
    s.note(into, store.positions[row, packed_slots + plain], scores)


def turn_back(query: Tensor, gap: int, frequencies: Tensor) -> Tensor:
    """Rotates the pairs (i, i + rotary / 2) of the last dimension by -gap * frequencies[i]; rotary = 2 * len."""
    half = frequencies.shape[0]
    angle = (gap * frequencies.float()).to(query.dtype)
    x, y, rest = torch.split(query, [half, half, query.shape[-1] - 2 * half], dim=-1)
    return torch.cat(
        [x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin(), rest],
        dim=-1,
    )


def kv_attention_decode(
    query: Tensor,
    store: Store,
    scale: float,
    update: int = KEEP_SCORES,
    first: int = 0,
    gap: Tensor | None = None,
    frequencies: Tensor | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:
    """As :func:`kvopt.ops_kv.kv_attention_decode` says; the result in ``compute`` if that was given."""
    wide = _compute_type(query.dtype, compute)
    group = query.shape[1] // store.segments.shape[1]
    out = torch.zeros(query.shape, dtype=wide, device=query.device)
    for s in segments_of(store):
        if s.packed + s.plain == 0:
            continue
        heads = slice(s.head * group, (s.head + 1) * group)
        q = query[s.row, heads].to(wide)
        keys, values = s.read(wide)
        logits = q @ keys.T
        if first > 0 and gap is not None and frequencies is not None:
            turned = turn_back(q, int(gap[s.row]), frequencies) @ keys.T
            logits = torch.where(s.positions < first, turned, logits)
        weights = (logits * scale).softmax(-1)
        out[s.row, heads] = weights @ values
        if update == KEEP_SCORES:
            continue
        had, total = store.scores[s.row, s.slots], weights.sum(0).float()
        if update == ADD_SCORES:
            total = had + total
        elif update == MAXIMUM_SCORES:
            total = torch.maximum(had, weights.amax(0).float())
        store.scores[s.row, s.slots] = total
    return out if compute else out.to(query.dtype)


def kv_merge_pair(
    a: Tensor, b: Tensor, t: float, compute: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`kvopt.ops_kv.kv_merge_pair` says; everything in ``compute`` if that was given."""
    wide = _compute_type(a.dtype, compute)
    x, y = a.to(wide), b.to(wide)
    norm_x, norm_y = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    u = torch.where(norm_x == 0, 0.0, x / norm_x)
    v = torch.where(norm_y == 0, 0.0, y / norm_y)
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    line = (1 - t) * u + t * v
    length = line.norm(dim=-1, keepdim=True)
    line = torch.where(length < 1e-4, u, line / length)
    arc = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
    direction = torch.where(angle.sin() < 1e-4, line, arc)
    missing = (norm_x == 0) | (norm_y == 0)
    direction = torch.where(missing, u + v, direction)  # one of them is 0
    distance = torch.where(missing, 0.0, angle / math.pi)
    numbers = [x[..., 0].to(compute or torch.float32) for x in (norm_x, norm_y, distance)]
    return direction.to(compute or a.dtype), numbers[0], numbers[1], numbers[2]
