# SPDX-License-Identifier: Apache-2.0
"""How the budget is shared out over layers and KV heads. Whatever is chosen, the sum is exact.

``uniform`` gives every head of every layer the same. ``pyramid`` gives the lower layers more: PyramidKV (Cai et al.
2024, arXiv:2406.02069, section 3.2), with largest-remainder rounding where the paper's floor overspends. ``ada`` shares
a layer's part out among its heads by what they look at: AdaKV (Feng et al. 2024, arXiv:2407.11550, section 4.2). The
last two work on different axes and go together: ``+pyramid+ada`` is the paper's Ada-Pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PYRAMID, ADA, UNIFORM = "pyramid", "ada", "uniform"
_BETA = 20  # PyramidKV's steepness: the top layer has 1/20 of the mean behind the window
_FLOOR = 0.2  # AdaKV's alpha: no head gets less than this part of its layer's mean


@dataclass(frozen=True)
class Allocator:
    """How a budget of b tokens per KV head becomes capacities; ``Allocator()`` is ``uniform``.

    Args:
        pyramid: lower layers get more.
        ada: within a layer, heads get what their tokens' priorities are worth.
    """

    pyramid: bool = False
    ada: bool = False

    @property
    def uniform(self) -> bool:
        """Every head has the budget itself."""
        return not (self.pyramid or self.ada)

    def per_layer(self, budget: int, layers: int, prompt: int, minimum: int) -> list[int]:
        """Tokens per KV head of each layer; their sum is ``budget * layers``.

        Args:
            budget: mean over layers.
            layers: L.
            prompt: tokens of the row's prompt.
            minimum: what the policy needs; at most ``budget``.
        """
        return pyramid(budget, layers, prompt, minimum) if self.pyramid else [budget] * layers

    def per_head(self, priorities: Tensor, present: Tensor, budgets: Tensor, minimum: int) -> Tensor:
        """Tokens of each KV head of one layer; the sum over heads is H times the row's budget.

        Args:
            priorities: (B, H, n), larger stays.
            present: (B, 1 or H, n) bool, which candidates there are.
            budgets: (B,) integers, mean over heads.
            minimum: what the policy needs of every head.

        Returns:
            (B, H) int64 on the CPU. A row whose candidates all fit is shared out evenly.
        """
        present = present.expand(priorities.shape)
        return torch.stack(
            [
                _per_head(priority, there, max(minimum, int(_FLOOR * budget)), budget)
                for priority, there, budget in zip(priorities, present, budgets.tolist(), strict=True)
            ]
        )

    def __str__(self) -> str:
        return "+".join(name for name, on in ((PYRAMID, self.pyramid), (ADA, self.ada)) if on) or UNIFORM


def pyramid(budget: int, layers: int, prompt: int, minimum: int) -> list[int]:
    """PyramidKV's capacities: a straight line from the first layer down to the last.

    Behind the ``minimum`` that each layer keeps (the observation window), the last gets 1/20 of the mean and the first
    the mirror of that, cut at the prompt's length, which lifts the other end. A prompt that fits, or has fewer tokens
    than twice the mean behind the window, is shared out evenly.
    """
    mean = budget - minimum
    if prompt <= budget or prompt < 2 * mean or layers == 1:
        return [budget] * layers
    lowest = mean / _BETA
    highest = 2 * mean - lowest
    if highest > prompt - minimum:
        highest = prompt - minimum
        lowest = 2 * mean - highest
    exact = [highest - layer * (highest - lowest) / (layers - 1) for layer in range(layers)]
    return [minimum + share for share in largest_remainder(exact, mean * layers)]


def largest_remainder(exact: Sequence[float], total: int) -> list[int]:
    """Integers near ``exact`` (each its floor or one more) that add up to ``total``, as the numbers themselves do."""
    floors = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def _per_head(priority: Tensor, present: Tensor, least: int, budget: int) -> Tensor:
    """One row: (H, n) to (H,). Each head's best ``least`` are in; the rest goes to the best of all heads together."""
    heads, n = priority.shape
    if int(present.sum(-1).max()) <= budget:
        return torch.full((heads,), budget, dtype=torch.int64)
    priority = priority.double().masked_fill(~present, -torch.inf)
    rank = priority.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
    # In order of: present, among the head's own best, priority. Ties go to the lower head.
    taken = torch.zeros(heads * n, dtype=torch.bool, device=priority.device)
    flat, sure = priority.flatten(), (rank < least).flatten() & present.flatten()
    order = flat.sort(descending=True, stable=True).indices
    order = order[sure[order].int().sort(descending=True, stable=True).indices]
    order = order[present.flatten()[order].int().sort(descending=True, stable=True).indices]
    taken[order[: heads * budget]] = True
    return taken.view(heads, n).sum(-1).cpu()
