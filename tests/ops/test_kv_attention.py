# SPDX-License-Identifier: Apache-2.0
"""Decode attention: against reference_kv in float64, against softmax written out, and what must not matter."""

from __future__ import annotations

import math
import random

import pytest
import torch

from conftest import DEVICES, relative_error
from kvopt import ops_kv, reference_kv
from ops.kv_stores import CODECS, DIMS, QUERY_GROUPS, assert_same, empty_store, fill, random_store
from ops.test_kv_quant import each_codec, each_device, each_dtype, skip_double_on

# In norm: twice the output's unit roundoff u (1.5 u in bfloat16), for sums in float32.
BOUNDS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float64: 1e-13}


def random_query(store, query_group):
    plain = store.plain_keys
    rows, heads = store.segments.shape[:2]
    return torch.randn(rows, heads * query_group, plain.shape[2], device=plain.device).to(plain.dtype)


def has_16_bit_operands(x):
    """On CUDA's tensor cores weights, values and scaled queries are rounded to 16 bits, sums are not.

    Weights, values of integer codes and the output: at most u each, √3 u in norm as they are independent. An integer
    codec's query times its channels' scales in fp16: a logit is off by a random sum of the channels' roundings, 3e-4
    for normal keys, whose codes times scales are some 2.5, and so is a weight or score. Together 1e-3 with fp16, of
    which BOUNDS times 3 is three times as much, and 4e-3 for the scores ten standard deviations.
    """
    return x.is_cuda and x.dtype.itemsize == 2


def check_against_reference(store, query_group, **options):
    query = random_query(store, query_group)
    before = store.to("cpu")
    scale = query.shape[2] ** -0.5
    got = ops_kv.kv_attention_decode(query, store, scale, **options)
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = reference_kv.kv_attention_decode(query.cpu(), before, scale, **options, compute=torch.float64)
    assert relative_error(got, expected) < BOUNDS[got.dtype] * (3 if has_16_bit_operands(got) else 1)
    rtol = 4e-3 if has_16_bit_operands(got) else 1e-4
    assert_same(store, before, but=["scores"])
    if store.scores.numel():
        filled = [torch.cat(store.filled(row, head)) for row, head in each_segment(before)]
        for (row, _), slots in zip(each_segment(before), filled, strict=True):
            a, b = store.scores[row].cpu()[slots], before.scores[row, slots]
            assert torch.allclose(a, b, rtol=rtol, atol=1e-6, equal_nan=options.get("update", 0) == 0)


def each_segment(store):
    rows, heads = store.segments.shape[:2]
    return [(row, head) for row in range(rows) for head in range(heads)]


