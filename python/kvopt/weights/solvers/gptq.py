# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2023): column by column, each column's error made good by the columns after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvopt import ops, reference
from kvopt.weights.formats import WeightFormat
from kvopt.weights.solvers.solution import (
    SEARCH_STEPS,
    SMALLEST_RANGE,
    Solution,
    keep_better_rows,
    require_integers,
    require_statistics,
)
from kvopt.weights.solvers.statistics import Statistics, full_precision_products

BLOCK = 128  # columns that a kernel does at once
DAMPING = 0.01  # of the mean diagonal (the paper, section 4.3)
RETRIES = 4  # each with ten times the damping

Order = Literal["natural", "groups", "static"]


def solve(
    w: Tensor,
    format: WeightFormat,
    statistics: Statistics | None,
    *,
    seed: int = 0,
    order: Order = "groups",
    search: bool = True,
    damping: float = DAMPING,
    guard: bool = True,
) -> Solution:
    """Quantises a weight (N, K) by GPTQ.

    Columns whose input is always 0 become 0. Groups are runs of natural columns whatever the order, so the product
    needs no index.

    Args:
        w: the weight, floating; float64 is solved in float64, all else in float32. The factor of H is found in float64.
        format: an integer one.
        statistics: of the linear's inputs.
        seed: unused; nothing is drawn.
        order: in which columns are quantised. ``"natural"``: from the first to the last. ``"groups"``: groups by
            falling mean of diag H, and the columns of a group likewise. In both a group's scale is taken from the
            working copy when the group begins. ``"static"``: all columns by falling diag H (the authors' act-order),
            every group's scale taken from the original weight beforehand.
        search: choose each group's range by the least squared error, weighted by what a column's error costs GPTQ (its
            1 / U_ii²); else its minimum and maximum.
        damping: added to the diagonal, as a share of its mean; ten times as much where the factorisation fails, up to
            ``RETRIES`` times.
        guard: round a row to nearest where that has the smaller error on the statistics.

    Raises:
        ValueError: no statistics or unusable ones, or a format with a code book.
    """
    require_integers("gptq", format)
    statistics = require_statistics("gptq", w, statistics)
    n, k = w.shape
    group = format.group_columns(k)
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    diagonal = statistics.hessian.diagonal()
    dead = diagonal == 0
    work = w.detach().to(dtype).masked_fill(dead, 0).contiguous()
    columns = column_order(diagonal, group, order)
    factor = inverse_factor(statistics.hessian, columns, damping)
    used, u = factor.damping, factor.u.to(dtype).contiguous()
    del factor  # twice the size of u
    importance = u.diagonal().square().reciprocal() if search else None
    steps = SEARCH_STEPS if search else 0
    kind = (format.bits, group, int(format.scheme))

    groups = reference.group_count(k, group)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scale, zero = torch.empty(2, n, groups, dtype=torch.float16, device=w.device).unbind()
    if order == "static":
        weights = (
            None if importance is None else torch.empty_like(importance).index_copy_(0, columns, importance)
        )
        scale, zero = ops.wsearch(work, weights, *kind, steps, SMALLEST_RANGE)[1:]
    work = work[:, columns].contiguous()  # the working copy, in the order of processing
    with full_precision_products():
        for begin, end in blocks(k, group, static=order == "static"):
            own = columns[begin:end] // group
            known: tuple[Tensor | None, Tensor | None] = (None, None)
            if order == "static" or begin % group:  # or a group goes on
                known = (scale[:, own], zero[:, own])
            part, errors, *found = ops.gptq_block(
                *(work, u, importance, *known), *(begin, end, *kind), steps, SMALLEST_RANGE
            )
            codes[:, columns[begin:end]] = part
            if known[0] is None:
                for target, value in zip((scale, zero), found, strict=True):
                    target[:, own[::group]] = value
            work[:, end:].addmm_(errors, u[begin:end, end:], alpha=-1)
    solution = Solution(codes, scale, zero, damping=used, note=_note(dead, used, damping))
    return keep_better_rows(w.detach().float(), format, statistics, solution) if guard else solution


def _note(dead: Tensor, used: float, wanted: float) -> str:
    parts = []
    if used != wanted:
        parts.append(f"damping raised from {wanted:g} to {used:g}")
    count = int(dead.sum())
    if count:
        parts.append(f"{count} dead input columns set to 0")
    return "; ".join(parts)


