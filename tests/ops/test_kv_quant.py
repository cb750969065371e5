# SPDX-License-Identifier: Apache-2.0
"""Filling a store and reading it: against reference_kv bit for bit, and reference_kv against the formulas."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops_kv, reference_kv
from ops.kv_stores import CODECS, DIMS, assert_same, empty_store, fill, random_store

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
each_device = pytest.mark.parametrize("device", DEVICES)
each_codec = pytest.mark.parametrize("codec", CODECS)


def skip_double_on(device, dtype):
    if device != "cpu" and dtype == torch.float64:
        pytest.skip("float64 stores are for the CPU")


@each_device
@each_codec
@each_dtype
@pytest.mark.parametrize("factors", [False, True], ids=["", "factors"])
def test_pack_equals_reference(device, codec, dtype, factors):
    skip_double_on(device, dtype)
    for count in (0, 1, 2, 30, 160):
        store = random_store(
            CODECS[codec], dtype, factors=factors, scores=random.random() < 0.8, device=device
        )
        expected = store.to("cpu")
        scores = (
            torch.rand(*store.segments.shape[:2], count, device=device) if random.random() < 0.5 else None
        )
        arguments = fill(store, count, token_scores=scores)
        reference_kv.kv_quant_pack(expected, *(None if t is None else t.cpu() for t in arguments))
        assert_same(store, expected)


@each_device
@each_codec
@each_dtype
@pytest.mark.parametrize("factors", [False, True], ids=["", "factors"])
def test_unpack_equals_reference(device, codec, dtype, factors):
    skip_double_on(device, dtype)
    for slots in (0, 7, 160):
        store = random_store(CODECS[codec], dtype, factors=factors, device=device)
        fill(store, 100)
        expected = reference_kv.kv_quant_unpack(store.to("cpu"), slots, torch.float64)
        got = ops_kv.kv_quant_unpack(store, slots)
        assert torch.equal(got[2].cpu(), expected[2])
        for a, b in zip(got[:2], expected[:2], strict=True):
            assert a.dtype == dtype
            # s * code is exact in fp32; adding lo, a factor and the type round once each.
            in_fp32 = 2.0**-23 if dtype != torch.float64 else 2.0**-52
            limits = torch.finfo(dtype)
            bound = (1.01 * in_fp32 + limits.eps / 2) * b.abs() + limits.tiny * 2.0**-11
            assert ((a.cpu().double() - b).abs() <= bound).all()


@each_device
@pytest.mark.parametrize("codec", ["model", "fp8", "int8"])
def test_different_heads_take_different_tokens(device, codec):
    store = empty_store([[40, 20], [9, 40]], 8, CODECS[codec], 8, 8, torch.float32, device=device)
    keys = torch.randn(2, 2, 50, 8, device=device)
    values = torch.randn_like(keys)
    positions = torch.stack([torch.arange(50), torch.arange(50) - 7])[:, None].int().to(device)
    chosen = torch.stack([torch.randperm(50)[:40].sort().values for _ in range(4)]).view(2, 2, 40)
    chosen = chosen.int().to(device)
    counts = torch.tensor([[40, 20], [9, 31]], dtype=torch.int32, device=device)
    scores = torch.rand(2, 2, 50, device=device)
    ops_kv.kv_quant_pack(store, keys, values, positions, scores, chosen, counts)
    got, _, at = ops_kv.kv_quant_unpack(store, 40)
    for row in range(2):
        for head in range(2):
            count = counts[row, head]
            index = chosen[row, head, :count].long()
            assert torch.equal(at[row, head, :count], positions[row, 0, index])
            assert (at[row, head, count:] == -1).all()
            assert (got[row, head, count:] == 0).all()
            exact = keys[row, head, index]
            extent, largest = exact.amax(0) - exact.amin(0), exact.abs().amax(0)
            # Half a step: of three bits of mantissa, or of the smallest numbers; one of 255 of a channel, whose scale
            # and least value fp16 rounds.
            allowed = {
                "model": 0 * exact,
                "fp8": 2**-4 * exact.abs() + 2**-18 * exact.abs().amax(1, keepdim=True),
                "int8": extent / 510 + (extent + largest) * 2**-10,
            }[codec]
            assert ((got[row, head, :count] - exact).abs() <= allowed).all()
            slots = torch.cat(store.to("cpu").filled(row, head))
            assert torch.equal(store.scores[row].cpu()[slots], scores[row, head, index].cpu())


def integer_by_the_formula(numbers, bits):
    """KIVI's rounding of a list of floats, number by number."""
    lowest, highest = min(numbers), max(numbers)
    half = lambda x: torch.tensor(x, dtype=torch.float32).half().float().item()  # noqa: E731
    single = lambda x: torch.tensor(x, dtype=torch.float32).item()  # noqa: E731
    scale = half(single(single(highest - lowest) / (2**bits - 1)))
    lowest = half(lowest)
    codes = []
    for x in numbers:
        code = 0 if scale == 0 else round(single(single(x - lowest) / scale))  # Python rounds half to even
        codes.append(min(max(code, 0), 2**bits - 1))
    return codes, scale, lowest


