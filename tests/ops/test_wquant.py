# SPDX-License-Identifier: Apache-2.0
"""Rounding, packing and unpacking: compiled against reference, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops, reference

FORMATS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def random_weight(n: int, k: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of different size, one of zeros, one of a single sign, one outlier."""
    weight = torch.randn(n, k) * torch.logspace(-3, 2, n)[torch.randperm(n), None]
    weight[random.randrange(n)] = 0
    weight[random.randrange(n)] = weight[random.randrange(n)].abs()
    weight[random.randrange(n), random.randrange(k)] *= 50
    return weight.to(device, dtype)


def random_plain(
    n: int, k: int, bits: int, group: int, symmetric: bool, device: str
) -> tuple[torch.Tensor, ...]:
    groups = reference.group_count(k, group)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups).add(0.01).half()
    zero = torch.full((n, groups), 2.0 ** (bits - 1)) if symmetric else torch.rand(n, groups) * 2**bits
    return codes.to(device), scale.to(device), zero.half().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(33, 704, 128), (7, 100, 100), (64, 256, 32), (1, 17, 17), (40, 80, 48)]
)
def test_rtn_equals_reference_bit_for_bit(device, dtype, bits, symmetric, n, k, group):
    weight = random_weight(n, k, device, dtype)
    for got, expected in zip(
        ops.wquant_rtn(weight, bits, group, symmetric),
        reference.wquant_rtn(weight.cpu(), bits, group, symmetric),
        strict=True,
    ):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_rtn_error_is_at_most_half_a_step(device, bits, symmetric):
    n, k, group = 48, 160, 32
    weight = random_weight(n, k, device)
    codes, scale, zero = ops.wquant_rtn(weight, bits, group, symmetric)
    back = reference.dequantize_codes(codes, scale, zero, group, torch.float32)
    step = reference.expand_groups(scale.float(), k, group)
    # Half a step, plus what rounding the scale to fp16 moves the ends of the range, Q steps away: 2^-11 of the scale,
    # or 2^-25 where it is subnormal (below 2^-14, as for 8-bit rows of size 1e-3).
    bound = step * 0.5 + (2**bits - 1) * (step * 2.0**-11).clamp(min=2.0**-25)
    if not symmetric:
        bound = bound + step * 0.5  # a zero point is a whole code, so the range may shift by half a step
    assert ((back - weight).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(33, 704, 128), (7, 101, 101), (64, 256, 32), (1, 1, 1), (15, 65, 16)]
)
def test_pack_follows_the_layout_and_unpack_inverts_it(device, bits, symmetric, n, k, group):
    plain = random_plain(n, k, bits, group, symmetric, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, symmetric)
    expected = reference.wquant_pack(
        *(t.cpu() for t in plain), bits, group, symmetric, "tile32" if device == "cpu" else "mma16"
    )
    assert torch.equal(packed.cpu(), expected[0])
    assert torch.equal(meta.cpu(), expected[1])
    for got, before in zip(ops.wquant_unpack(packed, meta, n, k, bits, group, symmetric), plain, strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("layout", ["tile32", "mma16"])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_reference_layouts_are_permutations(layout, bits, symmetric):
    n, k, group = random.randrange(1, 70), 16 * random.randrange(1, 12), 16
    plain = random_plain(n, k, bits, group, symmetric, "cpu")
    packed, meta = reference.wquant_pack(*plain, bits, group, symmetric, layout)
    back = reference.wquant_unpack(packed, meta, n, k, bits, group, symmetric, layout)
    assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_dequantize_equals_its_formula_bit_for_bit(device, dtype, bits, symmetric):
    n, k, group = 37, 208, 64
    plain = random_plain(n, k, bits, group, symmetric, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, symmetric)
    got = ops.wquant_dequantize(packed, meta, n, k, bits, group, symmetric, dtype)
    expected = reference.dequantize_codes(*(t.cpu() for t in plain), group, dtype)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_rows_are_rows_of_the_dequantized_weight(device, bits, symmetric):
    n, k, group = 50, 96, 32
    plain = random_plain(n, k, bits, group, symmetric, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, symmetric)
    rows = torch.randint(0, n, (23,), device=device)
    dense = ops.wquant_dequantize(packed, meta, n, k, bits, group, symmetric, torch.float32)
    got = ops.wquant_rows(packed, meta, rows, k, bits, group, symmetric, torch.float32)
    assert torch.equal(got, dense[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 8, got 5"),
        ({"group": 24}, "group_size must be a multiple of 16"),
        ({"group": 256}, "group_size must be a multiple of 16 up to the number of columns"),
        ({"dtype": torch.float64}, "weight must be float32, float16 or bfloat16"),
        ({"shape": (4,)}, "weight must be 2-dimensional"),
        ({"shape": (0, 64)}, "at least one row"),
    ],
)
def test_bad_arguments_are_named(device, change, message):
    weight = torch.zeros(
        change.get("shape", (4, 128)), dtype=change.get("dtype", torch.float32), device=device
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kvopt.wquant_rtn(weight, change.get("bits", 4), change.get("group", 64), True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_opcheck(device, bits, symmetric):
    n, k, group = 20, 96, 32
    plain = random_plain(n, k, bits, group, symmetric, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, symmetric)
    check = torch.library.opcheck
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(torch.ops.kvopt.wquant_rtn, (random_weight(n, k, device, dtype), bits, group, symmetric))
        check(torch.ops.kvopt.wquant_dequantize, (packed, meta, n, k, bits, group, symmetric, dtype))
    check(torch.ops.kvopt.wquant_pack, (*plain, bits, group, symmetric))
    check(torch.ops.kvopt.wquant_unpack, (packed, meta, n, k, bits, group, symmetric))
