# SPDX-License-Identifier: Apache-2.0
"""Room in two layers that share what they pack: against reference_kv_pair, and against lists of tokens in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kvopt import ops_kv, reference_kv, reference_kv_pair
from kvopt.reference_kv_segment import HALF
from ops.kv_stores import CODECS, assert_same, empty_store, random_pair, upper_of
from ops.test_kv_evict import Segment, choose_by_score, most_rounding, on_cpu
from ops.test_kv_quant import each_codec, each_device, each_dtype, skip_double_on

UNIT_ROUNDOFF = 2**-24


def append(lower, upper, keys, values, position, scores=(None, None), operators=ops_kv):
    """One token into both layers."""
    rule = (0, 0, 0, False, False)
    for store, key, value, score in zip((lower, upper), keys, values, scores, strict=True):
        operators.kv_evict_append(store, key, value, position, score, 0.0, None, *rule)


def random_token(store, dtype):
    """Of one layer, and much the same of another."""
    shape, device = (*store.segments.shape[:2], store.plain_keys.shape[2]), store.positions.device
    key, value = (torch.randn(shape, device=device) for _ in range(2))
    key[..., 0] = 3
    key *= random.random() > 0.05  # a vector of 0 has distance 0
    noise = random.choice([0.0, 0.1, 1.0])
    others = (x + noise * torch.randn_like(x) for x in (key, value))
    return tuple(x.to(dtype) for x in (key, value, *others))


@each_device
@each_codec
@each_dtype
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_equals_reference(device, codec, dtype, shared):
    """Bit for bit, given the vectors that the compiled kv_merge_pair merges."""
    skip_double_on(device, dtype)

    def merge(a, b, t):
        return tuple(x.cpu() for x in ops_kv.kv_merge_pair(a.to(device), b.to(device), t))

    scored = random.random() < 0.8
    lower, upper, residual = random_pair(CODECS[codec], dtype, alike=shared, scores=scored, device=device)
    expected_lower = lower.to("cpu")
    expected_upper = upper.to("cpu")
    for name in ("packed_keys", "packed_values", "key_scale", "value_scale", "segments"):
        setattr(expected_upper, name, getattr(expected_lower, name))
    rows, heads = lower.segments.shape[:2]
    rule = (
        random.randrange(2) if scored else 0,
        random.choice([0, 4]),
        random.choice([0, 8, 1000, HALF]),
        shared,
        random.random() < 0.3,
    )
    last = (random.choice([residual, 0, 1000]), random.choice([0.0, 0.5, 0.6, 1.0]))
    for step in range(random.choice([1, 60, 200])):
        own = 1 if shared else random.choice([1, heads])
        position = torch.full((rows, own), step, dtype=torch.int32, device=device)
        if random.random() < 0.1:
            position[0, -1] = -1
        victim = None
        if random.random() < 0.2:
            victim = torch.randint(-1, 160, (rows, 1 if shared else heads), dtype=torch.int32, device=device)
        arguments = (position, victim, *rule, *last)
        ops_kv.kv_merge_evict(lower, upper, *arguments)
        reference_kv_pair.kv_merge_evict(expected_lower, expected_upper, *on_cpu(arguments), merge)
        assert_same(lower, expected_lower)
        assert_same(upper, expected_upper)
        room = lower.segments[..., 3] - lower.lengths[..., 1]
        assert ((room > 0) | (lower.segments[..., 3] == 0) | (position < 0)).all()
        key, value, other_key, other_value = random_token(lower, dtype)
        scores = [torch.rand(rows, heads, device=device) for _ in range(2)]
        if random.random() < 0.5:
            scores = [(score * 4).round() for score in scores]  # ties
        tokens = ((key, other_key), (value, other_value), position, scores)
        append(lower, upper, *tokens)
        on_host = [on_cpu(x) if isinstance(x, (tuple, list)) else x.cpu() for x in tokens]
        append(expected_lower, expected_upper, *on_host, operators=reference_kv)


class Pair(Segment):
    """A segment of both layers as two lists of tokens: (position, distance, scores)."""

    def make_room(self, residual, choose):
        if len(self.plain) < self.plain_capacity:
            return
        newest_first = sorted(self.plain, reverse=True)
        mergeable = newest_first[max(0, min(residual, len(self.plain)) - self.group) :]
        nearest = sorted(mergeable, key=lambda token: token[1])
        if len(self.packed) < self.packed_capacity:
            leaving = sorted(nearest[: self.group])
            self.packed += leaving
        elif self.packed or self.plain:
            victim = choose([*self.packed, *self.plain])
            if victim >= len(self.packed):
                leaving = [self.plain[victim - len(self.packed)]]
            else:
                leaving = nearest[:1]
                self.packed[victim] = leaving[0]
        else:
            return
        keep = len(self.plain) - len(leaving)
        late = [token for token in self.plain[keep:] if token not in leaving]
        for i in range(keep):
            if self.plain[i] in leaving:
                self.plain[i] = late.pop(0)
        self.plain = self.plain[:keep]


def tokens_apart(count, dim, dtype, widest):
    """``count`` pairs of vectors with angles far apart, in a random order.

    The angles are widest (i + 0.5) / count. A type with unit roundoff r turns a vector by r at most: 100 pairs up to
    0.9 π keep their order in bfloat16 (2^-8, two vectors in each of two pairs: 0.0157 < 0.9 π / 100).

    Returns:
        a, b (count, dim), angles (count), and a function that gives a / |a| turned towards b by angles.
    """
    angles = (torch.randperm(count) + 0.5).double() / count * widest
    u, other = torch.randn(2, count, dim, dtype=torch.double)
    u /= u.norm(dim=-1, keepdim=True)
    other -= (other * u).sum(-1, keepdim=True) * u
    other /= other.norm(dim=-1, keepdim=True)

    def turned(angle):
        return u * angle.cos()[:, None] + other * angle.sin()[:, None]

    sizes = torch.rand(2, count, 1, dtype=torch.double) + 0.5
    return (u * sizes[0]).to(dtype), (turned(angles) * sizes[1]).to(dtype), angles, turned


@each_device
@each_codec
@pytest.mark.parametrize("order", [0, 1], ids=["oldest", "score"])
@pytest.mark.parametrize("age", [False, True], ids=["", "age"])
def test_equals_lists(device, codec, order, age):
    group, residual = (1, random.choice([1, 3])) if CODECS[codec] < 2 else (8, random.choice([8, 13, 16]))
    capacities = [[random.choice([0, 1, 7, 30, 45]) for _ in range(2)]]
    store = empty_store(
        capacities, 8, CODECS[codec], group, residual + 4, torch.float32, factors=True, device=device
    )
    stores = (store, upper_of(store))
    expected = [Pair(n[1], n[3], group) for n in store.segments[0].tolist()]
    first, recent = random.choice([(0, 0), (4, 0), (0, 5), (4, 8), (0, HALF)])
    t = random.choice([0.5, 0.6])
    count = 100
    a, b, angles, turned = tokens_apart(2 * count, 8, torch.float32, math.pi / 2)
    lower, upper, merged = (
        x.view(count, 2, 8).transpose(0, 1).contiguous().float() for x in (a, b, turned(angles * t))
    )
    angles = angles.view(count, 2).T
    for position in range(count):
        at = torch.tensor([[position]], dtype=torch.int32, device=device)
        scores = (torch.rand(2, 1, 2, device=device) * 8).round() / 8
        ops_kv.kv_merge_evict(
            *stores, at, order=order, first=first, recent=recent, age=age, residual=residual, t=t
        )
        keys = [x[:, position][None].to(device) for x in (lower, upper)]
        append(*stores, keys, [-key for key in keys], at, scores)
        for head, pair in enumerate(expected):

            def choose(tokens, position=position, pair=pair):
                tokens = [(p, p if order == 0 else sum(score)) for p, _, score in tokens]
                protected = pair.half if recent == HALF else recent
                return choose_by_score(tokens, position, first, protected, age and order == 1)

            pair.make_room(residual, choose)
            if pair.plain_capacity:
                pair.plain.append(
                    (position, angles[head, position].item(), tuple(scores[:, 0, head].tolist()))
                )
    for layer, (store, exact) in enumerate(zip(stores, (lower, upper), strict=True)):
        here = store.to("cpu")
        keys, values, positions = (x.cpu() for x in ops_kv.kv_quant_unpack(store, 50))
        for head, pair in enumerate(expected):
            assert here.lengths[0, head].tolist() == [len(pair.packed), len(pair.plain)]
            tokens = [*pair.packed, *pair.plain]
            assert positions[0, head, : len(tokens)].tolist() == [p for p, *_ in tokens]
            slots = torch.cat(here.filled(0, head))
            assert here.scores[0, slots].tolist() == [score[layer] for *_, score in tokens]
            for i, (position, *_) in enumerate(tokens):
                vector = exact[head, position]
                if i >= len(pair.packed):
                    assert torch.equal(keys[0, head, i], vector) and torch.equal(values[0, head, i], -vector)
                    continue
                # In roundings: unit vectors 7 each, the angle 40 of its own, which up to a right angle move a
                # weight by half as much, weights 4 more each: 7 + 7 + 2 (20 + 4) and the sums, rounded up.
                norm, direction = vector.double().norm(), merged[head, position]
                bound = 128 * UNIT_ROUNDOFF
                if CODECS[codec]:  # values are always rounded over their own groups
                    bound += most_rounding(CODECS[codec], direction)
                assert (values[0, head, i] + norm * direction).abs().max() <= norm * bound
                if CODECS[codec] < 2:
                    assert (keys[0, head, i] - norm * direction).abs().max() <= norm * bound
                factors = here.factors[0, here.filled(0, head)[0][i]]
                assert ((factors - norm).abs() <= 8 * UNIT_ROUNDOFF * norm).all()


@each_device
@each_codec
@each_dtype
def test_the_most_distant_tokens_stay_plain(device, codec, dtype):
    """Whenever a group was packed: of all tokens but the newest residual - G, exactly the farthest ones are plain."""
    skip_double_on(device, dtype)
    group = 1 if CODECS[codec] < 2 else 8
    residual = group * random.choice([1, 2]) + random.choice([0, 2])
    retained, count = random.choice([0, 1, 6]), 80
    lower = empty_store(
        [[96]], 64, CODECS[codec], group, residual + retained, dtype, factors=True, device=device
    )
    upper = upper_of(lower)
    a, b, angles, _ = tokens_apart(count, 64, dtype, 0.9 * math.pi)
    plain_capacity, packed_before = int(lower.segments[0, 0, 3]), 0
    for position in range(count):
        at = torch.tensor([[position]], dtype=torch.int32, device=device)
        ops_kv.kv_merge_evict(lower, upper, at, residual=residual)
        packed = int(lower.lengths[0, 0, 0])
        if packed > packed_before:
            packed_before = packed
            plain = lower.to("cpu").filled(0, 0)[1]
            have = set(lower.positions.cpu()[0, plain].tolist())
            newest = set(range(position - (residual - group), position))
            farthest = angles[: position - (residual - group)].argsort(descending=True)
            assert have == newest | set(farthest[: plain_capacity - residual].tolist())
        keys = [x[position].view(1, 1, 64).to(device) for x in (a, b)]
        append(lower, upper, keys, keys, at)
    assert packed_before > 0


@each_device
def test_a_key_that_is_no_number_stays_plain(device):
    lower = empty_store([[12]], 8, 0, 1, 4, torch.float32, factors=True, device=device)
    upper = upper_of(lower)
    for position in range(12):
        at = torch.tensor([[position]], dtype=torch.int32, device=device)
        ops_kv.kv_merge_evict(lower, upper, at, residual=1)
        key = torch.randn(1, 1, 8, device=device)
        if position in (1, 3):
            key[0, 0, random.randrange(8)] = math.nan
        append(lower, upper, (key, torch.randn_like(key)), (key, key), at)
    keys, _, positions = ops_kv.kv_quant_unpack(upper, 12)
    assert keys.isfinite().all()
    plain = lower.to("cpu").filled(0, 0)[1]
    assert {1, 3} <= set(lower.positions.cpu()[0, plain].tolist())
    assert sorted(positions.flatten().tolist()) == list(range(12))


@each_device
def test_nothing_happens_without_a_position(device):
    lower = empty_store([[4, 4], [12, 12]], 8, 0, 1, 4, torch.float32, factors=True, device=device)
    upper = upper_of(lower)
    for position in range(4):
        at = torch.full((2, 1), position, dtype=torch.int32, device=device)
        keys = torch.randn(2, 2, 2, 8, device=device)
        append(lower, upper, keys, keys, at)
    before = lower.to("cpu"), upper.to("cpu")
    nowhere = torch.full((2, 2), -1, dtype=torch.int32, device=device)
    ops_kv.kv_merge_evict(lower, upper, nowhere)
    assert_same(lower, before[0])
    assert_same(upper, before[1])


@each_device
def test_a_store_without_slots(device):
    lower = empty_store([[0]], 8, CODECS["int4"], 8, 8, torch.float32, factors=True, device=device)
    upper = upper_of(lower)
    at = torch.zeros(1, 1, dtype=torch.int32, device=device)
    ops_kv.kv_merge_evict(lower, upper, at, order=1)
    assert lower.lengths.tolist() == upper.lengths.tolist() == [[[0, 0]]]


@each_device
def test_shared_heads_lose_the_lowest_sum_of_both_layers(device):
    heads, count = 3, 20
    lower = empty_store([[count] * heads], 4, 0, 1, count, torch.float32, factors=True, device=device)
    upper = upper_of(lower)
    scores = torch.rand(count, 2, 1, heads, device=device)
    x = torch.zeros(2, 1, heads, 4, device=device)
    for position in range(count):
        at = torch.tensor([[position]], dtype=torch.int32, device=device)
        append(lower, upper, x, x, at, scores[position])
    at = torch.tensor([[count]], dtype=torch.int32, device=device)
    ops_kv.kv_merge_evict(lower, upper, at, order=1, first=2, recent=3, shared=True)
    total = torch.zeros(count)
    for head in range(heads):
        total += scores[:, 0, 0, head].cpu() + scores[:, 1, 0, head].cpu()
    total[:2] = total[count - 2 :] = math.inf  # recent = 3 counts the token to come
    left = list(range(count))
    left[total.argmin()] = count - 1
    for store in (lower, upper):
        assert store.lengths.tolist() == [[[0, count - 1]] * heads]
        positions = ops_kv.kv_quant_unpack(store, count - 1)[2]
        assert positions.tolist() == [[left[: count - 1]] * heads]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_a_captured_step_is_the_same(shared):
    """Which case a segment is in is decided on the device: one graph serves every step."""
    group, residual = 8, 8
    stores = []
    for _ in range(2):
        lower = empty_store(
            [[30, 30]], 64, CODECS["int4"], group, 12, torch.float16, factors=True, device="cuda"
        )
        stores.append((lower, upper_of(lower)))
    x = torch.zeros(4, 1, 2, 64, dtype=torch.float16, device="cuda")
    at = torch.full((1, 1), -1, dtype=torch.int32, device="cuda")

    def step(lower, upper):
        ops_kv.kv_merge_evict(lower, upper, at, recent=HALF, shared=shared, residual=residual)
        append(lower, upper, (x[0], x[1]), (x[2], x[3]), at)

    step(*stores[0])  # nothing happens at -1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*stores[0])
    for position in range(60):
        x.copy_(torch.randn_like(x))
        at.fill_(position)
        graph.replay()
        step(*stores[1])
        for captured, plain in zip(*stores, strict=True):
            assert_same(captured, plain)
