# SPDX-License-Identifier: Apache-2.0
"""MiniCache's merge: against reference_kv in float64, and against the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch

from kvopt import ops_kv, reference_kv
from ops.kv_stores import DIMS
from ops.test_kv_quant import each_device, each_dtype, skip_double_on

BOUNDS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float64: 1e-14}


def awkward_pairs(dim, dtype):
    """Random vectors, then parallel, nearly parallel, opposite and zero ones."""
    a, b = torch.randn(2, 3, 17, dim), torch.randn(2, 3, 17, dim)
    b[:, :, 1] = 2 * a[:, :, 1]
    b[:, :, 2] = a[:, :, 2] * (1 + 1e-4 * torch.randn(dim))
    a[:, :, 3] = 0
    b[:, :, 4] = 0
    a[:, :, 5] = b[:, :, 5] = 0
    return a.to(dtype), b.to(dtype)


@each_device
@each_dtype
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("t", [0.0, 0.5, 0.6, 1.0])
def test_equals_reference(device, dtype, dim, t):
    skip_double_on(device, dtype)
    a, b = awkward_pairs(dim, dtype)
    got = ops_kv.kv_merge_pair(a.to(device), b.to(device), t)
    expected = reference_kv.kv_merge_pair(a, b, t, compute=torch.float64)
    assert got[0].dtype == dtype
    assert (got[0].cpu().double() - expected[0]).abs().max() < BOUNDS[dtype] + (1e-4 if dim == 4 else 0)
    for x, y in zip(got[1:], expected[1:], strict=True):
        assert x.dtype == torch.float32
        assert torch.allclose(x.cpu().double(), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_reference_is_the_papers_formula(t):
    a, b = torch.randn(1, 1, 50, 64).double(), torch.randn(1, 1, 50, 64).double()
    direction, norm_a, norm_b, distance = reference_kv.kv_merge_pair(a, b, t, compute=torch.float64)
    u, v = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    angle = torch.arccos((u * v).sum(-1, keepdim=True))
    expected = (torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v) / torch.sin(angle)
    assert torch.allclose(direction, expected, atol=1e-12)
    assert torch.allclose(direction.norm(dim=-1), torch.ones(1, 1, 50).double())
    assert torch.allclose(distance, angle[..., 0] / math.pi)
    assert torch.allclose(norm_a, a.norm(dim=-1)) and torch.allclose(norm_b, b.norm(dim=-1))


@each_device
def test_opposite_vectors(device):
    """Half way between them lies no direction: the first's is taken; else the nearer one's."""
    a = torch.randn(1, 1, 3, 64, device=device)
    u = a / a.norm(dim=-1, keepdim=True)
    for t, expected in ((0.5, u), (0.6, -u), (0.2, u)):
        direction, _, _, distance = ops_kv.kv_merge_pair(a, -2 * a, t)
        assert torch.allclose(direction, expected, atol=1e-3)
        assert torch.allclose(distance, torch.ones_like(distance), atol=1e-4)


@each_device
def test_zero_vectors(device):
    a = torch.randn(1, 1, 1, 64, device=device)
    zero = torch.zeros_like(a)
    unit = a / a.norm()
    for pair, expected in (((a, zero), unit), ((zero, a), unit), ((zero, zero), zero)):
        direction, *_, distance = ops_kv.kv_merge_pair(*pair, 0.6)
        assert torch.allclose(direction, expected) and distance.item() == 0
