# SPDX-License-Identifier: Apache-2.0
"""A layer's memory: segments of exactly the capacities, growth, rows, and what lies where afterwards."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops_kv
from kvopt.cache.codecs import Codec
from kvopt.cache.store import Shape, Store, largest_parts, lay_out

CODECS = [
    Codec(),
    Codec("fp8"),
    Codec("fp8", 1, 8),
    Codec("int8", 4, 8),
    Codec("int4", 8, 16),
    Codec("int2", 16, 16),
]


def filled(codec: Codec, capacities: torch.Tensor, device: str = "cpu") -> tuple[Store, torch.Tensor]:
    """A store with as many random tokens as fit, at shuffled positions, and the counts."""
    rows, heads = capacities.shape
    n = int(capacities.max()) + 3
    shape = Shape(rows, heads, 16, torch.float32, codec, scored=True)
    store = Store.allocate(shape, capacities, torch.device(device))
    for name in ("positions", "plain_keys", "plain_values"):  # what is not filled may hold anything
        tensor = getattr(store, name)
        tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
    keys, values = (torch.randn(rows, heads, n, 16, device=device) for _ in range(2))
    counts = torch.stack([torch.randint(0, int(c) + 1, ()) for c in capacities.flatten()]).view(rows, heads)
    chosen = torch.stack([torch.randperm(n).sort().values for _ in range(rows * heads)])
    ops_kv.kv_quant_pack(
        store,
        keys,
        values,
        (torch.arange(n, device=device) * 3).int().expand(rows, 1, n).contiguous(),
        torch.rand(rows, heads, n, device=device),
        chosen.view(rows, heads, n).int().to(device),
        counts.int().to(device),
    )
    return store, counts


def content(store: Store, n: int) -> list[torch.Tensor]:
    keys, values, positions, order = store.read(n)
    return [keys, values, positions, store.gather(store.scores, n, 0.0).gather(2, order)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_layout_is_exact_and_gapless(codec: Codec) -> None:
    capacities = torch.randint(0, 90, (3, 4))
    segments, packed, plain = lay_out(capacities, codec)
    assert torch.equal(segments[..., 1] + segments[..., 3], capacities.int())
    assert packed == int(segments[..., 1].sum(1).max()) and plain == int(segments[..., 3].sum(1).max())
    for row in segments.tolist():
        for part in (0, 2):
            end = 0
            for head in row:
                assert head[part] == end
                end += head[part + 1]
    for capacity, (_, p, _, r) in zip(
        capacities.flatten().tolist(), segments.flatten(0, 1).tolist(), strict=True
    ):
        assert (p, r) == codec.split(capacity)
        if p:
            assert p % codec.group == 0 and codec.residual <= r < codec.residual + codec.group
    uneven = largest_parts([int(capacities.sum(1).max()) // 4 + 1] * 3, 4, codec, uneven=True)
    shape = Shape(3, 4, 16, torch.float32, codec, scored=True)
    assert shape.nbytes(packed, plain) <= shape.nbytes(*uneven)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_growing_keeps_every_token_where_it_can_be_read(codec: Codec, device: str) -> None:
    base = codec.round_up(random.randint(1, 300))
    store, counts = filled(codec, torch.full((2, 3), base), device)
    before = content(store, base + 5)
    size = sum(tensor.nbytes for tensor in store.tensors().values())
    grown = store.grow(2)
    assert torch.equal(grown.capacities().cpu(), torch.full((2, 3), base + 2 * codec.block).int())
    for a, b in zip(content(grown, base + 5), before, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(grown.lengths.sum(-1).cpu(), counts)
    assert sum(tensor.nbytes for tensor in store.tensors().values()) == size
    assert grown.shape.nbytes(grown.packed_slots, grown.plain_keys.shape[1]) == sum(
        tensor.nbytes for tensor in grown.tensors().values()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_growing_store_takes_tokens_behind_the_old_ones(codec: Codec, device: str) -> None:
    base = codec.round_up(1)
    store, _ = filled(codec, torch.full((2, 2), base or codec.block), device)
    free = int((store.capacities() - store.lengths.sum(-1)).min())
    store = store.grow(1)
    before = store.lengths.sum(-1)
    old = store.read(store.widest)[2].amax().item()
    for step in range(free + codec.block):
        key = torch.randn(2, 2, 16, device=device)
        position = torch.full((2, 1), 10_000 + step, dtype=torch.int32, device=device)
        ops_kv.kv_evict_append(store, key, key, position)
    assert old < 10_000
    assert torch.equal(store.lengths.sum(-1), before + free + codec.block), "nothing may be evicted"
    newest = store.read(store.widest)[2][..., -(free + codec.block) :]
    expected = torch.arange(free + codec.block, device=device) + 10_000
    assert torch.equal(newest, expected.int().expand(2, 2, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_rows_select_and_repeat(codec: Codec, device: str) -> None:
    store, _ = filled(codec, torch.randint(codec.group, 60, (4, 3)), device)
    rows = torch.tensor([2, 0, 2, 3], device=device)
    picked = store.select_rows(rows)
    for a, b in zip(content(picked, 70), content(store, 70), strict=True):
        assert torch.equal(a, b[rows])
    key = torch.randn(4, 3, 16, device=device)
    ops_kv.kv_evict_append(picked, key, key, torch.full((4, 1), 999, dtype=torch.int32, device=device))
    assert (picked.read(70)[2].amax(-1) == 999).all() and not (store.positions == 999).any()


@pytest.mark.parametrize("codec", [Codec(), Codec("int4", 8, 16), Codec("fp8", 1, 8)], ids=str)
def test_cutting_takes_back_plain_tokens_only(codec: Codec) -> None:
    shape = Shape(1, 2, 16, torch.float32, codec, scored=False)
    store = Store.allocate(shape, torch.full((1, 2), codec.round_up(100)), torch.device("cpu"))
    tokens = torch.randn(50, 1, 2, 16)
    for t, token in enumerate(tokens):
        ops_kv.kv_evict_append(store, token, -token, torch.tensor([[t]], dtype=torch.int32))
    before = store.read(64)
    limit = torch.tensor([44], dtype=torch.int32)
    assert store.reaches(limit)
    store.cut(limit)
    after = store.read(64)
    assert torch.equal(after[2][..., -44:], before[2][..., -50:-6]) and (after[2][..., :-44] == -1).all()
    assert torch.equal(after[0][:, :, -44:], before[0][:, :, -50:-6])
    assert torch.equal(after[1][:, :, -44:], before[1][:, :, -50:-6])
    assert store.reaches(torch.tensor([1], dtype=torch.int32)) == (not codec.packs)


def test_a_segment_without_slots_and_one_token() -> None:
    store, _ = filled(Codec(), torch.tensor([[0, 1]]))
    key = torch.randn(1, 2, 16)
    ops_kv.kv_evict_append(store, key, key, torch.tensor([[500]], dtype=torch.int32))
    assert store.lengths.sum(-1).tolist() == [[0, 1]]
    assert store.read(2)[2].tolist() == [[[-1, -1], [-1, 500]]]
