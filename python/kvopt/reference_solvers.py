# SPDX-License-Identifier: Apache-2.0
"""The solvers' operators once more, in plain torch: see ``reference.py`` and ``csrc/common/{wsearch,gptq}.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt.reference import SMALLEST_HALF, Scheme, group_count

LARGEST_HALF = 65504.0


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is stored, in the type it came in."""
    half = scale.float().half().float()
    return half.clamp(SMALLEST_HALF, LARGEST_HALF).to(scale.dtype)


def _codes(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return ((values / scale).round() + zero).clamp(0, top)


def choose_range(
    values: Tensor, importance: Tensor | None, bits: int, scheme: int, steps: int, smallest: float
) -> tuple[Tensor, Tensor]:
    """Scale and zero (N,) of one group, values (N, columns), in the type of ``values``."""
    top = 2**bits - 1
    low, high = values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0)
    absmax = torch.maximum(high, -low)
    middle = torch.full_like(low, 2.0 ** (bits - 1))
    if scheme == Scheme.ASYMMETRIC:
        full = [(high - low) / top] * 4
    elif bits == 8:
        full = [absmax / 127, 2 * absmax / top]
    else:
        full = [2 * absmax / top, 2 * absmax / (top - 1)]
    if steps == 0:
        scale = _stored(full[0])
        return scale, (-low / scale).round().clamp(0, top) if scheme == Scheme.ASYMMETRIC else middle
    best = torch.full_like(low, float("inf"))
    chosen = [torch.zeros_like(low), torch.zeros_like(low)]
    for i in range(steps + 1):
        p = torch.ones((), dtype=low.dtype) - (1 - torch.tensor(smallest, dtype=low.dtype)) * i / steps
        p = p.to(low.device)
        for reading, unshrunk in enumerate(full):
            scale = _stored(p * unshrunk)
            zero = middle
            if scheme == Scheme.ASYMMETRIC:
                zero = ((-low * p / scale).floor() + (reading - 1)).clamp(0, top)
            codes = _codes(values, scale[:, None], zero[:, None], top)
            square = (scale[:, None] * (codes - zero[:, None]) - values).square()
            error = torch.zeros_like(low)
            for column in range(values.shape[1]):  # in order: float addition is not associative
                error += square[:, column] if importance is None else importance[column] * square[:, column]
            better = error < best
            best = torch.where(better, error, best)
            chosen = [torch.where(better, new, old) for new, old in zip((scale, zero), chosen, strict=True)]
    return chosen[0], chosen[1]


def wsearch(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    scheme: int,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kvopt.ops.wsearch` documents it."""
    codes, scales, zeros = [], [], []
    for begin in range(0, weight.shape[1], group_size):
        values = weight[:, begin : begin + group_size]
        own = None if importance is None else importance[begin : begin + group_size]
        scale, zero = choose_range(values, own, bits, scheme, steps, smallest)
        codes.append(_codes(values, scale[:, None], zero[:, None], 2**bits - 1).to(torch.uint8))
        scales.append(scale.half())
        zeros.append(zero.half())
    return torch.cat(codes, dim=1), torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def gptq_block(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    begin: int,
    end: int,
    bits: int,
    group_size: int,
    scheme: int,
    steps: int,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`kvopt.ops.gptq_block` documents it."""
    n, size = weight.shape[0], end - begin
    work = weight[
        :, begin:
    ].clone()  # what lies behind the block is only looked at by a group that begins with it
    codes = torch.empty(n, size, dtype=torch.uint8, device=weight.device)
    errors = weight.new_empty(n, size)
    groups = 0 if scale is not None else group_count(size, group_size)
    scales, zeros = (torch.empty(n, groups, dtype=torch.float16, device=weight.device) for _ in range(2))
    step = offset = weight.new_empty(0)
    for i in range(size):
        if scale is not None and zero is not None:
            step, offset = scale[:, i].to(weight.dtype), zero[:, i].to(weight.dtype)
        elif i % group_size == 0:
            own = None if importance is None else importance[begin + i : begin + i + group_size]
            step, offset = choose_range(work[:, i : i + group_size], own, bits, scheme, steps, smallest)
            scales[:, i // group_size], zeros[:, i // group_size] = step.half(), offset.half()
        code = _codes(work[:, i], step, offset, 2**bits - 1)
        codes[:, i] = code.to(torch.uint8)
        errors[:, i] = (work[:, i] - step * (code - offset)) / factor[begin + i, begin + i]
        work[:, i + 1 : size] -= errors[:, i, None] * factor[begin + i, begin + i + 1 : end]
    return codes, errors, scales, zeros


def wsearch_hqq(
    weight: Tensor,
    bits: int,
    group_size: int,
    scheme: int,
    iterations: int,
    beta: float,
    kappa: float,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kvopt.ops.wsearch_hqq` documents it."""
    top = 2**bits - 1
    codes, scales, zeros = [], [], []
    for begin in range(0, weight.shape[1], group_size):
        w = weight[:, begin : begin + group_size]
        low, high = w.amin(dim=1, keepdim=True).clamp(max=0), w.amax(dim=1, keepdim=True).clamp(min=0)
        scale = _stored((high - low) / top)
        zero = -low / scale
        best_zero, best = zero, torch.full_like(zero, float("inf"))
        going = torch.ones_like(zero, dtype=torch.bool)
        b = beta
        for _ in range(iterations):
            q = (w / scale + zero).clamp(0, top).round()
            residual = w - scale * (q - zero)
            size = residual.abs()
            error = size.mean(dim=1, keepdim=True)
            going &= error < best
            best, best_zero = torch.where(going, error, best), torch.where(going, zero, best_zero)
            shrunk = residual.sign() * (size - size.clamp(min=1e-30) ** (norm - 1) / b).clamp(min=0)
            zero = (q - (w - shrunk) / scale).mean(dim=1, keepdim=True)
            b *= kappa
        stored = best_zero.half()
        codes.append((w / scale + stored.float()).clamp(0, top).round().to(torch.uint8))
        scales.append(scale.half())
        zeros.append(stored)
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)
