# SPDX-License-Identifier: Apache-2.0
"""A store of a KV cache and its segments in plain torch: how a slot is packed, read and moved.

What the fields hold stands in ``csrc/common/kv_store.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvopt.reference_kv_codes import (
    CODE_BITS,
    FP8,
    MODEL,
    direction_and_norm,
    fp8_codes,
    integer_codes,
    integer_range,
    join_codes,
    split_codes,
)

HALF = -1  # as ``recent``: the newer half of a segment's capacity


class Store(Protocol):
    """One layer of a cache. Slots beyond a segment's ``lengths`` hold anything, NaN included.

    Attributes:
        segments: (B, H, 4) int32: packed_begin, packed_capacity, plain_begin, plain_capacity, counted from the row's
            start; the packed ones are multiples of ``group``, and plain_capacity ≥ group where there are packed slots
            and group > 1.
        lengths: (B, H, 2) int32, how many packed and plain slots are filled: the first ones of each part.
        positions: (B, Q + P) int32, plain slot j of a row at Q + j.
        scores: (B, Q + P) float32, or (0,).
        plain_keys, plain_values: (B, P, D) float32, float16, bfloat16 or (on the CPU) float64.
        packed_keys, packed_values: (B, Q, bytes) uint8.
        key_scale: float16: (B, Q / G, 2, D) scale and minimum, fp8: (B, Q), else (0,).
        value_scale: float16: (B, Q, ⌈D / G⌉, 2) scale and minimum, fp8: (B, Q), else (0,).
        factors: (B, Q, 2) float32, by which the packed key and value are multiplied, or (0,).
        codec: 0 the model's type, 1 fp8, 2 int8, 3 int4, 4 int2.
        group: G ≥ 1.
    """

    segments: Tensor
    lengths: Tensor
    positions: Tensor
    scores: Tensor
    plain_keys: Tensor
    plain_values: Tensor
    packed_keys: Tensor
    packed_values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    factors: Tensor
    codec: int
    group: int


@dataclass
class Segment:
    """One (row, head) of a store, slots as indices into the row."""

    store: Store
    row: int
    head: int
    packed_begin: int
    packed_capacity: int
    plain_begin: int
    plain_capacity: int
    packed: int
    plain: int

    @property
    def packed_slots(self) -> Tensor:
        """The filled ones."""
        return torch.arange(self.packed_begin, self.packed_begin + self.packed, device=self.device)

    @property
    def plain_slots(self) -> Tensor:
        """The filled ones, counted from the row's first plain slot."""
        return torch.arange(self.plain_begin, self.plain_begin + self.plain, device=self.device)

    @property
    def slots(self) -> Tensor:
        """Index into ``positions`` and ``scores`` of every filled slot, packed ones first."""
        return torch.cat([self.packed_slots, self.store.packed_keys.shape[1] + self.plain_slots])

    @property
    def positions(self) -> Tensor:
        """Of every filled slot, packed ones first."""
        return self.store.positions[self.row, self.slots]

    @property
    def device(self) -> torch.device:
        """The store's."""
        return self.store.positions.device

    def recent(self, recent: int) -> int:
        """``recent``, or what ``HALF`` of this segment is."""
        capacity = self.packed_capacity + self.plain_capacity
        return capacity - capacity // 2 if recent == HALF else recent

    def write_lengths(self, packed: int, plain: int) -> None:
        """How many slots are filled from now on."""
        self.packed, self.plain = packed, plain
        new = torch.tensor([packed, plain], dtype=torch.int32)
        self.store.lengths[self.row, self.head] = new.to(self.device)

    def note(self, slots: Tensor, positions: Tensor, scores: Tensor | float) -> None:
        """Writes position and score of slots, given as indices into ``positions``."""
        self.store.positions[self.row, slots] = positions
        if self.store.scores.numel():
            self.store.scores[self.row, slots] = scores

    def pack(
        self,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        into_group: bool = False,
        directions: bool = False,
    ) -> None:
        """Packs (n, D) vectors into packed slots (n,), whole groups, or ``into_group`` one slot of an existing one.

        With ``directions`` they are packed as they are, whatever their norms, and factors stay to be written.
        """
        store, row = self.store, self.row
        codec, group, dim = store.codec, store.group, keys.shape[1]
        normed = store.factors.numel() > 0 and not directions
        if normed or codec != MODEL:
            keys, values = keys.float(), values.float()
        if normed:
            keys, key_norm = direction_and_norm(keys)
            values, value_norm = direction_and_norm(values)
            store.factors[row, slots] = torch.stack([key_norm, value_norm], -1)
        if codec == MODEL:
            for target, x in ((store.packed_keys, keys), (store.packed_values, values)):
                target[row, slots] = x.to(store.plain_keys.dtype).contiguous().view(torch.uint8)
        elif codec == FP8:
            store.packed_keys[row, slots], store.key_scale[row, slots] = fp8_codes(keys)
            store.packed_values[row, slots], store.value_scale[row, slots] = fp8_codes(values)
        else:
            bits = CODE_BITS[codec]
            if into_group:
                scale, lowest = store.key_scale[row, slots // group].unbind(1)
                codes = integer_codes(keys, scale, lowest, bits)
            else:
                grouped = keys.view(-1, group, dim)
                scale, lowest = integer_range(grouped, bits, 1)
                codes = integer_codes(grouped, scale, lowest, bits).view(-1, dim)
                store.key_scale[row, slots[::group] // group] = torch.cat([scale, lowest], 1)
            store.packed_keys[row, slots] = join_codes(codes, bits)
            codes_of, ranges = [], []
            for part in torch.split(values, group, dim=-1):
                scale, lowest = integer_range(part, bits, -1)
                codes_of.append(integer_codes(part, scale, lowest, bits))
                ranges.append(torch.cat([scale, lowest], -1))
            store.packed_values[row, slots] = join_codes(torch.cat(codes_of, -1), bits)
            store.value_scale[row, slots] = torch.stack(ranges, 1)

    def read(self, compute: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (n, D) of the filled slots, packed ones first."""
        store, row = self.store, self.row
        slots, dim = self.packed_slots, store.plain_keys.shape[2]
        codes = (store.packed_keys[row, slots], store.packed_values[row, slots])
        if store.codec == MODEL:
            keys, values = (x.contiguous().view(store.plain_keys.dtype).to(compute) for x in codes)
        elif store.codec == FP8:
            scales = (store.key_scale[row, slots], store.value_scale[row, slots])
            keys, values = (
                x.view(torch.float8_e4m3fn).to(compute) * scale.to(compute)[:, None]
                for x, scale in zip(codes, scales, strict=True)
            )
        else:
            bits = CODE_BITS[store.codec]
            scale, lowest = store.key_scale[row, slots // store.group].to(compute).unbind(1)
            keys = scale * split_codes(codes[0], bits) + lowest
            ranges = store.value_scale[row, slots].to(compute).repeat_interleave(store.group, dim=1)[:, :dim]
            values = ranges[..., 0] * split_codes(codes[1], bits) + ranges[..., 1]
        if store.factors.numel():
            factors = store.factors[row, slots].to(compute)
            keys, values = keys * factors[:, :1], values * factors[:, 1:]
        plain = self.plain_slots
        keys = torch.cat([keys, store.plain_keys[row, plain].to(compute)])
        return keys, torch.cat([values, store.plain_values[row, plain].to(compute)])


def segments_of(store: Store) -> Iterator[Segment]:
    """Every (row, head), row by row."""
    lengths = store.lengths.tolist()
    for row, heads in enumerate(store.segments.tolist()):
        for head, numbers in enumerate(heads):
            yield Segment(store, row, head, *numbers, *lengths[row][head])


def of_head(x: Tensor, row: int, head: int) -> Tensor:
    """Of a (B, 1 or H, ...) tensor."""
    return x[row, head if x.shape[1] > 1 else 0]


def close_gaps(s: Segment, leaving: Tensor) -> None:
    """Moves plain tokens into the slots below the rest that ``leaving`` (indices, in any order) leave; lowest first."""
    stays = torch.ones(s.plain, dtype=torch.bool, device=s.device)
    stays[leaving] = False
    rest = s.plain - leaving.shape[0]
    holes, movers = (~stays[:rest]).nonzero()[:, 0], rest + stays[rest:].nonzero()[:, 0]
    move_plain(s, s.plain_begin + holes, s.plain_begin + movers)


def move_plain(s: Segment, to: Tensor, source: Tensor) -> None:
    """Copies tokens between plain slots, given as indices into the row."""
    store, row, packed_slots = s.store, s.row, s.store.packed_keys.shape[1]
    for x in (store.plain_keys, store.plain_values):
        x[row, to] = x[row, source]
    scores = store.scores[row, packed_slots + source] if store.scores.numel() else 0.0
    s.note(packed_slots + to, store.positions[row, packed_slots + source], scores)