@each_device
@each_codec
@each_dtype
@pytest.mark.parametrize("dim", DIMS)
def test_equals_reference(device, codec, dtype, dim):
    """Capacities, lengths, groups and options at random; what lies in unfilled slots is NaN."""
    skip_double_on(device, dtype)
    factors = random.random() < 0.3
    store = random_store(CODECS[codec], dtype, dim=dim, factors=factors, device=device)
    rows = store.segments.shape[0]
    fill(store, random.choice([20, 160]))
    options = {"update": random.randrange(4)}
    if random.random() < 0.5:
        options |= {
            "first": random.choice([0, 4, 50]),
            "gap": torch.randint(0, 2000, (rows,), dtype=torch.int32, device=device),
            "frequencies": torch.rand(random.randint(1, dim // 2), device=device),
        }
    check_against_reference(store, random.choice(QUERY_GROUPS), **options)


@each_device
@pytest.mark.parametrize("query_group", [*QUERY_GROUPS, 5, 7, 16])
@pytest.mark.parametrize("codec", CODECS)
def test_long_segments_of_different_lengths(device, query_group, codec):
    """Several units a segment, ends that no tile fits, and an empty one."""
    residual = {"model": 3000, "fp8": 7}.get(codec, 64)
    group = 32 if residual == 64 else 1
    capacities = [[1500, 0, 513], [1, 1024, 33]]
    store = empty_store(capacities, 64, CODECS[codec], group, residual, torch.float32, device=device)
    fill(store, 1500, counts=torch.tensor(capacities, dtype=torch.int32))
    check_against_reference(store, query_group, update=1)


@each_device
@each_dtype
def test_equals_softmax_written_out(device, dtype):
    skip_double_on(device, dtype)
    rows, heads, group, n, dim = 2, 2, 4, 70, 64
    store = empty_store([[n] * heads] * rows, dim, 0, 1, n, dtype, device=device)
    keys, values, *_ = fill(store, n, counts=torch.full((rows, heads), n, dtype=torch.int32))
    query = random_query(store, group)
    had = store.scores.double()
    got = ops_kv.kv_attention_decode(query, store, 0.3, update=reference_kv.ADD_SCORES)
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    logits = torch.einsum("bhd,bhnd->bhn", query.double(), k) * 0.3
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    assert relative_error(got, torch.einsum("bhn,bhnd->bhd", weights, v)) < BOUNDS[dtype]
    added = weights.view(rows, heads, group, n).sum(2).view(rows, heads * n)
    assert torch.allclose(store.scores.double(), had + added, atol=1e-5)


@each_device
def test_scores_sum_to_the_query_heads(device):
    store = empty_store([[300, 900]], 64, CODECS["int4"], 32, 64, torch.float32, device=device)
    fill(store, 900, counts=torch.tensor([[300, 900]], dtype=torch.int32))
    query = random_query(store, 4)
    for _ in range(3):
        ops_kv.kv_attention_decode(query, store, 0.125, update=reference_kv.ADD_SCORES)
    here = store.to("cpu")
    for head in range(2):
        slots = torch.cat(here.filled(0, head))
        assert here.scores[0, slots].sum().item() == pytest.approx(12, rel=1e-5)


@each_device
def test_turning_the_query_back_moves_the_sinks_forward(device):
    """Equal to rotating the keys of the first positions by +gap, pairs (i, i + R / 2)."""
    n, dim, rotary, first = 40, 64, 48, 4
    store = empty_store(
        [[n]], dim, 0, 1, n, torch.float64 if device == "cpu" else torch.float32, device=device
    )
    keys, values, *_ = fill(store, n, counts=torch.tensor([[n]], dtype=torch.int32))
    frequencies = 10000.0 ** (-torch.arange(rotary // 2, device=device) / (rotary // 2))
    gap = torch.tensor([37], dtype=torch.int32, device=device)
    query = random_query(store, 2)
    got = ops_kv.kv_attention_decode(query, store, 0.2, first=first, gap=gap, frequencies=frequencies)
    angle = (37 * frequencies).double()
    moved = keys.double().clone()
    x, y = moved[..., :first, : rotary // 2].clone(), moved[..., :first, rotary // 2 : rotary].clone()
    moved[..., :first, : rotary // 2] = x * angle.cos() - y * angle.sin()
    moved[..., :first, rotary // 2 : rotary] = y * angle.cos() + x * angle.sin()
    weights = (query.double() @ moved[0, 0].T * 0.2).softmax(-1)
    assert relative_error(got, weights @ values[0, 0].double()) < 1e-5


@each_device
@pytest.mark.parametrize("codec", CODECS)
def test_same_bits_in_every_run_and_for_every_thread_count(device, codec):
    store = random_store(CODECS[codec], torch.float32, dim=64, device=device)
    fill(store, 160)
    query, start = random_query(store, 4), store.scores.clone()
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            store.scores.copy_(start)
            out = ops_kv.kv_attention_decode(query, store, 0.125, update=reference_kv.REPLACE_SCORES)
            results.append((out, store.scores.clone()))
    finally:
        torch.set_num_threads(threads)
    for out, scores in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(scores.nan_to_num(7), results[0][1].nan_to_num(7))


@each_device
def test_large_logits_neither_overflow_nor_vanish(device):
    store = empty_store([[50]], 64, 0, 1, 50, torch.float32, device=device)
    keys, values, *_ = fill(store, 50, counts=torch.tensor([[50]], dtype=torch.int32))
    query = keys[:, :, 17] * 1e4
    got = ops_kv.kv_attention_decode(query, store, 1.0)
    assert relative_error(got[:, 0], values[:, 0, 17]) < 1e-6
    got = ops_kv.kv_attention_decode(-query, store, 1.0)
    assert got.isfinite().all()


@each_device
def test_a_key_that_is_not_a_number_shows(device):
    store = empty_store([[50, 50]], 64, 0, 1, 50, torch.float32, device=device)
    fill(store, 50, counts=torch.full((1, 2), 50, dtype=torch.int32))
    store.plain_keys[0, 70, 3] = math.nan
    out = ops_kv.kv_attention_decode(random_query(store, 1), store, 0.1)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    store = empty_store([[4]], 8, 0, 1, 4, torch.float32, device=device)
    for name in store.tensors():
        setattr(store, name, getattr(store, name)[:0] if name != "key_scale" else store.key_scale)
    out = ops_kv.kv_attention_decode(torch.zeros(0, 3, 8, device=device), store, 1.0)
    assert out.shape == (0, 3, 8)
