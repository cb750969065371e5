# SPDX-License-Identifier: Apache-2.0
"""Prefill scores: against reference_kv in float64, and against loops."""

from __future__ import annotations

import math
import random

import pytest
import torch

from conftest import DEVICES
from kvopt import ops_kv, reference_kv
from ops.kv_stores import DIMS, QUERY_GROUPS
from ops.test_kv_quant import each_device, each_dtype, skip_double_on

each_maximum = pytest.mark.parametrize("maximum", [False, True], ids=["sum", "maximum"])


def random_case(rows, heads, group, queries, keys, dim, dtype, device):
    """Left padding, keys that are not there and hold NaN, positions with gaps, per head in some cases."""
    query = torch.randn(rows, heads * group, queries, dim).to(dtype)
    key = torch.randn(rows, heads, keys, dim).to(dtype)
    own = random.choice([1, heads])
    at = torch.stack([torch.randperm(keys + 9)[:keys].sort().values for _ in range(rows * own)])
    at = at.view(rows, own, keys).int()
    if random.random() < 0.3 and keys:
        at = at[:, :, torch.randperm(keys)].contiguous()
    query_at = (torch.arange(queries) + keys + 9 - queries).clamp(min=-1).expand(rows, -1).clone().int()
    if keys > 3:
        at[0, :, :2] = -1
        key[0, :, :2] = math.nan
    if queries > 3:
        query_at[-1, :2] = -1
        query[-1, :, :2] = math.nan
    return tuple(x.to(device) for x in (query, key, query_at, at))


@each_device
@each_dtype
@each_maximum
def test_equals_reference(device, dtype, maximum):
    skip_double_on(device, dtype)
    for _ in range(6):
        rows, heads = random.randint(1, 3), random.choice([1, 2, 5])
        keys = random.choice([0, 1, 5, 70, 513])
        queries = random.choice([0, 1, 7, 32, keys, keys + 3])
        group, dim = random.choice(QUERY_GROUPS), random.choice(DIMS)
        case = random_case(rows, heads, group, queries, keys, dim, dtype, device)
        got = ops_kv.kv_select_scores(*case, dim**-0.5, maximum)
        expected = reference_kv.kv_select_scores(
            *(x.cpu() for x in case), dim**-0.5, maximum, compute=torch.float64
        )
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert torch.allclose(
            got.cpu().double(), expected, rtol=3e-5, atol=1e-5 * max(1, queries * group) / max(1, keys)
        )


@each_maximum
def test_reference_equals_loops(maximum):
    rows, heads, group, queries, keys, dim = 2, 2, 2, 5, 7, 4
    query, key, query_at, at = random_case(rows, heads, group, queries, keys, dim, torch.float64, "cpu")
    got = reference_kv.kv_select_scores(query, key, query_at, at, 0.7, maximum)
    for row in range(rows):
        for head in range(heads):
            expected = [0.0] * keys
            for g in range(group):
                for i in range(queries):
                    newest = int(query_at[row, i])
                    own = at[row, head if at.shape[1] > 1 else 0].tolist()
                    seen = [j for j in range(keys) if 0 <= own[j] <= newest]
                    q = query[row, head * group + g, i]
                    weight = [math.exp(0.7 * float(q @ key[row, head, j])) for j in seen]
                    for j, w in zip(seen, weight, strict=True):
                        share = w / sum(weight)
                        expected[j] = max(expected[j], share) if maximum else expected[j] + share
            assert got[row, head].tolist() == pytest.approx(expected, rel=1e-5)


@each_device
def test_scores_sum_to_queries_times_heads(device):
    query, key, query_at, at = random_case(1, 2, 4, 300, 300, 64, torch.float32, device)
    query_at, at = (torch.arange(300, dtype=torch.int32, device=device) for _ in range(2))
    scores = ops_kv.kv_select_scores(
        query.nan_to_num(), key.nan_to_num(), query_at[None], at[None, None], 0.125, False
    )
    assert scores.sum(-1).flatten().tolist() == pytest.approx([1200.0, 1200.0], rel=1e-5)


@each_device
@each_maximum
def test_same_bits_in_every_run(device, maximum):
    case = random_case(2, 2, 4, 100, 300, 64, torch.float32, device)
    first = ops_kv.kv_select_scores(*case, 0.125, maximum)
    for _ in range(3):
        assert torch.equal(ops_kv.kv_select_scores(*case, 0.125, maximum), first)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_the_prompt_do_not_matter(device):
    """A prompt's keys may require gradients; scores never do."""
    query, key, query_at, at = random_case(1, 2, 2, 9, 9, 8, torch.float32, device)
    got = ops_kv.kv_select_scores(query.requires_grad_(), key.requires_grad_(), query_at, at, 0.3, False)
    assert not got.requires_grad
