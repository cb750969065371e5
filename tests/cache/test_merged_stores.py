# SPDX-License-Identifier: Apache-2.0
"""minicache: what the stores of a pair give back, of vectors handed in directly."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICES
from kvopt import ops_kv
from kvopt.cache import CacheSpec
from kvopt.cache.candidates import Candidates
from kvopt.cache.pair import pack_merged
from kvopt.cache.store import Shape, Store


def merged_stores(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], spec: str, device: str
) -> tuple[Store, Store]:
    """The stores of two layers that hold keys and values (B, H, n, D)."""
    parsed = CacheSpec.parse(spec)
    rows, heads, n, dim = a[0].shape
    shape = Shape(rows, heads, dim, a[0].dtype, parsed.codec, False, parsed.merge)
    capacities = torch.full((rows, heads), n)
    lower = Store.allocate(shape, capacities, torch.device(device))
    upper = Store.allocate(shape, capacities, torch.device(device), lower)
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(rows, 1, n)
    for store in (lower, upper):  # what is not written may hold anything
        store.factors.fill_(torch.nan)
        store.plain_keys.fill_(torch.nan)
    pack_merged(
        (lower, upper),
        (Candidates(*a, positions), Candidates(*b, positions)),
        torch.arange(n, dtype=torch.int32, device=device).expand(rows, 1, n),
        torch.full((rows, heads), n, dtype=torch.int32, device=device),
    )
    return lower, upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_equal_layers_lose_nothing_but_rounding(dtype: torch.dtype, device: str) -> None:
    """A direction is rounded twice (as kv_merge_pair's result, in fp32 before) and multiplied by a norm in fp32."""
    vectors = [(torch.randn(2, 3, 50, 16, device=device) * 3).to(dtype) for _ in range(2)]
    lower, upper = merged_stores(
        (vectors[0], vectors[1]), (vectors[0], vectors[1]), "full+minicache_k0", device
    )
    assert int(lower.lengths[..., 0].min()) == 49
    for store in (lower, upper):
        keys, values, *_ = store.read(50)
        for got, expected in zip((keys, values), vectors, strict=True):
            unit = torch.finfo(dtype).eps / 2
            size = expected.double().norm(dim=-1, keepdim=True)
            # of the direction, of the result, and a few roundings of fp32
            bound = expected.double().abs() * (2 * unit + unit**2) + size * (
                20 * 2.0**-24 + torch.finfo(dtype).tiny
            )
            assert bool(((got.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("t", [0, 30, 60, 100])
@pytest.mark.parametrize("device", DEVICES)
def test_restored_vectors_keep_their_length_and_turn_by_their_share(t: int, device: str) -> None:
    """|x̂| = |x|, and the angle to x is t of the pair's in the lower layer, 1 - t in the upper."""
    a, b = ([torch.randn(2, 3, 64, 32, device=device) for _ in range(2)] for _ in range(2))
    stores = merged_stores(tuple(a), tuple(b), f"full+minicache_k0_t{t}", device)
    for kind in range(2):
        whole = between(a[kind], b[kind])
        for store, original, share in zip(stores, (a[kind], b[kind]), (t / 100, 1 - t / 100), strict=True):
            got = store.read(64)[kind]
            # A direction of 32 numbers rounded to fp32 is off by at most 2^-24 of its length, as are the norm and the
            # product; kv_merge_pair's own fp32 sums of 32 terms add some 32 more.
            size = original.double().norm(dim=-1)
            assert bool(((got.double().norm(dim=-1) - size).abs() <= size * 64 * 2.0**-24).all())
            assert float((between(got, original) - share * whole)[..., :63].abs().max()) < 64 * 2.0**-24 * 8
            assert torch.equal(got[:, :, 63], original[:, :, 63]), "the newest is not merged"


def between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles, in fp64 without loss near 0."""
    u, v = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (a, b))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


@pytest.mark.parametrize("device", DEVICES)
def test_the_most_distant_keys_stay(device: str) -> None:
    a, b = ([torch.randn(2, 2, 100, 16, device=device) for _ in range(2)] for _ in range(2))
    lower, upper = merged_stores(tuple(a), tuple(b), "full+minicache_k10", device)
    distance = ops_kv.kv_merge_pair(a[0], b[0], 0.6)[3][..., :-1]
    expected = distance.topk(10, dim=-1).indices.sort().values
    for store, layer in ((lower, a), (upper, b)):
        keys, values, positions, order = store.read(100)
        assert torch.equal(positions[0, 0], torch.arange(100, device=device).int())
        plain = (order >= store.lengths[..., :1]).nonzero()[:, 2].view(2, 2, 11)
        assert torch.equal(plain[..., :-1], expected) and (plain[..., -1] == 99).all()
        at = plain[..., None].expand(-1, -1, -1, 16)
        assert torch.equal(keys.gather(2, at), layer[0].gather(2, at))
        assert torch.equal(values.gather(2, at), layer[1].gather(2, at))
