# SPDX-License-Identifier: Apache-2.0
"""From priorities to tokens: which of the candidates stay, and which one makes room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvopt.cache.policies import HALF, DecodeRule, Policy, Tokens

_NEVER = torch.iinfo(torch.int32).max


def priorities(policy: Policy, tokens: Tokens) -> Tensor:
    """What ``policy`` says of ``tokens``, (B, G, n): checked, summed over heads if they share; NaN counts as infinity.

    Raises:
        ValueError: a shape that does not fit; the message names the policy.
    """
    priority = policy.priority(tokens)
    expected = tokens.positions.shape
    if policy.shared_heads and tokens.keys is not None:
        expected = torch.Size([*tokens.keys.shape[:3]])
        if priority.shape == expected:
            priority, expected = priority.sum(dim=1, keepdim=True), tokens.positions.shape
    if priority.shape != expected:
        raise ValueError(
            f"cache policy {policy.name!r}: priority() returned shape {tuple(priority.shape)}, "
            f"expected {tuple(expected)} (batch, heads, tokens)"
        )
    return priority.nan_to_num(nan=torch.inf) if priority.is_floating_point() else priority


def together(found: Sequence[Tensor]) -> Tensor:
    """The sum of several layers' priorities, (B, G, n); NaN counts as infinity."""
    total = found[0]
    for priority in found[1:]:
        whole = not (total.is_floating_point() or priority.is_floating_point())
        total = total.long() + priority if whole else (total + priority).nan_to_num(nan=torch.inf)
    return total


def best(priority: Tensor, present: Tensor, counts: Tensor, most: int) -> Tensor:
    """The candidates of highest priority, of equal ones the later.

    Args:
        priority: (B, G, n).
        present: (B, G, n) bool, which candidates there are.
        counts: (B, G) integers, how many to take; no more than there are.
        most: at least as many as any of ``counts``.

    Returns:
        (B, G, m) int32 indices in increasing order; n behind the first ``counts``.
    """
    n = priority.shape[-1]
    most = min(most, n)
    absent = float("-inf") if priority.is_floating_point() else torch.iinfo(priority.dtype).min
    order = priority.masked_fill(~present, absent).argsort(dim=-1, stable=True)
    # A candidate that is there and has the lowest priority of all must still come before those that are not.
    order = order.gather(-1, present.gather(-1, order).int().argsort(dim=-1, stable=True))
    order = order[..., n - most :]
    rank = torch.arange(most, device=priority.device)
    chosen = order.masked_fill(rank < most - counts[..., None], n)
    return chosen.sort(dim=-1).values.int()


def everything(present: Tensor, most: int) -> Tensor:
    """All candidates that are there, as :func:`best` gives them."""
    n = present.shape[-1]
    places = torch.arange(n, dtype=torch.int32, device=present.device)
    return torch.where(present, places, n).sort(dim=-1).values[..., :most]


def lowest(priority: Tensor, positions: Tensor) -> Tensor:
    """Who makes room: (B, G) int32, the index of the lowest priority, of equal ones the oldest.

    Args:
        priority: (B, G, n).
        positions: (B, G, n) int32, -1 where there is no token.
    """
    most = float("inf") if priority.is_floating_point() else torch.iinfo(priority.dtype).max
    present = positions >= 0
    priority = priority.masked_fill(~present, most)
    candidates = present & (priority == priority.amin(dim=-1, keepdim=True))
    return positions.masked_fill(~candidates, _NEVER).argmin(dim=-1).int()


def lowest_by_rule(
    rule: DecodeRule, positions: Tensor, scores: Tensor | None, newest: Tensor, capacity: Tensor
) -> Tensor:
    """What ``kv_evict_append`` would choose by ``rule`` if its recent part could differ between rows and heads.

    Args:
        rule: its ``recent`` may be ``HALF``.
        positions: (B, H, n) int32, -1 where there is no token.
        scores: (B, H, n) float32, for order 1.
        newest: (B,) int32, position of the arriving token.
        capacity: (B, H) int32.

    Returns:
        (B, H) int32 indices, (B, 1) if the heads share.
    """
    age = newest[:, None, None] - positions
    priority = positions if rule.order == 0 or scores is None else scores.nan_to_num(nan=torch.inf)
    if rule.shared:
        priority, positions, age = priority.sum(1, keepdim=True), positions[:, :1], age[:, :1]
        capacity = capacity[:, :1]
    if rule.age and rule.order:
        priority = priority / age.clamp(min=1)
    recent = (capacity - capacity // 2)[..., None] if rule.recent == HALF else rule.recent
    behind = positions >= rule.first
    free = behind & (age >= recent)
    free = torch.where(free.any(-1, keepdim=True), free, behind)
    free = torch.where(free.any(-1, keepdim=True), free, positions >= 0)
    return lowest(priority, positions.masked_fill(~free, -1))
