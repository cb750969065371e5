# SPDX-License-Identifier: Apache-2.0
"""Stores of random shapes whose memory starts as NaN, and how to compare two of them."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import torch

from kvopt import ops_kv
from kvopt.reference_kv_codes import CODE_BITS, FP8, MODEL, packed_bytes

DIMS = [4, 8, 20, 64, 80, 96, 128, 256]
QUERY_GROUPS = [1, 2, 4, 8, 3]
CODECS = {"model": 0, "fp8": 1, "int8": 2, "int4": 3, "int2": 4}


@dataclass
class Store:
    """As the operators take it."""

    segments: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    plain_keys: torch.Tensor
    plain_values: torch.Tensor
    packed_keys: torch.Tensor
    packed_values: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    factors: torch.Tensor
    codec: int
    group: int

    def tensors(self):
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("codec", "group")
        }

    def arguments(self):
        return (*self.tensors().values(), self.codec, self.group)

    def to(self, device):
        """A copy, even on the same device."""
        return Store(
            **{k: t.to(device, copy=True) for k, t in self.tensors().items()},
            codec=self.codec,
            group=self.group,
        )

    def filled(self, row, head):
        """(packed slots, plain slots) of a segment, as indices into ``positions``."""
        packed_begin, _, plain_begin, _ = self.segments[row, head].tolist()
        packed, plain = self.lengths[row, head].tolist()
        plain_begin += self.packed_keys.shape[1]
        return (
            torch.arange(packed_begin, packed_begin + packed),
            torch.arange(plain_begin, plain_begin + plain),
        )


def empty_store(capacities, dim, codec, group, residual, dtype, *, scores=True, factors=False, device="cpu"):
    """Of rows x heads segments; ``capacities[row][head]`` tokens, of which all beyond ``residual`` may be packed."""
    rows, heads = len(capacities), len(capacities[0])
    segments = torch.zeros(rows, heads, 4, dtype=torch.int32)
    most_packed = most_plain = 0
    for row, of_row in enumerate(capacities):
        packed_end = plain_end = 0
        for head, capacity in enumerate(of_row):
            packed = group * (max(0, capacity - residual) // group)
            segments[row, head] = torch.tensor([packed_end, packed, plain_end, capacity - packed])
            packed_end, plain_end = packed_end + packed, plain_end + capacity - packed
        most_packed, most_plain = max(most_packed, packed_end), max(most_plain, plain_end)
    slots = most_packed + most_plain
    size = packed_bytes(codec, dtype, dim)
    of_keys, of_values = {
        MODEL: ((0,), (0,)),
        FP8: ((rows, most_packed), (rows, most_packed)),
    }.get(codec, ((rows, most_packed // group, 2, dim), (rows, most_packed, -(-dim // group), 2)))
    nan = float("nan")
    plain = torch.full((rows, most_plain, dim), nan, dtype=dtype)
    packed = torch.full((rows, most_packed, size), 0xFF, dtype=torch.uint8)
    return Store(
        segments,
        torch.zeros(rows, heads, 2, dtype=torch.int32),
        torch.randint(-(2**31), 2**31, (rows, slots), dtype=torch.int32),
        torch.full((rows, slots) if scores else (0,), nan),
        *(plain, plain.clone(), packed, packed.clone()),
        *(torch.full(size, nan, dtype=torch.float16) for size in (of_keys, of_values)),
        torch.full((rows, most_packed, 2) if factors else (0,), nan),
        *(codec, group),
    ).to(device)


def random_layout(codec):
    """group, residual: what such a codec allows."""
    if codec in CODE_BITS:
        group = random.choice([8, 16, 32])
        return group, group * random.choice([1, 2])
    group = random.choice([1, 1, 4])
    return group, random.choice([group, 5 + group, 0 if group == 1 else group])


def random_store(codec, dtype, *, dim=None, rows=None, alike=False, scores=True, factors=False, device="cpu"):
    """An empty one; ``alike``: all heads of the same capacity."""
    rows, heads = rows or random.randint(1, 3), random.randint(1, 3)
    sizes = [0, 1, 5, 40, 70, 150]
    capacities = [[random.choice(sizes) for _ in range(heads)] for _ in range(rows)]
    if alike:
        capacities = [[random.choice(sizes)] * heads] * rows
    group, residual = random_layout(codec)
    dim = dim or random.choice(DIMS)
    return empty_store(
        capacities, dim, codec, group, residual, dtype, scores=scores, factors=factors, device=device
    )


def upper_of(lower):
    """A second layer's store, which shares what the first one packs."""
    own = ("lengths", "positions", "scores", "plain_keys", "plain_values", "factors")
    return dataclasses.replace(lower, **{name: getattr(lower, name).clone() for name in own})


def random_pair(codec, dtype, *, alike=False, scores=True, device="cpu"):
    """Two empty ones that share what they pack, and how many of the newest tokens stay plain."""
    rows, heads = random.randint(1, 3), random.randint(1, 3)
    sizes = [0, 1, 5, 40, 70, 150]
    capacities = [[random.choice(sizes) for _ in range(heads)] for _ in range(rows)]
    if alike:
        capacities = [[random.choice(sizes)] * heads] * rows
    group = random.choice([8, 16, 32] if codec in CODE_BITS else [1, 1, 4])
    residual = group * random.choice([1, 2]) + random.choice([0, 3])
    plain = residual + random.choice([0, 1, 9])
    dim = random.choice(DIMS)
    lower = empty_store(
        capacities, dim, codec, group, plain, dtype, scores=scores, factors=True, device=device
    )
    return lower, upper_of(lower), residual


def random_tokens(store, count):
    """keys and values (B, H, count, D), with a constant channel and vectors of 0, and positions (B, 1, count)."""
    rows, heads = store.segments.shape[:2]
    plain = store.plain_keys
    shape = (rows, heads, count, plain.shape[2])
    keys, values = (torch.randn(shape, device=plain.device).to(plain.dtype) for _ in range(2))
    keys[..., 0] = 3
    if count > 4:
        keys[:, :, 1] = 0
        values[:, :, 2] = 0
        values[:, :, 3] *= 100
    positions = torch.arange(count, dtype=torch.int32, device=plain.device).expand(rows, 1, count)
    return keys, values, positions.contiguous()


def fill(store, count, operators=ops_kv, *, counts=None, token_scores=None):
    """The first tokens of ``count`` random ones into an empty store; each segment takes some of them."""
    rows, heads = store.segments.shape[:2]
    device = store.positions.device
    keys, values, positions = random_tokens(store, count)
    chosen = positions.clone()
    if counts is None:
        counts = torch.randint(0, count + 5, (rows, heads), dtype=torch.int32)
    arguments = (keys, values, positions, token_scores, chosen, counts.to(device))
    operators.kv_quant_pack(store, *arguments)
    return arguments


def bits_of(tensor):
    """As bytes, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor


def assert_same(got, expected, but=()):
    """Bit for bit, unfilled slots included: nobody writes where no token belongs."""
    other = expected.tensors()
    for name, tensor in got.tensors().items():
        if name not in but:
            assert torch.equal(bits_of(tensor.cpu()), bits_of(other[name].cpu())), name
