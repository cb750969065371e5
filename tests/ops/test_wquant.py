# SPDX-License-Identifier: Apache-2.0
"""Rounding, packing and unpacking: compiled against reference, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops, reference
from kvopt.reference import Scheme
from ops.formats import DTYPES, SCHEMES, group_for, random_plain, random_weight

each_scheme = pytest.mark.parametrize(("bits", "scheme"), SCHEMES, ids=lambda value: str(int(value)))
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@each_scheme
@pytest.mark.parametrize(
    ("n", "k", "group"), [(33, 704, 128), (7, 100, 100), (64, 256, 32), (1, 17, 17), (40, 80, 48)]
)
def test_rtn_equals_reference_bit_for_bit(device, dtype, bits, scheme, n, k, group):
    group = group_for(scheme, k, group)
    weight = random_weight(n, k, device, dtype)
    for got, expected in zip(
        ops.wquant_rtn(weight, bits, group, scheme),
        reference.wquant_rtn(weight.cpu(), bits, group, scheme),
        strict=True,
    ):
        assert torch.equal(got.cpu(), expected)


@each_device
@each_scheme
def test_rtn_error_is_at_most_half_a_step(device, bits, scheme):
    n, k = 48, 160
    group = group_for(scheme, k, 32)
    weight = random_weight(n, k, device)
    codes, scale, zero = ops.wquant_rtn(weight, bits, group, scheme)
    back = reference.dequantize_codes(codes, scale, zero, group, torch.float32, scheme)
    step = reference.expand_groups(scale.float(), k, group)
    # Rounding the scale to fp16 moves a value by its share of 2^-11 of the scale, or 2^-25 where it is subnormal (below
    # 2^-14, as for 8-bit rows of size 1e-3).
    rounding = (step * 2.0**-11).clamp(min=2.0**-25)
    if scheme.has_book:
        book = reference.BOOKS[scheme].sort().values
        bound = step * (book[1:] - book[:-1]).max() / 2 + rounding
    else:  # half a step, and the ends of the range are Q steps away
        bound = step * 0.5 + (2**bits - 1) * rounding
    if scheme == Scheme.ASYMMETRIC:
        bound = bound + step * 0.5  # a zero point is a whole code, so the range may shift by half a step
    assert ((back - weight).abs() <= bound).all()


@each_device
@each_scheme
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(33, 704, 128), (7, 101, 101), (64, 256, 32), (1, 1, 1), (15, 65, 16), (50, 333, 48)],
)
def test_pack_follows_the_layout_and_unpack_inverts_it(device, bits, scheme, n, k, group):
    group = group_for(scheme, k, group)
    plain = random_plain(n, k, bits, group, scheme, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, scheme)
    expected = reference.wquant_pack(
        *(t.cpu() for t in plain), bits, group, scheme, "tile32" if device == "cpu" else "mma16"
    )
    assert torch.equal(packed.cpu(), expected[0])
    assert torch.equal(meta.cpu(), expected[1])
    for got, before in zip(ops.wquant_unpack(packed, meta, n, k, bits, group, scheme), plain, strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("layout", ["tile32", "mma16"])
@each_scheme
def test_reference_layouts_are_permutations(layout, bits, scheme):
    n, k = random.randrange(1, 70), 16 * random.randrange(1, 40)
    group = group_for(scheme, k, 16)
    plain = random_plain(n, k, bits, group, scheme, "cpu")
    packed, meta = reference.wquant_pack(*plain, bits, group, scheme, layout)
    back = reference.wquant_unpack(packed, meta, n, k, bits, group, scheme, layout)
    assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))


@pytest.mark.parametrize("layout", ["tile32", "mma16"])
@each_scheme
def test_every_bit_of_a_full_layout_is_used_once(layout, bits, scheme):
    """All codes at their largest fill the buffer with ones: no two codes share a bit, and none is left."""
    n, k = 64, 768
    codes = torch.full((n, k), 2**bits - 1, dtype=torch.uint8)
    if scheme == Scheme.INT8_DYNAMIC and layout == "mma16":
        codes ^= 0x80  # stored as signed bytes
    one = torch.ones(n, 1, dtype=torch.float16)
    packed, meta = reference.wquant_pack(codes, one, one, bits, k, scheme, layout)
    assert (packed == 255).all()
    assert (meta.view(torch.float16) == 1).all()


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@each_scheme
@pytest.mark.parametrize(("n", "k", "group"), [(37, 208, 64), (18, 75, 75)])
def test_dequantize_equals_its_formula_bit_for_bit(device, dtype, bits, scheme, n, k, group):
    group = group_for(scheme, k, group)
    plain = random_plain(n, k, bits, group, scheme, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, scheme)
    got = ops.wquant_dequantize(packed, meta, n, k, bits, group, scheme, dtype)
    expected = reference.dequantize_codes(*(t.cpu() for t in plain), group, dtype, scheme)
    assert torch.equal(got.cpu(), expected)


@each_device
@each_scheme
def test_rows_are_rows_of_the_dequantized_weight(device, bits, scheme):
    n, k = 50, 96
    group = group_for(scheme, k, 32)
    plain = random_plain(n, k, bits, group, scheme, device)
    packed, meta = ops.wquant_pack(*plain, bits, group, scheme)
    rows = torch.randint(0, n, (23,), device=device)
    dense = ops.wquant_dequantize(packed, meta, n, k, bits, group, scheme, torch.float32)
    got = ops.wquant_rows(packed, meta, rows, k, bits, group, scheme, torch.float32)
    assert torch.equal(got, dense[rows])


@each_device
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"scheme": 5}, "scheme must be 0 .asymmetric.*, got 5"),
        ({"scheme": Scheme.NF4, "bits": 3}, "bits must be 4 for the code book of scheme 2, got 3"),
        ({"scheme": Scheme.INT8_DYNAMIC, "bits": 4, "group": 128}, "bits must be 8 for int8 dynamic, got 4"),
        (
            {"scheme": Scheme.INT8_DYNAMIC, "bits": 8},
            "group_size must be the number of columns .*128.*got 64",
        ),
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
    with pytest.raises(RuntimeError, match=f"wquant_rtn: {message}|wquant_rtn: .*{message}"):
        torch.ops.kvopt.wquant_rtn(
            weight, change.get("bits", 4), change.get("group", 64), int(change.get("scheme", 1))
        )


@each_device
@each_scheme
def test_opcheck(device, bits, scheme):
    n, k = 20, 96
    format = (bits, group_for(scheme, k, 32), int(scheme))
    plain = random_plain(n, k, bits, format[1], scheme, device)
    packed, meta = ops.wquant_pack(*plain, *format)
    check = torch.library.opcheck
    for dtype in DTYPES:
        check(torch.ops.kvopt.wquant_rtn, (random_weight(n, k, device, dtype), *format))
        check(torch.ops.kvopt.wquant_dequantize, (packed, meta, n, k, *format, dtype))
    check(torch.ops.kvopt.wquant_pack, (*plain, *format))
    check(torch.ops.kvopt.wquant_unpack, (packed, meta, n, k, *format))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_scheme
def test_graph_replay_equals_eager(bits, scheme):
    n, k = 40, 192
    format = (bits, group_for(scheme, k, 64), scheme)
    weight = random_weight(n, k, "cuda")

    def all_operators() -> list[torch.Tensor]:
        plain = ops.wquant_rtn(weight, *format)
        packed, meta = ops.wquant_pack(*plain, *format)
        dense = ops.wquant_dequantize(packed, meta, n, k, *format, torch.float16)
        return [*plain, packed, meta, *ops.wquant_unpack(packed, meta, n, k, *format), dense]

    expected = [t.clone() for t in all_operators()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_operators()
    for t in captured:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
