# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4 are bitsandbytes': the same books, the same codes bit for bit, scales that its state gives back."""

from __future__ import annotations

import pytest
import torch

from kvopt import ops, reference
from kvopt.reference import Scheme
from kvopt.weights.formats import CompactAbsmax

functional = pytest.importorskip("bitsandbytes.functional")

each_scheme = pytest.mark.parametrize("scheme", [Scheme.NF4, Scheme.FP4], ids=lambda s: s.name.lower())
each_block = pytest.mark.parametrize("block", [64, 128, 256, 512])


def random_weight(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(96, 1024) * torch.logspace(-6, 2, 96)[:, None]
    weight[3] = 0
    weight[4, 5:900] = 0
    weight[5] = weight[5].abs()
    return weight.to(dtype)


def plain_codes(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Bitsandbytes keeps the first of two codes in the high nibble."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], dim=1).view(shape)


@each_scheme
def test_books_are_equal(scheme):
    book = functional.get_4bit_type(scheme.name.lower(), device="cpu")
    assert torch.equal(reference.BOOKS[scheme], book)


@each_scheme
@each_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_scales_are_equal(scheme, block, dtype):
    weight = random_weight(dtype)
    theirs, state = functional.quantize_4bit(weight, quant_type=scheme.name.lower(), blocksize=block)
    codes, scale, _ = ops.wquant_rtn(weight, 4, block, scheme)
    assert torch.equal(codes, plain_codes(theirs, weight.shape))
    assert torch.equal(scale.flatten(), state.absmax.half().clamp(min=2.0**-24))


@each_scheme
def test_codes_on_and_beside_every_threshold(scheme):
    """A row's largest is 1, so the others are compared with the thresholds as they stand."""
    book = reference.BOOKS[scheme].sort().values
    middle = (book[:-1] + book[1:]) / 2
    low, high = torch.tensor(-2.0), torch.tensor(2.0)
    row = torch.cat([torch.ones(1), middle, torch.nextafter(middle, low), torch.nextafter(middle, high)])
    weight = torch.nn.functional.pad(row, (0, 64 - row.numel()))[None]
    theirs, _ = functional.quantize_4bit(weight, quant_type=scheme.name.lower())
    assert torch.equal(ops.wquant_rtn(weight, 4, 64, scheme)[0], plain_codes(theirs, weight.shape))


def test_dynamic_map_is_equal():
    assert torch.equal(reference.dynamic_map(), functional.create_dynamic_map())


@each_scheme
def test_its_double_quantised_state_gives_its_scales(scheme):
    n, k = 96, 1024
    weight = random_weight(torch.float32)
    _, state = functional.quantize_4bit(weight, quant_type=scheme.name.lower(), compress_statistics=True)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    absmax = CompactAbsmax(state.absmax, state.state2.absmax, state.offset)
    meta = ops.wquant_expand_scales(absmax.codes, absmax.scale, absmax.offset, n, k, 4, 64, scheme)
    size = reference.packed_bytes(n, k, 4, scheme, "tile32")
    packed = torch.zeros(size, dtype=torch.uint8)
    scale = ops.wquant_unpack(packed, meta, n, k, 4, 64, scheme)[1]
    assert torch.equal(scale.flatten(), theirs.half().clamp(min=2.0**-24))


@each_scheme
def test_double_quantisation_is_its_own_up_to_its_table(scheme):
    """Its CPU code looks codes up in a table of 2^16 entries, so a few differ; ours are never further off."""
    weight = torch.randn(96, 1024)
    _, state = functional.quantize_4bit(weight, quant_type=scheme.name.lower(), compress_statistics=True)
    absmax = weight.view(96, -1, 64).abs().amax(dim=2)
    ours = CompactAbsmax.of(absmax)
    assert torch.equal(ours.scale, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    assert (ours.codes == state.absmax).float().mean() > 0.95
    book = reference.dynamic_map().double()
    scaled = (absmax.flatten().double() - ours.offset) / ours.scale.repeat_interleave(256)[: absmax.numel()]
    distance = [(book[codes.long()] - scaled).abs() for codes in (ours.codes, state.absmax)]
    assert (
        distance[0] <= distance[1] + 2.0**-21 * scaled.abs()
    ).all()  # four roundings in fp32 on either side
