# SPDX-License-Identifier: Apache-2.0
"""The count of allocated bytes is that of what was allocated, moment by moment."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import DEVICES
from kvopt.experiments.allocations import allocations


@pytest.mark.parametrize("device", DEVICES)
def test_equals_what_a_random_program_allocated(device: str) -> None:
    alive: list[torch.Tensor] = []
    held = peak = 0
    expected: list[tuple[int, int]] = []
    with allocations(device) as seen:
        for number in range(6):
            peak = held
            for _ in range(random.randrange(12)):
                if alive and random.random() < 0.45:
                    held -= alive.pop(random.randrange(len(alive))).nbytes
                else:
                    alive.append(torch.empty(random.randrange(1, 10**5), dtype=torch.uint8, device=device))
                    held += alive[-1].nbytes
                peak = max(peak, held)
            seen.mark(str(number))
            expected.append((held, peak))
    assert [(span.held, span.peak) for span in seen.spans.values()] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_sees_what_an_operator_needs_for_a_moment(device: str) -> None:
    x = torch.randn(300, 40, device=device)
    with allocations(device) as seen:
        (x.t().contiguous() + 1).sum().item()
        seen.mark("chain")
        values, order = x.sort(dim=0)
        seen.mark("sort")
        torch.nn.functional.softmax(x.half(), dim=1, dtype=torch.float32)
        seen.mark("again")
    assert seen["chain"].held == 0 and seen["chain"].peak >= 2 * x.nbytes
    assert seen["sort"].held == values.nbytes + order.nbytes
    assert seen["again"].held == seen["sort"].held
    assert seen["again"].peak >= seen["sort"].held + x.nbytes * 3 // 2


def test_older_memory_does_not_count_and_cycles_are_collected() -> None:
    old = torch.zeros(10**6)
    with allocations("cpu") as seen:
        del old
        cycle: list[object] = [torch.zeros(1000)]
        cycle.append(cycle)
        del cycle
        seen.mark("end")
    assert seen["end"].held == 0 and seen["end"].peak == 4000


def test_survives_an_error_and_can_be_used_again() -> None:
    with pytest.raises(ZeroDivisionError), allocations("cpu"):
        torch.zeros(1 // 0)
    with allocations("cpu") as seen:
        x = torch.zeros(25)
        seen.mark("end")
    assert seen["end"].held == x.nbytes
