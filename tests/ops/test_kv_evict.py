# SPDX-License-Identifier: Apache-2.0
"""Append, pack, evict: against reference_kv bit for bit, and against lists of tokens kept in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops_kv, reference_kv
from kvopt.reference_kv_segment import HALF
from ops.kv_stores import CODECS, assert_same, empty_store, fill, random_store
from ops.test_kv_quant import each_codec, each_device, each_dtype, skip_double_on


def on_cpu(values):
    return tuple(v.cpu() if isinstance(v, torch.Tensor) else v for v in values)


@each_device
@each_codec
@each_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_append_equals_reference(device, codec, dtype, shared):
    skip_double_on(device, dtype)
    for _ in range(2):
        factors = random.random() < 0.3
        store = random_store(CODECS[codec], dtype, alike=shared, factors=factors, device=device)
        rows, heads = store.segments.shape[:2]
        count = random.choice([0, 10, 100])
        counts = torch.full((rows, heads), count, dtype=torch.int32) if shared else None
        scores = torch.rand(rows, heads, count, device=device)
        if random.random() < 0.5:
            scores = (scores * 4).round()  # ties
        fill(store, count, counts=counts, token_scores=scores)
        expected = store.to("cpu")
        rule = (
            random.randrange(2),
            random.choice([0, 4]),
            random.choice([0, 8, 1000, HALF]),
            shared,
            random.random() < 0.3,
        )
        for step in range(random.choice([1, 20, 60])):
            shape = (rows, heads, store.plain_keys.shape[2])
            key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            own = 1 if shared else random.choice([1, heads])
            position = torch.full((rows, own), count + step, dtype=torch.int32, device=device)
            if random.random() < 0.1:
                position[0, -1] = -1
            token_score = torch.rand(rows, heads, device=device) if random.random() < 0.3 else None
            victim = None
            if random.random() < 0.2:
                victim = torch.randint(
                    -1, 60, (rows, 1 if shared else heads), dtype=torch.int32, device=device
                )
            new_score = random.choice([0.0, 1.0, math.inf])
            arguments = (key, value, position, token_score, new_score, victim, *rule)
            ops_kv.kv_evict_append(store, *arguments)
            reference_kv.kv_evict_append(expected, *on_cpu(arguments))
            assert_same(store, expected)


class Segment:
    """A segment as two lists of (position, score); slots are indices into them."""

    def __init__(self, packed_capacity, plain_capacity, group):
        self.packed, self.plain = [], []
        self.packed_capacity, self.plain_capacity, self.group = packed_capacity, plain_capacity, group

    @property
    def half(self):
        """The newer one of the slots."""
        capacity = self.packed_capacity + self.plain_capacity
        return capacity - capacity // 2

    def append(self, token, choose):
        if len(self.plain) < self.plain_capacity:
            self.plain.append(token)
        elif len(self.packed) < self.packed_capacity:
            if not self.plain_capacity:
                self.packed.append(token)
                return
            oldest = sorted(self.plain)[: self.group]
            self.packed += oldest
            keep = self.plain_capacity - self.group
            holes = [i for i, t in enumerate(self.plain) if t in oldest and i < keep]
            late = [t for i, t in enumerate(self.plain) if t not in oldest and i >= keep]
            for hole, mover in zip(holes, late, strict=True):
                self.plain[hole] = mover
            self.plain = [*self.plain[:keep], token]
        elif self.packed or self.plain:
            victim = choose([*self.packed, *self.plain])
            if victim >= len(self.packed):
                self.plain[victim - len(self.packed)] = token
            elif not self.plain_capacity:
                self.packed[victim] = token
            else:
                oldest = self.plain.index(min(self.plain))
                self.packed[victim] = self.plain[oldest]
                self.plain[oldest] = token


def choose_by_score(tokens, newest, first, recent, age):
    """Each rule in turn until one leaves a token; the lowest of what it leaves."""
    rules = [
        lambda p: first <= p <= newest - recent,
        lambda p: first <= p,
        lambda p: True,
    ]
    for rule in rules:
        left = [(s / max(1, newest - p) if age else s, p, i) for i, (p, s) in enumerate(tokens) if rule(p)]
        if left:
            return min(left)[2]
    raise AssertionError


def most_rounding(codec, x):
    """What rounding one group x may cost: half a step, and what fp16 takes from its scale and its least value.

    E4M3 has three bits of mantissa, its step grows with the value: half of it is at most a sixteenth of the greatest.
    """
    if codec == 1:
        return x.abs().max() * (2**-4 + 2**-10)
    extent = x.max() - x.min()
    return extent / (2 * {2: 255, 3: 15, 4: 3}[codec]) + (extent + x.abs().max()) * 2**-10 + 1e-7


@each_device
@each_codec
@pytest.mark.parametrize("order", [0, 1], ids=["oldest", "score"])
@pytest.mark.parametrize("age", [False, True], ids=["", "age"])
def test_append_equals_lists(device, codec, order, age):
    group, residual = (1, random.choice([0, 3])) if CODECS[codec] < 2 else (8, 16)
    capacities = [[random.choice([0, 1, 7, 30, 45]) for _ in range(2)]]
    store = empty_store(capacities, 8, CODECS[codec], group, residual, torch.float32, device=device)
    expected = [Segment(n[1], n[3], group) for n in store.segments[0].tolist()]
    first, recent = random.choice([(0, 0), (4, 0), (0, 5), (4, 8), (0, HALF)])
    vectors = {}
    for position in range(120):
        key = torch.randn(1, 2, 8, device=device)
        score = (torch.rand(1, 2, device=device) * 8).round() / 8
        vectors[position] = key[0].cpu()
        at = torch.tensor([[position]], dtype=torch.int32, device=device)
        ops_kv.kv_evict_append(store, key, -key, at, score, order=order, first=first, recent=recent, age=age)
        for head, segment in enumerate(expected):

            def choose(tokens, position=position, segment=segment):
                if order == 0:
                    tokens = [(p, p) for p, _ in tokens]
                protected = segment.half if recent == HALF else recent
                return choose_by_score(tokens, position, first, protected, age and order == 1)

            segment.append((position, score[0, head].item()), choose)
    here = store.to("cpu")
    keys, values, positions = (x.cpu() for x in ops_kv.kv_quant_unpack(store, 50))
    for head, segment in enumerate(expected):
        assert here.lengths[0, head].tolist() == [len(segment.packed), len(segment.plain)]
        tokens = [*segment.packed, *segment.plain]
        assert positions[0, head, : len(tokens)].tolist() == [p for p, _ in tokens]
        slots = torch.cat(here.filled(0, head))
        assert here.scores[0, slots].tolist() == [s for _, s in tokens]
        for i, (position, _) in enumerate(tokens):
            exact = vectors[position][head]
            if i >= len(segment.packed) or CODECS[codec] == 0:
                assert torch.equal(keys[0, head, i], exact) and torch.equal(values[0, head, i], -exact)
            else:  # values are always rounded over their own groups
                error = (values[0, head, i] + exact).abs().max()
                assert error <= most_rounding(CODECS[codec], exact)


@each_device
def test_shared_heads_evict_the_lowest_sum(device):
    heads, count = 3, 20
    store = empty_store([[count] * heads], 4, 0, 1, count, torch.float32, device=device)
    scores = torch.rand(1, heads, count, device=device)
    fill(store, count, counts=torch.full((1, heads), count, dtype=torch.int32), token_scores=scores)
    x = torch.zeros(1, heads, 4, device=device)
    at = torch.tensor([[count]], dtype=torch.int32, device=device)
    ops_kv.kv_evict_append(store, x, x, at, None, 5.0, None, 1, 2, 3, True, False)
    total = scores[0].cpu().sum(0)
    total[:2] = total[count - 2 :] = math.inf  # recent = 3 counts the new token
    positions = ops_kv.kv_quant_unpack(store, count)[2].cpu()
    assert (positions[0, :, total.argmin()] == count).all()
    assert ((positions == count).sum(-1) == 1).all()


@each_device
def test_nothing_happens_without_a_position(device):
    store = empty_store([[4, 4], [4, 4]], 8, 0, 1, 4, torch.float32, device=device)
    fill(store, 4)
    before = store.to("cpu")
    x = torch.randn(2, 2, 8, device=device)
    nowhere = torch.full((2, 1), -1, dtype=torch.int32, device=device)
    ops_kv.kv_evict_append(store, x, x, nowhere)
    assert_same(store, before)


@each_device
def test_a_store_without_slots_drops_tokens(device):
    store = empty_store([[0]], 8, CODECS["int4"], 8, 8, torch.float32, device=device)
    x = torch.randn(1, 1, 8, device=device)
    ops_kv.kv_evict_append(store, x, x, torch.zeros(1, 1, dtype=torch.int32, device=device), order=1)
    assert store.lengths.tolist() == [[[0, 0]]]
    assert torch.equal(ops_kv.kv_attention_decode(x, store, 1.0).cpu(), torch.zeros(1, 1, 8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_odd_scores(device, score):
    """NaN counts as +infinity; among equals the oldest leaves."""
    store = empty_store([[6]], 4, 0, 1, 6, torch.float32, device=device)
    counts = torch.tensor([[6]], dtype=torch.int32)
    fill(store, 6, counts=counts, token_scores=torch.full((1, 1, 6), score, device=device))
    x = torch.zeros(1, 1, 4, device=device)
    at = torch.tensor([[6]], dtype=torch.int32, device=device)
    ops_kv.kv_evict_append(store, x, x, at, order=1, first=2)
    assert ops_kv.kv_quant_unpack(store, 6)[2].flatten().tolist() == [0, 1, 6, 3, 4, 5]