def column_order(diagonal: Tensor, group: int, order: Order) -> Tensor:
    """The natural column at each place of the order of processing, (K,) int64.

    ``"groups"`` leaves a short last group where it is: groups begin at multiples of the group size in that order too.
    """
    k = diagonal.shape[0]
    if order == "natural":
        return torch.arange(k, device=diagonal.device)
    if order == "static":
        return diagonal.argsort(descending=True, stable=True)
    if order != "groups":
        raise ValueError(f"gptq: order must be natural, groups or static, got {order!r}")
    whole = k // group
    grouped = diagonal[: whole * group].view(whole, group)
    first = grouped.mean(dim=1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(whole, device=diagonal.device)[:, None] * group
    tail = diagonal[whole * group :].argsort(descending=True, stable=True) + whole * group
    return torch.cat([(inside + starts)[first].flatten(), tail])


def blocks(k: int, group: int, static: bool = False) -> list[tuple[int, int]]:
    """The columns of each block: at most ``BLOCK``, whole groups or parts of one group."""
    if static or group >= BLOCK:
        ends = [k] if static else [*range(group, k, group), k]
        size = BLOCK
    else:
        ends, size = [k], BLOCK // group * group
    result = []
    begin = 0
    for end in ends:
        result += [(at, min(at + size, end)) for at in range(begin, end, size)]
        begin = end
    return result


@dataclass(frozen=True)
class InverseFactor:
    """U, upper triangular, of the damped H in the order of processing: H⁻¹ = Uᵀ U; float64. And the damping's share."""

    u: Tensor
    damping: float


def inverse_factor(hessian: Tensor, columns: Tensor, damping: float) -> InverseFactor:
    """The factor of (H + damping * mean diag H)⁻¹, with H_ii = 1 where an input is always 0.

    One factorisation and no inverse of H: H = R Rᵀ with R upper triangular, and U = R⁻¹. Both are made in place: next
    to H there is one float64 matrix of its shape and a quarter of one.

    Args:
        hessian: (K, K).
        columns: (K,), the order of processing.
        damping: as a share of the mean of the diagonal entries that are not 0; times ten after each failure.

    Raises:
        ValueError: H is not finite, or the factorisation fails with every damping.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("gptq: the inputs' second moments contain NaN or infinity")
    diagonal = hessian.diagonal()[columns].double()
    alive = diagonal != 0
    mean = (diagonal.sum() / alive.sum().clamp(min=1)).item()
    base = torch.where(alive, diagonal, mean or 1.0)
    share = damping
    for _ in range(RETRIES + 1):
        damped = _reordered(hessian, columns)
        damped.diagonal().copy_(base + share * mean)
        if factorize_upper(damped):
            invert_upper(damped)
            return InverseFactor(damped, share)
        del damped  # before the next one
        share *= 10
    raise ValueError(
        f"gptq: the inputs' second moments can't be factorised with damping up to {share / 10:g}"
    )


def _reordered(hessian: Tensor, columns: Tensor, rows: int = 1024) -> Tensor:
    """Rows and columns of H (K, K) in another order, float64; in parts, for no third matrix of its size."""
    result = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    for target, own in zip(torch.split(result, rows), torch.split(columns, rows), strict=True):
        target.copy_(hessian[own][:, columns])
    return result


def factorize_upper(a: Tensor, size: int = 2048) -> bool:
    """A positive definite A to the upper triangular R with A = R Rᵀ, in place; whether it could be done.

    That is the Cholesky factorisation read backwards, from the last ``size`` columns to the first.
    """
    for end in range(a.shape[0], 0, -size):
        begin = max(0, end - size)
        lower, info = torch.linalg.cholesky_ex(a[begin:end, begin:end].flip(0, 1))
        if info.item() != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
            return False
        r = lower.flip(0, 1)
        a[begin:end, begin:end] = r
        a[begin:end, :begin] = 0
        above = torch.linalg.solve_triangular(r.T, a[:begin, begin:end], upper=False, left=False)
        a[:begin, begin:end] = above
        a[:begin, :begin].addmm_(above, above.T, alpha=-1)
    return True


def invert_upper(r: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves; the part below the diagonal is not touched."""
    k = r.shape[0]
    if k <= 512:
        identity = torch.eye(k, dtype=r.dtype, device=r.device)
        r.copy_(torch.linalg.solve_triangular(r, identity, upper=True))
        return
    half = k // 2
    top, bottom = r[:half, :half], r[half:, half:]
    invert_upper(top)
    invert_upper(bottom)
    corner = r[:half, half:]
    torch.mm((top @ corner).neg_(), bottom, out=corner)
