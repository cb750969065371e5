# SPDX-License-Identifier: Apache-2.0
"""Shared by the operators' tests: every format, random weights and codes, inputs whose int8 rounding has no doubt."""

from __future__ import annotations

import random
from typing import Any

import torch

from kvopt import ops, reference
from kvopt.reference import Scheme
from kvopt.weights.formats import QuantizedWeight, WeightFormat, quantize_to

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Every pair of bits and scheme that there is.
SCHEMES = [
    *((bits, scheme) for bits in (2, 3, 4, 8) for scheme in (Scheme.ASYMMETRIC, Scheme.SYMMETRIC)),
    (4, Scheme.NF4),
    (4, Scheme.FP4),
    (8, Scheme.INT8_DYNAMIC),
]

FORMATS = [
    WeightFormat(8, None, Scheme.SYMMETRIC),
    WeightFormat(8, 64, Scheme.ASYMMETRIC),
    WeightFormat(8, None, Scheme.INT8_DYNAMIC),
    WeightFormat(4, 128, Scheme.ASYMMETRIC),
    WeightFormat(4, 128, Scheme.SYMMETRIC),
    WeightFormat(4, 32, Scheme.SYMMETRIC),
    WeightFormat(4, 16, Scheme.ASYMMETRIC),
    WeightFormat(4, None, Scheme.ASYMMETRIC),
    WeightFormat(4, 64, Scheme.NF4),
    WeightFormat(4, 128, Scheme.FP4),
    WeightFormat(3, 128, Scheme.ASYMMETRIC),
    WeightFormat(3, 48, Scheme.SYMMETRIC),
    WeightFormat(3, None, Scheme.ASYMMETRIC),
    WeightFormat(2, 32, Scheme.ASYMMETRIC),
    WeightFormat(2, 16, Scheme.SYMMETRIC),
    WeightFormat(2, None, Scheme.ASYMMETRIC),
]

# One of each kind of kernel, for tests that cross them with much else.
KINDS = [
    WeightFormat(8, None, Scheme.SYMMETRIC),
    WeightFormat(8, None, Scheme.INT8_DYNAMIC),
    WeightFormat(4, 64, Scheme.ASYMMETRIC),
    WeightFormat(4, 64, Scheme.NF4),
    WeightFormat(3, 64, Scheme.SYMMETRIC),
    WeightFormat(2, 32, Scheme.ASYMMETRIC),
]


def group_for(scheme: Scheme, k: int, group: int) -> int:
    """``group``, or all of a row where the scheme knows nothing else."""
    return k if scheme == Scheme.INT8_DYNAMIC else group


def make(n: int, k: int, format: WeightFormat, device: str) -> QuantizedWeight:
    return quantize_to((torch.randn(n, k) / k**0.5).to(device), format)


def random_weight(n: int, k: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of different size, one of zeros, one of a single sign, one outlier."""
    weight = torch.randn(n, k) * torch.logspace(-3, 2, n)[torch.randperm(n), None]
    weight[random.randrange(n)] = 0
    weight[random.randrange(n)] = weight[random.randrange(n)].abs()
    weight[random.randrange(n), random.randrange(k)] *= 50
    return weight.to(device, dtype)


def random_plain(
    n: int, k: int, bits: int, group: int, scheme: Scheme, device: str
) -> tuple[torch.Tensor, ...]:
    """Codes, scale and zero that are not the result of any rounding."""
    groups = reference.group_count(k, group)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups).add(0.01).half()
    if scheme == Scheme.ASYMMETRIC:
        zero = torch.rand(n, groups) * 2**bits
    else:
        zero = torch.full((n, groups), 0.0 if scheme.has_book else 2.0 ** (bits - 1))
    return codes.to(device), scale.to(device), zero.half().to(device)


def int8_rows(m: int, k: int, group: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Activations (M, K) whose int8 codes nobody can doubt, and which int8 does change.

    Each group's largest is ±127 steps, a power of two; the others lie 0 or a quarter of a step from a whole one below
    64, so every value is exact in bf16 and no rounding is near a tie.
    """
    steps = torch.randint(-63, 64, (m, k)) + torch.randint(-1, 2, (m, k)) / 4
    for begin in range(0, k, group):
        end = min(begin + group, k)
        column = torch.randint(begin, end, (m, 1))
        steps.scatter_(1, column, 127.0 * (1 - 2 * torch.randint(0, 2, (m, 1))))
    powers = torch.randint(-6, 0, (m, reference.group_count(k, group)))
    return (steps * reference.expand_groups(2.0**powers, k, group)).to(device, dtype)


def arguments_of(weight: QuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> list[Any]:
    """The operator's arguments up to the scheme."""
    n, k = weight.shape
    f = weight.format
    return [x, weight.packed, weight.meta, bias, n, f.bits, f.group_columns(k), int(f.scheme)]


def exact(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """The product in fp64, activations rounded as the format and the options say."""
    group, scheme = weight.format.group_columns(weight.shape[1]), weight.format.scheme
    return reference.linear_unrounded(x, weight.dequantize().double(), bias, group, scheme, **options)


def tolerance(format: WeightFormat) -> float:
    """What fp32 results may be off of their :func:`sizes`, in norm, with activations in 16-bit class or beyond doubt.

    1e-4 is the promise for many outputs. NF4 is 5e-5 off on the CPU, whose integer units know its book rounded to
    steps, and that figure varies over the few outputs of a test.
    """
    return 1.5e-4 if format.scheme == Scheme.NF4 else 1e-4


def sizes(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """The root of the sum of the squares of each output's terms, fp64: what the error of its sum is in proportion to.

    Over many outputs their norm is that of the product. Unlike it, it does not vanish where the terms of a few outputs
    cancel. With SwiGLU, what errors of gate and up in proportion to their sizes make of the result: |silu'| < 1.1.
    """
    scale = options.get("input_scale")
    v = x.double() if scale is None else x.double() * scale.double()
    size = (v.square() @ weight.dequantize().double().square().T).sqrt()
    if not options.get("swiglu"):
        return size
    before = {name: value for name, value in options.items() if name not in ("swiglu", "residual")}
    gate, up = reference.split_swiglu(exact(x, weight, bias, **before))
    of_gate, of_up = reference.split_swiglu(size)
    return torch.hypot(torch.nn.functional.silu(gate) * of_up, 1.1 * of_gate * up)


def check_product(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    at_least: float = 0.0,
    **options: Any,
) -> None:
    """Asserts that ``y`` is the product, off in norm by no more than the tolerance and rounding each output once.

    ``at_least``: how far it may be off in any case.
    """
    expected = exact(x, weight, bias, **options)
    assert y.dtype == x.dtype and y.shape == expected.shape and torch.isfinite(y).all()
    limits = torch.finfo(y.dtype)
    rounding = (expected.abs() + limits.smallest_normal).norm().item() * limits.eps / 2
    bound = rounding + tolerance(weight.format) * sizes(x, weight, bias, **options).norm().item()
    assert (y.double() - expected).norm().item() <= max(bound, at_least)


def fused(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    return ops.qlinear(*arguments_of(weight, x, bias), **options)


def in_torch(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """Torch's own operators in the type of ``x`` on the dequantised weight, activations not rounded to int8."""
    if options.get("input_scale") is not None:
        x = x * options["input_scale"]
    h = torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)
    if options.get("low_rank_x") is not None:
        h = h + options["low_rank_x"] @ options["low_rank_w"].T
    if options.get("swiglu"):
        gate, up = reference.split_swiglu(h)
        h = torch.nn.functional.silu(gate) * up
    return h if options.get("residual") is None else h + options["residual"]
