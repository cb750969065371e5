# SPDX-License-Identifier: Apache-2.0
"""Sharing a budget out over layers and heads: exact sums, bounds, and AdaKV's and PyramidKV's own rules."""

from __future__ import annotations

import random

import pytest
import torch

from cache.tiny_models import left_padded, random_ids, run_forced, tiny_llama
from kvopt.cache import Allocator, Cache
from kvopt.cache.allocators import largest_remainder, pyramid


@pytest.mark.parametrize("trial", range(50))
def test_pyramid_sums_exactly_and_keeps_its_bounds(trial: int) -> None:
    layers, minimum = random.randint(1, 80), random.randint(1, 40)
    budget = minimum + random.randint(0, 600)
    prompt = random.randint(1, 8000)
    shares = pyramid(budget, layers, prompt, minimum)
    assert sum(shares) == budget * layers and len(shares) == layers
    assert min(shares) >= minimum and shares == sorted(shares, reverse=True)
    if prompt > budget:
        assert max(shares) <= max(prompt, budget)


def test_pyramid_to_the_letter() -> None:
    """arXiv:2406.02069, section 3.2: beta 20, window 32; by hand."""
    shares = pyramid(132, 5, 10_000, 32)  # 100 behind the window: 195 … 5 in steps of 47.5
    assert shares == [227, 180, 132, 84, 37] or shares == [227, 179, 132, 85, 37]
    assert pyramid(132, 5, 132, 32) == [132] * 5
    assert pyramid(132, 5, 199, 32) == [132] * 5  # less than twice the mean behind the window
    clipped = pyramid(132, 5, 210, 32)  # 178 at most in the first, 22 in the last
    assert clipped[0] == 210 and clipped[-1] == 54 and sum(clipped) == 660


def test_largest_remainder() -> None:
    assert largest_remainder([0.5, 0.25, 0.25], 1) == [1, 0, 0]
    assert largest_remainder([1.2, 1.7, 1.1], 4) == [1, 2, 1]


def ada_by_hand(priority: torch.Tensor, budget: int, floor: int) -> list[int]:
    """Takes tokens one by one: each head's own best first, then the best of all."""
    heads, n = priority.shape
    taken: set[tuple[int, int]] = set()
    for h in range(heads):
        taken |= {(h, int(j)) for j in priority[h].argsort(descending=True)[:floor]}
    rest = sorted(
        ((float(priority[h, j]), h, j) for h in range(heads) for j in range(n) if (h, j) not in taken),
        reverse=True,
    )
    taken |= {(h, j) for _, h, j in rest[: heads * budget - len(taken)]}
    return [sum(1 for h, _ in taken if h == head) for head in range(heads)]


@pytest.mark.parametrize("trial", range(20))
def test_ada_takes_the_best_of_all_heads_above_a_floor(trial: int) -> None:
    heads, n, budget = random.randint(1, 6), random.randint(20, 60), random.randint(2, 15)
    priority = torch.rand(2, heads, n) ** torch.tensor([1.0, 4.0, 0.3, 9.0, 2.0, 1.0])[:heads, None]
    present = torch.ones(2, 1, n, dtype=torch.bool)
    present[1, :, : n - budget] = False  # the second row's candidates all fit
    got = Allocator(ada=True).per_head(priority, present, torch.tensor([budget, budget]), 1)
    assert got[1].tolist() == [budget] * heads
    assert got[0].tolist() == ada_by_hand(priority[0], budget, max(1, int(0.2 * budget)))
    assert int(got[0].sum()) == heads * budget


@pytest.mark.parametrize("spec", ["h2o_b24+ada", "snapkv_b40+ada", "pyramidkv_b40+ada", "pyramidkv_p40"])
@pytest.mark.parametrize("prefill", ["full", 32])
def test_capacities_add_up_in_the_cache(spec: str, prefill: str | int) -> None:
    differ = False
    for _ in range(5):  # in one random model of some hundred, heads happen to get equal shares everywhere
        model = tiny_llama()
        ids, mask = left_padded([random_ids(1, 120), random_ids(1, 90)])
        cache = Cache(model, spec, prefill)
        run_forced(model, cache, ids, random_ids(2, 20), mask)
        budgets = [48, 36] if spec.endswith("p40") else [24 if "b24" in spec else 40] * 2
        assert cache.lengths().sum((0, 2)).tolist() == [4 * budget for budget in budgets]
        lengths = cache.lengths()
        if "pyramid" in spec:
            assert (lengths[0].sum(-1) > lengths[1].sum(-1)).all()
        differ = not torch.equal(lengths[..., 0], lengths[..., 1])
        if differ or "ada" not in spec:
            break
    assert differ == ("ada" in spec)


def test_a_row_alone_gets_the_shares_it_gets_in_a_batch() -> None:
    model = tiny_llama(dtype=torch.float64)
    prompts = [random_ids(1, length) for length in (120, 77, 41)]
    ids, mask = left_padded(prompts)
    together = Cache(model, "pyramidkv_b40+ada")
    run_forced(model, together, ids, ids[:, :0], mask)
    for row, prompt in enumerate(prompts):
        alone = Cache(model, "pyramidkv_b40+ada")
        run_forced(model, alone, prompt, prompt[:, :0])
        assert torch.equal(alone.lengths()[:, 0], together.lengths()[:, row])