@pytest.mark.parametrize(("codec", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
def test_reference_follows_the_formula(codec, bits):
    """Keys per channel over groups of tokens, values per token over groups of channels, lowest bits first."""
    group, dim = 8, 20
    store = empty_store([[28]], dim, CODECS[codec], group, group, torch.float32)
    keys, values, *_ = fill(store, 28, reference_kv, counts=torch.tensor([[28]], dtype=torch.int32))
    packed = int(store.lengths[0, 0, 0])
    assert packed == 16
    per_byte = 8 // bits

    def code(packed_bytes, slot, channel):
        return int(packed_bytes[0, slot, channel // per_byte]) >> channel % per_byte * bits & 2**bits - 1

    for first in range(0, packed, group):
        for channel in range(dim):
            column = keys[0, 0, first : first + group, channel].tolist()
            codes, scale, lowest = integer_by_the_formula(column, bits)
            assert [code(store.packed_keys, first + i, channel) for i in range(group)] == codes
            assert store.key_scale[0, first // group, :, channel].tolist() == [scale, lowest]
    for slot in range(packed):
        for begin in range(0, dim, group):
            part = values[0, 0, slot, begin : begin + group].tolist()
            codes, scale, lowest = integer_by_the_formula(part, bits)
            assert [code(store.packed_values, slot, begin + i) for i in range(len(part))] == codes
            assert store.value_scale[0, slot, begin // group].tolist() == [scale, lowest]


def test_reference_fp8_is_the_nearest():
    """Every vector's codes are the nearest of all e4m3fn numbers to x / s."""
    store = empty_store([[50]], 64, CODECS["fp8"], 1, 0, torch.float32)
    keys, *_ = fill(store, 50, reference_kv, counts=torch.tensor([[50]], dtype=torch.int32))
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    for slot in range(50):
        scale = (keys[0, 0, slot].abs().max() / 448).half().clamp(min=2.0**-24)
        assert store.key_scale[0, slot] == scale
        scaled = (keys[0, 0, slot] / scale.float()).double()
        nearest = (scaled[:, None] - numbers).abs().amin(1)
        code = store.packed_keys[0, slot].view(torch.float8_e4m3fn).double()
        assert torch.equal((scaled - code).abs(), nearest)


@each_device
def test_factors_hold_the_magnitude(device):
    store = empty_store([[64]], 64, CODECS["int8"], 32, 32, torch.float32, factors=True, device=device)
    keys, *_ = fill(store, 64, counts=torch.tensor([[64]], dtype=torch.int32))
    norm = keys[0, 0, :32].double().norm(dim=-1)
    assert torch.allclose(store.factors[0, :32, 0].double(), norm, rtol=1e-6)
    got = ops_kv.kv_quant_unpack(store, 64)[0][0, 0, :32]
    assert ((got - keys[0, 0, :32]).norm(dim=-1) <= 0.02 * norm).all()


@each_device
@pytest.mark.parametrize("dim", DIMS)
def test_constant_groups_are_exact(device, dim):
    """max = min gives scale 0: the minimum, whatever the code."""
    store = empty_store([[40]], dim, CODECS["int4"], 8, 8, torch.float32, device=device)
    keys = torch.full((1, 1, 40, dim), 0.75, device=device)
    at = torch.arange(40, dtype=torch.int32, device=device).view(1, 1, 40)
    counts = torch.tensor([[40]], dtype=torch.int32, device=device)
    ops_kv.kv_quant_pack(store, keys, -keys, at, None, at, counts)
    got_keys, got_values, _ = ops_kv.kv_quant_unpack(store, 40)
    assert torch.equal(got_keys, keys) and torch.equal(got_values, -keys)


@each_device
def test_huge_numbers_stay_finite(device):
    store = empty_store([[40]], 8, CODECS["int2"], 8, 8, torch.float32, device=device)
    keys = torch.randn(1, 1, 40, 8, device=device) * 1e30
    at = torch.arange(40, dtype=torch.int32, device=device).view(1, 1, 40)
    counts = torch.tensor([[40]], dtype=torch.int32, device=device)
    ops_kv.kv_quant_pack(store, keys, keys, at, None, at, counts)
    assert ops_kv.kv_quant_unpack(store, 40)[0].isfinite().all()


def test_an_index_beyond_the_candidates_is_refused():
    store = empty_store([[4, 4]], 8, 0, 1, 0, torch.float32)
    x, at = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, dtype=torch.int32)
    chosen = torch.tensor([[[0, 1, 2, 3], [0, 1, 4, 5]]], dtype=torch.int32)
    counts = torch.tensor([[4, 2]], dtype=torch.int32)
    ops_kv.kv_quant_pack(store, x, x, at, None, chosen, counts)  # what is not counted is not read
    with pytest.raises(RuntimeError, match=r"kv_quant_pack: chosen: head 1 of row 0 .* 4 candidates"):
        ops_kv.kv_quant_pack(store, x, x, at, None, chosen, torch.full_like(counts, 3))
